"""method="ring" and "ulysses+ring" with a recipe: e4m3 and descales travel from rank to rank.

Under "ring" a rank quantizes its own pieces by themselves, so that K and V have the scales of
pieces (where the recipe takes a mean off, that of the whole sequence); under "ulysses+ring" they
have those of whole sequences. Parts are merged by LSE as in 16 bits.

The backward is the 16-bit one on dequantized tensors, part by part with the merged O and LSE. As in
`flash8.ops.fp8_backward16` K enters without its mean mu, with an LSE that lacks
softmax_scale * q . mu, and mu's exact share is added to dQ once: all parts have the same mu, and
what a row of dS sums to over all of them is known.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash8.distributed import fp8, partial, plan, scaling, ulysses
from flash8.distributed.checks import Ranks
from flash8.distributed.collectives import Passing
from flash8.distributed.merge import Merged, row_sums_of_ds, sink_gradient
from flash8.distributed.ring import Ring
from flash8.distributed.scaling import Shared
from flash8.fp8.quantize import dequantize
from flash8.tensors.descales import BLOCK, block_offsets, num_packed_blocks
from flash8.tensors.float8 import E4M3
from flash8.tensors.scaled_tensor import ScaledTensor


class _Keys(NamedTuple):
    """K and V of one rank: bytes side by side, and the scales of its spans likewise."""

    data: Tensor  # (tokens, heads_kv, head_dim + head_dim_v)
    scales: Tensor  # (1 or spans or blocks, 2 * heads or 2)

    @classmethod
    def of(cls, k8: Shared, v8: Shared) -> "_Keys":
        data = torch.cat((k8.data.view(torch.uint8), v8.data.view(torch.uint8)), dim=-1)
        return cls(data, torch.cat([_as_rows(x.descale) for x in (k8, v8)], dim=-1))


class _Ring(NamedTuple):
    """The ring of a call, for keys with a descale of so many dimensions."""

    how: fp8.How
    ring: Ring
    dims: int
    head_dim: int

    @classmethod
    def of(cls, how: fp8.How, k_descale: Tensor, head_dim: int) -> "_Ring":
        ring = Ring(how.batch, how.ranks.groups[0], how.options)
        return cls(how, ring, k_descale.dim(), head_dim)

    def pieces(self, step: int, device: torch.device) -> Tensor:
        """cu_seqlens of the spans whose keys are here in this step."""
        return scaling.pieces(self.how.batch, self.how.ranks.size, self.ring.source(step), device)

    def calls(self, step: int, device: torch.device) -> tuple[plan.Call, ...]:
        how = plan.How(self.ring.window, BLOCK if self.dims == 3 else 1, joins=False)
        ranks = self.how.ranks
        return plan.around(self.how.batch, ranks.size, ranks.rank, how, device)[step]

    def pass_on(self, keys: _Keys, step: int) -> tuple[Passing, Passing] | None:
        """Sends what is here in this step; None after the last."""
        coming = self.ring.pass_on(keys.data, step)
        if coming is None:
            return None
        rows = len(keys.scales)
        if self.dims == 3:
            spans = self.how.batch.parts * len(self.how.batch.lengths)
            rows = num_packed_blocks(self.ring.count(step + 1), spans)
        return coming, Passing(keys.scales, rows, self.ring.group)

    def split(self, keys: _Keys) -> tuple[Shared, Shared]:
        """K and V, as bytes; their means are with the rank."""
        k, v = keys.data[..., : self.head_dim], keys.data[..., self.head_dim :]
        half = keys.scales.shape[1] // 2
        scales = keys.scales.split((half, half), dim=1)
        if self.dims == 3:
            scales = tuple(x.transpose(0, 1)[None] for x in scales)
        elif self.dims == 0:
            scales = tuple(x.reshape(()) for x in scales)
        return Shared(k, scales[0], None), Shared(v, scales[1], None)


def _as_rows(descale: Tensor) -> Tensor:
    if descale.dim() == 3:
        return descale[0].transpose(0, 1)
    return descale.view(1, 1) if descale.dim() == 0 else descale


class Saved(NamedTuple):
    """What the backward needs: q, k and v in e4m3 with scales of spans, and what was found."""

    q8: ScaledTensor
    k8: Shared
    v8: Shared
    s_aux: Tensor | None
    out: Tensor
    lse: Tensor


def forward(
    how: fp8.How, q8: ScaledTensor, k8: Shared, v8: Shared, s_aux: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """O (rows, heads, head_dim_v) in `dtype` and LSE (heads, rows)."""
    q_data, device, parts = q8.data, q8.data.device, how.batch.parts
    ring, keys = _Ring.of(how, k8.descale, k8.data.shape[-1]), _Keys.of(k8, v8)
    wide = torch.promote_types(dtype, torch.float32)  # what fp32 weights make of the parts' O
    merged = Merged(
        q_data.new_zeros((*q_data.shape[:-1], v8.data.shape[-1]), dtype=wide),
        q_data.new_full(q_data.shape[1::-1], float("-inf"), dtype=torch.float32),
    )
    of_queries = block_offsets(how.pieces(q_data))
    for step in range(ring.ring.steps()):
        coming = ring.pass_on(keys, step)
        here_k, here_v = ring.split(keys)
        both = here_k._replace(mean=k8.mean), here_v._replace(mean=v8.mean)
        firsts = of_queries, block_offsets(ring.pieces(step, device))
        for call in ring.calls(step, device):
            options = partial.options_of(call, how.options)
            options = scaling.of_call(options, call, q8, *both, firsts, parts)
            taken = fp8.keys_of(call, here_k.data, here_v.data)
            inputs = (fp8.taken(q_data, call.q_rows), *taken, None)
            merged.add(call.q_rows, *fp8.forward(inputs, dtype, options))
        if coming is not None:
            keys = _Keys(*(x.wait() for x in coming))
    return merged.finish(s_aux, dtype)


def backward(
    how: fp8.How, dout: Tensor | None, dlse: Tensor | None, saved: Saved
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk and dv in fp32, of the rotated q and k, and ds_aux."""
    q8, k8, v8, s_aux, out, lse = saved
    device, dtype, pieces = out.device, out.dtype, how.pieces(out)

    def dequantized(data: Tensor, descale: Tensor, cu_seqlens: Tensor) -> Tensor:
        return dequantize(ScaledTensor(data, descale, q8.granularity, cu_seqlens=cu_seqlens))

    ring, keys = _Ring.of(how, k8.descale, k8.data.shape[-1]), _Keys.of(k8, v8)
    q_wide = dequantized(q8.data, q8.descale, pieces)
    scale = how.options.scale(q_wide)
    mean = own_mean = None
    if how.options.softcap == 0.0:  # beyond a cap a shift of the scores does not cancel
        own_mean = how.mean(dequantized(k8.data, k8.descale, pieces))
        mean = how.of_queries(own_mean if k8.mean is None else own_mean + k8.mean, q_wide)
    centred = lse
    if mean is not None:
        shift = scale * (q_wide * mean).sum(dim=-1).transpose(0, 1)
        centred = torch.where(lse == float("-inf"), lse, lse - shift)
    dq = torch.zeros_like(q_wide)
    arriving = None
    for step in range(ring.ring.steps()):
        coming = ring.pass_on(keys, step)
        here_pieces = ring.pieces(step, device)
        here_k, here_v = (
            dequantized(x.data.contiguous().view(E4M3), x.descale, here_pieces)
            for x in ring.split(keys)
        )
        if own_mean is not None:
            here_k = here_k - how.of_spans(own_mean, here_k, here_pieces)
        if v8.mean is not None:
            here_v = here_v + how.of_spans(v8.mean, here_v, here_pieces)
        dkv = torch.zeros_like(keys.data, dtype=torch.float32)
        inputs = (q_wide.to(dtype), here_k.to(dtype), here_v.to(dtype), None)
        for call in ring.calls(step, device):
            found = partial.backward(call, dout, dlse, inputs, out, centred, how.options)
            partial.add_queries(dq, call, found[0])
            partial.add_keys(dkv, call, found[1], found[2])
        if arriving is not None:
            dkv += arriving.wait()
        arriving = ring.ring.pass_on(dkv, step)
        if coming is not None:
            keys = _Keys(*(x.wait() for x in coming))
    if mean is not None:
        row_sums = row_sums_of_ds(s_aux, dout, dlse, out, lse)
        dq += scale * row_sums.transpose(0, 1)[..., None] * mean
    widths = (k8.data.shape[-1], v8.data.shape[-1])
    dk, dv = ring.ring.send_home(dkv).split(widths, dim=-1)
    ds_aux = None if s_aux is None else sink_gradient(s_aux, dout, dlse, out, lse)
    return dq, dk, dv, ds_aux


def save(ctx: Any, saved: Saved) -> None:
    q8, k8, v8, *others = saved
    ctx.save_for_backward(q8.data, q8.descale, *k8, *v8, *others)
    ctx.granularity = q8.granularity


def load(ctx: Any) -> Saved:
    q_data, q_descale, *others = ctx.saved_tensors
    q8 = ScaledTensor(q_data, q_descale, ctx.granularity)
    return Saved(q8, Shared(*others[:3]), Shared(*others[3:6]), *others[6:])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: fp8.How
    ) -> tuple[Tensor, Tensor]:
        q8 = how.recipe.quantize("q", q, how.pieces(q))
        k8, v8 = how.by_span("k", k), how.by_span("v", v)
        out, lse = forward(how, q8, k8, v8, s_aux, v.dtype)
        ctx.set_materialize_grads(False)
        save(ctx, Saved(q8, k8, v8, s_aux, out, lse))
        ctx.how, ctx.rest, ctx.dtypes = how, fp8.Backward(how.recipe), (q.dtype, k.dtype, v.dtype)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        ctx.rest.note(dout)
        dq, dk, dv, ds_aux = backward(ctx.how, dout, dlse, load(ctx))
        gradients = (ctx.how.rotated_back(dq), ctx.how.rotated_back(dk), dv)
        return *(x.to(kind) for x, kind in zip(gradients, ctx.dtypes, strict=True)), ds_aux, None


class _Joined(torch.autograd.Function):
    """The ring between groups of ranks that share heads. Scales are those of whole sequences."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: fp8.How
    ) -> tuple[Tensor, Tensor]:
        group, around = how.ranks.groups
        outer = around.size(), around.rank()
        queries, keys = ulysses.ways(q, k, how.batch, group, outer)
        q8, k8, v8 = how.agree("q", q), how.agree("k", k), how.agree("v", v)
        own_q, own_k, own_v = fp8.to_heads(queries, keys, q8, k8, v8)
        of_ring = how._replace(ranks=Ranks(*outer, (around,)))
        parts = how.batch.parts
        granularity = "tensor" if q8.descale.dim() == 0 else "head"
        inputs = (
            ScaledTensor(own_q, _of_spans(q8.descale, queries.own(), parts), granularity),
            _of_heads(own_k, k8, keys.own(), parts),
            _of_heads(own_v, v8, keys.own(), parts),
            None if s_aux is None else s_aux[queries.own()],
        )
        out, lse = forward(of_ring, *inputs, v.dtype)
        save(ctx, Saved(*inputs, out, lse))
        ctx.how, ctx.ways, ctx.heads = of_ring, (queries, keys), q.shape[1]
        ctx.rest, ctx.dtypes = fp8.Backward(how.recipe), (q.dtype, k.dtype, v.dtype)
        return ulysses.to_tokens(queries, out, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        ctx.rest.note(dout)
        queries, keys = ctx.ways
        found = ulysses.gradients_to_heads(queries, dout, dlse if ctx.how.returns_lse else None)
        *own, own_sink = backward(ctx.how, *found, load(ctx))
        dq, dk, dv = fp8.gradients_to_tokens(queries, keys, own)
        gradients = (ctx.how.rotated_back(dq), ctx.how.rotated_back(dk), dv)
        ds_aux = fp8.of_all_heads(own_sink, queries, ctx.heads)
        return *(x.to(kind) for x, kind in zip(gradients, ctx.dtypes, strict=True)), ds_aux, None


def _of_spans(descale: Tensor, heads: slice, parts: int) -> Tensor:
    return descale if descale.dim() == 0 else descale[:, heads].repeat_interleave(parts, dim=0)


def _of_heads(data: Tensor, shared: Shared, heads: slice, parts: int) -> Shared:
    mean = None if shared.mean is None else shared.mean[:, heads]
    return Shared(data, _of_spans(shared.descale, heads, parts), mean)


def attend(
    method: str, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: fp8.How
) -> tuple[Tensor, Tensor]:
    """O (rows, heads, head_dim_v) and LSE (heads, rows) of this rank's packed queries."""
    function = _Attention if method == "ring" else _Joined
    found: tuple[Tensor, Tensor] = function.apply(q, k, v, s_aux, how)
    return found

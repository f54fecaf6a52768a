"""method="ring" with a recipe: e4m3 and descales travel from rank to rank.

A rank quantizes its own pieces by themselves, so that K and V have the scales of pieces (where the
recipe takes a mean off, that of the whole sequence). Parts are merged by LSE as in 16 bits.

The backward is the 16-bit one on dequantized tensors, part by part with the merged O and LSE. As in
`flash8.ops.fp8_backward16` K enters without its mean mu, with an LSE that lacks
softmax_scale * q . mu, and mu's exact share is added to dQ once: all parts have the same mu, and
what a row of dS sums to over all of them is known.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash8.distributed import fp8, partial, plan, scaling
from flash8.distributed.collectives import Passing
from flash8.distributed.merge import Merged, row_sums_of_ds, sink_gradient
from flash8.distributed.ring import Ring
from flash8.distributed.scaling import Shared
from flash8.fp8.quantize import dequantize
from flash8.tensors.descales import BLOCK, block_offsets, num_packed_blocks
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: fp8.How
    ) -> tuple[Tensor, Tensor]:
        q8 = how.recipe.quantize("q", q, how.pieces(q))
        k8, v8 = how.by_span("k", k), how.by_span("v", v)
        ring, keys = _Ring.of(how, k8.descale, k.shape[-1]), _Keys.of(k8, v8)
        merged = Merged(
            q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=torch.float32),
            q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32),
        )
        for step in range(ring.ring.steps()):
            coming = ring.pass_on(keys, step)
            here_k, here_v = ring.split(keys)
            means = here_k._replace(mean=k8.mean), here_v._replace(mean=v8.mean)
            firsts = tuple(map(block_offsets, (how.pieces(q), ring.pieces(step, q.device))))
            for call in ring.calls(step, q.device):
                options = partial.options_of(call, how.options)
                options = scaling.of_call(
                    options, call, q8, *means, (firsts[0], firsts[1]), how.batch.parts
                )
                taken = fp8.keys_of(call, here_k.data, here_v.data)
                inputs = (fp8.taken(q8.data, call.q_rows), *taken, None)
                merged.add(call.q_rows, *fp8.forward(inputs, v.dtype, options))
            if coming is not None:
                keys = _Keys(*(x.wait() for x in coming))
        out, lse = merged.finish(s_aux, v.dtype)
        ctx.set_materialize_grads(False)
        kept = (q8.data, k8.data, v8.data, q8.descale, k8.descale, v8.descale, k8.mean, v8.mean)
        ctx.save_for_backward(*kept, s_aux, out, lse)
        ctx.how, ctx.granularity, ctx.rest = how, q8.granularity, fp8.Backward(how.recipe)
        ctx.dtypes = (q.dtype, k.dtype, v.dtype)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q_data, k_data, v_data, *scales, k_mean, v_mean, s_aux, out, lse = ctx.saved_tensors
        how: fp8.How = ctx.how
        device, dtype, pieces = out.device, out.dtype, how.pieces(q_data)
        ctx.rest.note(dout)

        def dequantized(data: Tensor, descale: Tensor, cu_seqlens: Tensor) -> Tensor:
            return dequantize(ScaledTensor(data, descale, ctx.granularity, cu_seqlens=cu_seqlens))

        ring = _Ring.of(how, scales[1], k_data.shape[-1])
        keys = _Keys.of(Shared(k_data, scales[1], None), Shared(v_data, scales[2], None))
        q_wide = dequantized(q_data, scales[0], pieces)
        scale = how.options.softmax_scale
        scale = q_data.shape[-1] ** -0.5 if scale is None else scale
        mean = own_mean = None
        if how.options.softcap == 0.0:  # beyond a cap a shift of the scores does not cancel
            own_mean = how.mean(dequantized(k_data, scales[1], pieces))
            mean = how.of_queries(own_mean if k_mean is None else own_mean + k_mean, q_wide)
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
                dequantized(x.data.contiguous().view(q_data.dtype), x.descale, here_pieces)
                for x in ring.split(keys)
            )
            if own_mean is not None:
                here_k = here_k - how.of_spans(own_mean, here_k, here_pieces)
            if v_mean is not None:
                here_v = here_v + how.of_spans(v_mean, here_v, here_pieces)
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
        own = ring.ring.send_home(dkv)
        dk, dv = own.split((k_data.shape[-1], v_data.shape[-1]), dim=-1)
        gradients = (how.rotated_back(dq), how.rotated_back(dk), dv)
        ds_aux = None if s_aux is None else sink_gradient(s_aux, dout, dlse, out, lse)
        return *(x.to(kind) for x, kind in zip(gradients, ctx.dtypes, strict=True)), ds_aux, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: fp8.How
) -> tuple[Tensor, Tensor]:
    """O (rows, heads, head_dim_v) and LSE (heads, rows) of this rank's packed queries."""
    found: tuple[Tensor, Tensor] = _Attention.apply(q, k, v, s_aux, how)
    return found

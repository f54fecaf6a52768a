"""attention with a recipe: FP8 forward, the recipe's backward, e4m3 on the wire.

Here are "all_gather" and "ulysses": in both a query meets all of its keys in one call, so that they
take every recipe (`fp8_ring` has the others). For the backward a rank keeps e4m3, O and LSE, under
"all_gather" of its own tokens, under "ulysses" of all tokens of its heads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash8.call.options import Options, without_tensors
from flash8.distributed import checks, collectives, partial, plan, scaling
from flash8.distributed.layout import Batch
from flash8.distributed.ulysses import Way, gradients_to_heads, to_tokens, ways
from flash8.fp8.recipes import FP8_PRODUCTS, Recipe
from flash8.tensors.descales import BLOCK, block_offsets
from flash8.tensors.float8 import E4M3
from flash8.tensors.hadamard import rotation_for
from flash8.tensors.scaled_tensor import ScaledTensor
from flash8.tensors.tokens import Tokens

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


class How(NamedTuple):
    """What the ranks of a group agree on for one call."""

    batch: Batch
    ranks: checks.Ranks
    options: Options
    recipe: Recipe
    returns_lse: bool

    def agree(self, name: str, x: Tensor) -> scaling.Shared:
        ranks = self.ranks
        return scaling.agree(self.recipe, name, x, self.batch, ranks.size, ranks.rank, ranks.groups)

    def by_span(self, name: str, x: Tensor) -> scaling.Shared:
        ranks = self.ranks
        return scaling.by_span(
            self.recipe, name, x, self.batch, ranks.size, ranks.rank, ranks.groups
        )

    def mean(self, x: Tensor) -> Tensor:
        """Over all tokens of each sequence and head, (batch, heads, d)."""
        ranks = self.ranks
        return scaling.mean_of(x, self.batch, ranks.size, ranks.rank, ranks.groups)

    def of_spans(self, values: Tensor, x: Tensor, pieces: Tensor) -> Tensor:
        """(batch, ...) so that it broadcasts over the tokens of a rank with these pieces."""
        spans = torch.arange(len(pieces) - 1, device=x.device) // self.batch.parts
        return Tokens(pieces).spread(values[spans], x)

    def of_queries(self, values: Tensor, q: Tensor) -> Tensor:
        """(batch, heads_kv, d) so that it broadcasts over this rank's q."""
        group = q.shape[1] // values.shape[1]
        return self.of_spans(values.repeat_interleave(group, dim=1), q, self.pieces(q))

    def pieces(self, x: Tensor) -> Tensor:
        return scaling.pieces(self.batch, self.ranks.size, self.ranks.rank, x.device)

    def calls(self, q: Tensor) -> tuple[plan.Call, ...]:
        how = plan.How((self.options.window_left, self.options.window_right), align=BLOCK)
        return plan.gathered(self.batch, self.ranks.size, self.ranks.rank, how, q.device)

    def gathered(self, k8: Tensor, v8: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of all K and V: not every operation knows float8."""
        longest = max(self.batch.counts(self.ranks.size))
        both = torch.cat((k8.view(torch.uint8), v8.view(torch.uint8)), dim=-1)
        found = collectives.gather(both, longest, self.ranks.groups[0])
        return found[..., : k8.shape[-1]], found[..., k8.shape[-1] :]

    def rotated_back(self, x: Tensor) -> Tensor:
        """A gradient of q or k, from that of the rotated one."""
        rotation = rotation_for(self.recipe.hadamard, x.shape[-1])
        return x if rotation is None else rotation.invert(x)


class Backward:
    """What the recipe says of the backward, as it was when the forward ran."""

    def __init__(self, recipe: Recipe) -> None:
        self._products = FP8_PRODUCTS[recipe.backward]
        self._dtype = recipe.gradient_dtype
        self._descale = recipe.gradient_descale()
        self._amax = recipe.gradient_amax()

    def note(self, dout: Tensor | None) -> None:
        """Gathers the amax of dO where the recipe wants it."""
        if self._amax is not None and dout is not None:
            amax = Tokens().finite_amax(dout.float()[None], "tensor")
            self._amax.copy_(torch.maximum(self._amax, amax))

    def run(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        inputs: Inputs,
        out: Tensor,
        lse: Tensor,
        options: Options,
    ) -> partial.Gradients:
        how = (self._products, self._dtype, self._descale)
        found: partial.Gradients = torch.ops.flash8.fp8_backward(
            dout, dlse, *inputs, out, lse, *how, *options
        )
        return found


def forward(inputs: Inputs, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor]:
    """O in `dtype` and LSE."""
    q8, k8, v8, s_aux = inputs
    out = q8.new_empty((*q8.shape[:-1], v8.shape[-1]), dtype=dtype)
    lse, _, _ = torch.ops.flash8.forward_out(q8, k8, v8, None, s_aux, out, *options)
    return out, lse


def taken(x: Tensor, index: Tensor | None) -> Tensor:
    return partial.rows(x.view(torch.uint8), index).view(E4M3)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: How
    ) -> tuple[Tensor, Tensor]:
        q8 = how.recipe.quantize("q", q, how.pieces(q))
        k8, v8 = how.agree("k", k), how.agree("v", v)
        all_k, all_v = how.gathered(k8.data, v8.data)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
        for call in how.calls(q):
            inputs = (taken(q8.data, call.q_rows), *keys_of(call, all_k, all_v), s_aux)
            found = forward(inputs, v.dtype, _options(how, call, q8, k8, v8))
            partial.put(out, lse, call, *found)
        ctx.set_materialize_grads(False)
        scales = (q8.descale, k8.descale, k8.mean, v8.descale, v8.mean)
        ctx.save_for_backward(q8.data, k8.data, v8.data, *scales, s_aux, out, lse)
        ctx.how, ctx.rest, ctx.granularity = how, Backward(how.recipe), q8.granularity
        ctx.dtypes = (q.dtype, k.dtype, v.dtype)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q_data, k_data, v_data, *scales, s_aux, out, lse = ctx.saved_tensors
        how: How = ctx.how
        q8 = ScaledTensor(q_data, scales[0], ctx.granularity)
        k8, v8 = scaling.Shared(k_data, *scales[1:3]), scaling.Shared(v_data, *scales[3:])
        ctx.rest.note(dout)
        all_k, all_v = how.gathered(k_data, v_data)
        wide = partial.wide(out)
        dq = torch.zeros_like(q_data, dtype=wide)
        dkv = q_data.new_zeros((*all_k.shape[:2], all_k.shape[2] + all_v.shape[2]), dtype=wide)
        ds_aux = None if s_aux is None else torch.zeros_like(s_aux)
        for call in how.calls(q_data):
            inputs = (taken(q_data, call.q_rows), *keys_of(call, all_k, all_v), s_aux)
            found = ctx.rest.run(
                None if dout is None else partial.rows(dout, call.q_rows),
                None if dlse is None else partial.columns(dlse, call.q_rows),
                inputs,
                partial.rows(out, call.q_rows),
                partial.columns(lse, call.q_rows),
                _options(how, call, q8, k8, v8),
            )
            partial.add_queries(dq, call, found[0])
            partial.add_keys(dkv, call, found[1], found[2])
            if ds_aux is not None:
                ds_aux += found[3]
        own = collectives.scatter_sum(dkv, how.ranks.groups[0])[: len(k_data)]
        dk, dv = own.split((k_data.shape[-1], v_data.shape[-1]), dim=-1)
        gradients = (how.rotated_back(dq), how.rotated_back(dk), dv)
        return *(x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)), ds_aux, None


def keys_of(call: plan.Call, all_k: Tensor, all_v: Tensor) -> tuple[Tensor, Tensor]:
    return taken(all_k, call.k_rows), taken(all_v, call.k_rows)


def _options(
    how: How, call: plan.Call, q8: ScaledTensor, k8: scaling.Shared, v8: scaling.Shared
) -> Options:
    options = partial.options_of(call, how.options)
    firsts = (
        block_offsets(how.pieces(q8.data)),
        scaling.first_blocks(how.batch, q8.data.device),
    )
    return scaling.of_call(options, call, q8, k8, v8, firsts)


def to_heads(
    queries: Way, keys: Way, q8: scaling.Shared, k8: scaling.Shared, v8: scaling.Shared
) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 of all tokens of the own heads."""
    q_data, k_data, v_data = (x.data.view(torch.uint8) for x in (q8, k8, v8))
    own_q = queries.to_heads(q_data)
    both = keys.to_heads(torch.cat((k_data, v_data), dim=-1))
    own_k, own_v = both.split((k_data.shape[-1], v_data.shape[-1]), dim=-1)
    return own_q.view(E4M3), own_k.contiguous().view(E4M3), own_v.contiguous().view(E4M3)


def gradients_to_tokens(
    queries: Way, keys: Way, own: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, those of shared KV heads added up."""
    dq, dk, dv = own
    both = keys.to_tokens(torch.cat((dk, dv), dim=-1))
    of_k, of_v = both.split((dk.shape[-1], dv.shape[-1]), dim=-1)
    return queries.to_tokens(dq), of_k, of_v


def of_all_heads(own: Tensor | None, queries: Way, heads: int) -> Tensor | None:
    """The gradient of the sinks, of which the own heads have one."""
    if own is None:
        return None
    found = own.new_zeros(heads)
    found[queries.own()] = own
    return found


class _Ulysses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: How
    ) -> tuple[Tensor, Tensor]:
        (group,) = how.ranks.groups
        queries, keys = ways(q, k, how.batch, group, (1, 0))
        q8, k8, v8 = how.agree("q", q), how.agree("k", k), how.agree("v", v)
        heads, heads_kv = queries.own(), keys.own()
        options = plan.of_whole_sequences(how.batch, how.options, q.device)._replace(
            q_descale=_of_heads(q8.descale, heads),
            k_descale=_of_heads(k8.descale, heads_kv),
            v_descale=_of_heads(v8.descale, heads_kv),
            k_mean=None if k8.mean is None else k8.mean[:, heads_kv],
            v_mean=None if v8.mean is None else v8.mean[:, heads_kv],
        )
        sink = None if s_aux is None else s_aux[heads]
        inputs = (*to_heads(queries, keys, q8, k8, v8), sink)
        out, lse = forward(inputs, v.dtype, options)
        ctx.options = without_tensors(options)
        tensors = [getattr(options, name) for name in ctx.options.tensors]
        ctx.save_for_backward(*inputs, out, lse, *tensors)
        ctx.how, ctx.ways, ctx.rest = how, (queries, keys), Backward(how.recipe)
        ctx.dtypes, ctx.heads = (q.dtype, k.dtype, v.dtype), q.shape[1]
        return to_tokens(queries, out, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        *inputs, out, lse = ctx.saved_tensors[:6]
        options = ctx.options.with_tensors(ctx.saved_tensors[6:])
        queries, keys = ctx.ways
        ctx.rest.note(dout)
        found = gradients_to_heads(queries, dout, dlse if ctx.how.returns_lse else None)
        *own, own_sink = ctx.rest.run(*found, tuple(inputs), out, lse, options)
        dq, dk, dv = gradients_to_tokens(queries, keys, own)
        ds_aux = of_all_heads(None if inputs[3] is None else own_sink, queries, ctx.heads)
        wide = partial.wide(out)
        gradients = (ctx.how.rotated_back(dq.to(wide)), ctx.how.rotated_back(dk.to(wide)), dv)
        return *(x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True)), ds_aux, None


def _of_heads(descale: Tensor, heads: slice) -> Tensor:
    """(), (batch, heads), (1, heads, blocks): all have their heads second."""
    return descale if descale.dim() == 0 else descale[:, heads]


def attend(
    method: str, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: How
) -> tuple[Tensor, Tensor]:
    """O (rows, heads, head_dim_v) and LSE (heads, rows) of this rank's packed queries."""
    function = _Gathered if method == "all_gather" else _Ulysses
    found: tuple[Tensor, Tensor] = function.apply(q, k, v, s_aux, how)
    return found

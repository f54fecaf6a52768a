"""What the attention ops return, and memory for it."""

from typing import NamedTuple

from torch import Tensor

from flash8.call import checks
from flash8.call.options import Options


class ForwardResult(NamedTuple):
    """What a forward returns. The partials are empty unless num_splits > 1."""

    out: Tensor  # q's layout, head_dim_v last
    lse: Tensor  # (batch, heads, seqlen_q) or (heads, total_q)
    out_partial: Tensor  # (num_splits, batch, heads, seqlen_q, head_dim_v) or packed likewise
    lse_partial: Tensor  # (num_splits, *lse.shape)


class Gradients(NamedTuple):
    """What a backward returns. dqv and ds_aux are empty if the forward had none."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dqv: Tensor
    ds_aux: Tensor


def empty_out(q: Tensor, v: Tensor, options: Options) -> Tensor:
    """Memory for the O of a forward."""
    return q.new_empty((*q.shape[:-1], options.head_dim_v(v)), dtype=checks.output_dtype(q))


def empty_lse(q: Tensor) -> Tensor:
    """Memory for the LSE of a forward."""
    *batch, rows, heads, _ = q.shape
    return q.new_empty((*batch, heads, rows), dtype=checks.lse_dtype(q))


def empty_forward(q: Tensor, v: Tensor, options: Options) -> ForwardResult:
    return ForwardResult(empty_out(q, v, options), *empty_lse_and_partials(q, v, options))


def empty_lse_and_partials(q: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    lse = empty_lse(q)
    if options.num_splits == 1:
        return lse, lse.new_empty((0,)), lse.new_empty((0,))
    splits = (options.num_splits, *lse.shape)
    return lse, lse.new_empty((*splits, options.head_dim_v(v))), lse.new_empty(splits)


def empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, s_aux: Tensor | None
) -> Gradients:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty((0,)) if x is None else x.new_empty(x.shape)

    return Gradients(like(q), like(k), like(v), like(qv), like(s_aux))


def empty_tangents(q: Tensor, v: Tensor, lse: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], options.head_dim_v(v))), lse.new_empty(lse.shape)

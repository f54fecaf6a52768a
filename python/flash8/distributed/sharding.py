"""`shard` and `unshard`: from whole sequences to a rank's part and back."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flash8.distributed import checks, collectives, partial
from flash8.distributed.layout import Batch, places_of, rows_of
from flash8.tensors.arguments import describe


def shard(
    x: Tensor, *, group: Any, cu_seqlens: Tensor | None = None, layout: str = "zigzag"
) -> Tensor:
    """A rank's part of x, of which every rank has the whole. Sends nothing.

    Args:
        x: (batch, seqlen, ...), or packed (total, ...) with cu_seqlens; any dtype: tokens, labels,
            positions (`flash8.varlen.position_ids_from_cu_seqlens`), q, k, v.
        group: as in `flash8.distributed.attention`.
        cu_seqlens: int32 or int64 (batch + 1,), the boundaries of the whole sequences. It is read
            on the host.
        layout: "zigzag" or "contiguous".

    Returns:
        (batch, own tokens, ...) or (own tokens, ...). Gradients go to the tokens that were taken.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    ranks, layout = checks.ranks_of(group), checks.layout(layout)
    _require_tensor(x)
    if cu_seqlens is None:
        if x.dim() < 2:
            raise ValueError(
                "x must be (batch, seqlen, ...), or packed (total, ...) with cu_seqlens, got shape "
                f"{tuple(x.shape)}"
            )
        batch = Batch((x.shape[1],), layout)
        return x.index_select(1, rows_of(batch, ranks.size, ranks.rank, x.device))
    batch = checks.packed_batch(cu_seqlens, layout)
    if x.dim() < 1 or x.shape[0] != sum(batch.lengths):
        raise ValueError(
            f"x must have the {sum(batch.lengths)} tokens of cu_seqlens, got shape {tuple(x.shape)}"
        )
    return x.index_select(0, rows_of(batch, ranks.size, ranks.rank, x.device))


def unshard(
    x: Tensor,
    *,
    group: Any,
    cu_seqlens: Tensor | None = None,
    layout: str = "zigzag",
    seqlen: int | None = None,
) -> Tensor:
    """The whole of what `shard` took apart, on every rank.

    Args:
        x: a rank's part, (batch, own tokens, ...) or packed with cu_seqlens.
        seqlen: of the whole sequences of a dense x; by default own tokens * ranks. Refused
            with cu_seqlens.
        The others are those of `shard`.

    Returns:
        (batch, seqlen, ...) or (total, ...). The gradient of a token is the sum, in fp32, of what
        every rank has for it: that of the sum of all ranks' losses.
    """
    ranks, layout = checks.ranks_of(group), checks.layout(layout)
    _require_tensor(x)
    checks.no_seqlen(seqlen, cu_seqlens)
    packed = cu_seqlens is not None
    if packed:
        batch = checks.packed_batch(cu_seqlens, layout)
    else:
        batch = checks.dense_batch("x", x, seqlen, ranks, layout)
    checks.local_rows("x", x, batch, ranks, packed)
    whole: Tensor = _Unshard.apply(x if packed else x.flatten(0, 1), batch, ranks)
    if packed:
        return whole
    length = x.shape[1] * ranks.size if seqlen is None else seqlen
    return whole.view(x.shape[0], length, *x.shape[2:])


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, ranks: checks.Ranks) -> Tensor:
        ctx.batch, ctx.ranks = batch, ranks
        gathered, longest = x, max(batch.counts(ranks.size))
        for group in ranks.groups:
            gathered = collectives.gather(gathered, longest, group)
            longest = len(gathered)
        return gathered.index_select(0, places_of(batch, ranks.size, x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        batch, ranks = ctx.batch, ctx.ranks
        longest, places = max(batch.counts(ranks.size)), places_of(batch, ranks.size, grad.device)
        wide = grad.new_zeros((ranks.size * longest, *grad.shape[1:]), dtype=partial.wide(grad))
        wide.index_copy_(0, places, grad.to(wide.dtype))
        for group in reversed(ranks.groups):
            wide = collectives.scatter_sum(wide, group)
        return wide[: ranks.local_count(batch)].to(grad.dtype), None, None


def _require_tensor(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {describe(x)}")

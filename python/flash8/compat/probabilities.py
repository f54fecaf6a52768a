"""The matrix of probabilities that FlashAttention-2 returns beside O, for tests and plots."""

from typing import Any

import torch
from torch import Tensor

from flash8.attention import flash_attn_varlen_func
from flash8.dropout import dropout_mask
from flash8.varlen import position_ids_from_cu_seqlens

_COLUMNS = 512  # of the matrix a call: the largest head_dim_v
_ROUNDED_TO = 128


@torch.no_grad()
def signed_probabilities(
    q: Tensor,
    k: Tensor,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    max_seqlens: tuple[int, int],
    seed: Tensor,
    dropout_p: float,
    options: dict[str, Any],
) -> Tensor:
    """exp(S - max(S)) of every row, negative where dropout drops it: FlashAttention-2's S_dmask.

    Args:
        q, k: of the call; packed with cu_seqlens, dense without.
        max_seqlens: of q and k.
        options: of the call, those that `flash_attn_varlen_func` takes by keyword.

    Returns:
        (batch, heads, max_seqlen_q, max_seqlen_k), the last two rounded up to a multiple of 128.
    """
    if cu_seqlens is None:
        batch = q.shape[0]
        steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        cu_seqlens = steps * q.shape[1], steps * k.shape[1]
        q, k = q.flatten(0, 1), k.flatten(0, 1)
    cu_seqlens_q = cu_seqlens[0]
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    rows, columns = max_seqlens
    row = position_ids_from_cu_seqlens(cu_seqlens_q, q.shape[0])
    sequence = torch.repeat_interleave(torch.arange(batch, device=q.device), cu_seqlens_q.diff())
    weights = _weights(q.float(), k.float(), cu_seqlens, max_seqlens, options)
    padded = weights.new_zeros(batch, rows, heads, columns)
    used = sequence.shape[0]
    padded[sequence, row[:used]] = weights[:used]
    scores = padded.transpose(1, 2)
    scores = scores / scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    keep = dropout_mask(seed, batch, heads, rows, columns, dropout_p).to(q.device)
    scores = torch.where(keep, scores, -scores)
    padding = (0, -columns % _ROUNDED_TO, 0, -rows % _ROUNDED_TO)
    return torch.nn.functional.pad(scores, padding)


def _weights(
    q: Tensor,
    k: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    options: dict[str, Any],
) -> Tensor:
    """P, (total_q, heads, max_seqlen_k): attention to values that are columns of the identity."""
    column = position_ids_from_cu_seqlens(cu_seqlens[1], k.shape[0])
    parts = []
    for first in range(0, max_seqlens[1], _COLUMNS):
        places = torch.arange(first, min(first + _COLUMNS, max_seqlens[1]), device=q.device)
        v = (column[:, None] == places).to(q.dtype)
        v = v[:, None].expand(-1, k.shape[1], -1)
        parts.append(flash_attn_varlen_func(q, k, v, *cu_seqlens, *max_seqlens, **options))
    return torch.cat(parts, -1)  # type: ignore[arg-type]

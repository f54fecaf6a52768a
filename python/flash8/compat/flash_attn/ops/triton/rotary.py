"""Rotary embedding without autograd of its own; torch differentiates it."""

import torch
from torch import Tensor

from flash8.tensors.rotary import apply_rotary as rotate_at
from flash8.tensors.rotary import token_positions


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] channels of x.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        cos, sin: (seqlen_rotary, rotary_dim / 2).
        seqlen_offsets: the position of each sequence's first token, an int or (batch,).
        inplace: write the result to x, where no gradient is wanted; it is a new tensor otherwise.
        conjugate: rotate back.
    """
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(seqlen_offsets, int):
        offsets = torch.full((batch,), seqlen_offsets, dtype=torch.int64, device=x.device)
    else:
        offsets = seqlen_offsets
    positions = token_positions(x, offsets, cu_seqlens)
    if x.device.type == "cpu" and positions.numel() > 0 and cos.shape[0] <= positions.max():
        raise ValueError(
            f"cos and sin must reach position {int(positions.max())}, got {cos.shape[0]} rows"
        )
    rotated = rotate_at(x, cos, -sin if conjugate else sin, positions, interleaved=interleaved)
    return written(x, rotated) if inplace else rotated


def written(x: Tensor, value: Tensor) -> Tensor:
    """x with the value written to it; the value itself where it has a gradient.

    A write would be behind autograd's back there: into leaves, and into views that it refuses.
    """
    return value if value.requires_grad else x.copy_(value)

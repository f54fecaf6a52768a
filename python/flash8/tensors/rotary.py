"""Rotary position embedding as FlashAttention's KV-cache call applies it (Su et al., 2104.09864).

Plain torch operations: they trace, and run on any device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash8.tensors.float8 import E4M3, saturating_cast


class Rope(NamedTuple):
    """Rotary embedding by position. cos, sin: (seqlen_rotary, rotary_dim / 2)."""

    cos: Tensor
    sin: Tensor
    offsets: Tensor | None = None  # int (batch,): the position of each sequence's first token
    interleaved: bool = True


def embed_position(
    x: Tensor, rope: Rope, batch: int, cu_seqlens: Tensor | None, *, advance: bool = True
) -> Tensor:
    """x, (batch, seqlen, heads, d) or packed, rotated; rows without a position take the last."""
    offsets = rope.offsets
    if offsets is None:
        offsets = torch.zeros(batch, dtype=torch.int64, device=x.device)
    positions = token_positions(x, offsets, cu_seqlens, advance=advance)
    positions = positions.clamp(0, rope.cos.shape[0] - 1)
    return apply_rotary(x, rope.cos, rope.sin, positions, interleaved=rope.interleaved)


def token_positions(
    tokens: Tensor, offsets: Tensor, cu_seqlens: Tensor | None, *, advance: bool = True
) -> Tensor:
    """The rotary position of every token of x, (batch, seqlen) or (total,) with cu_seqlens.

    tokens: (batch, seqlen, heads, d) or (total, heads, d). offsets: int (batch,), the position of
    each sequence's first token. advance=False leaves all tokens of a sequence at that position.
    """
    if cu_seqlens is None:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        steps = steps if advance else torch.zeros_like(steps)
        return offsets.long()[:, None] + steps
    token = torch.arange(tokens.shape[0], device=tokens.device)
    sequence = token_sequences(tokens, offsets.shape[0], cu_seqlens)
    start = offsets.long()[sequence]
    return start + (token - cu_seqlens.long()[sequence] if advance else 0)


def token_sequences(tokens: Tensor, batch: int, cu_seqlens: Tensor | None) -> Tensor:
    """int64 (batch, seqlen) or (total,) with cu_seqlens: the sequence of every token.

    Rows after the last sequence count to it.
    """
    if cu_seqlens is None:
        return torch.arange(batch, device=tokens.device)[:, None].expand(tokens.shape[:2])
    token = torch.arange(tokens.shape[0], device=tokens.device)
    sequence = torch.bucketize(token, cu_seqlens[1:].long(), right=True)
    return sequence.clamp(max=max(batch - 1, 0))


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool
) -> Tensor:
    """Rotates the first 2 * cos.shape[1] elements of each head of x.

    x: (..., heads, d); positions: (...); cos, sin: (seqlen_rotary, rotary_dim / 2). interleaved
    pairs elements (0, 1), (2, 3), ...; otherwise (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
    Computed in fp32 (fp64 for fp64 x) and rounded once to x's dtype. On a CUDA device positions
    outside of the tables are the nearest row's.
    """
    if positions.device.type != "cpu":
        # On a GPU nothing has checked this: a position without a row must not end the context.
        positions = positions.clamp(0, max(cos.shape[0] - 1, 0))
    return rotate(x, cos[positions], sin[positions], interleaved=interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """`apply_rotary` with one row of cos and sin per token already: (..., rotary_dim / 2)."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].to(compute), x[..., rotary_dim:]
    c, s = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)
    first, second = (
        (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    )
    turned = (first * c - second * s, first * s + second * c)
    rotated = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    if x.dtype == E4M3:
        return saturating_cast(torch.cat((rotated, rest.to(compute)), -1))
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)

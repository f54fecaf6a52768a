"""Philox4x32-7, and dropout whose mask is a pure function of (seed, batch, head, row, column).

Philox (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) is the
counter-based generator that GPUs use as well; the signs of a rotation come from it, too. Dropout's
counter words are (column // 8, row, batch * heads + head, 0), its key is the low and high 32 bits
of the seed. The four output words carry eight 16-bit values, one for each of eight neighbouring
columns, low half first. An element is kept when its value is at least round(p * 65536), whatever
the tiling, so forward, backward, a later replay and a CUDA kernel all see one mask. What is kept is
multiplied with what makes up for it exactly, 65536 / (65536 - round(p * 65536)).
"""

import torch
from torch import Tensor

COLUMNS_PER_DRAW = 8
MASK32 = 0xFFFFFFFF
_ROUNDS = 7
_VALUES = 65536
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-7 of broadcastable int64 counter words in [0, 2^32). Returns four such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves the bits of the unsigned product intact.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & MASK32) ^ c1 ^ k0
        c2 = ((product0 >> 32) & MASK32) ^ c3 ^ k1
        c1 = product1 & MASK32
        c3 = product0 & MASK32
        k0 = (k0 + _WEYL[0]) & MASK32
        k1 = (k1 + _WEYL[1]) & MASK32
    return [c0, c1, c2, c3]


def keep_mask(
    seed: int, batch_heads: Tensor, rows: Tensor, columns: tuple[int, int], p: float
) -> Tensor:
    """The kept elements of a tile.

    batch_heads: int64 (...,), the values batch * heads + head. rows: int64 (M,), rows in the
    sequence. columns: [begin, end), begin a multiple of 8. Returns bool (..., M, end - begin).
    """
    begin, end = columns
    first_draw = begin // COLUMNS_PER_DRAW
    num_draws = -(-(end - begin) // COLUMNS_PER_DRAW)
    draws = torch.arange(first_draw, first_draw + num_draws, device=rows.device)
    counter = (draws, rows[:, None], batch_heads[..., None, None], torch.zeros_like(draws))
    words = philox(counter, (seed & MASK32, (seed >> 32) & MASK32))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    values = torch.stack(torch.broadcast_tensors(*halves), dim=-1)  # (..., M, draws, 8)
    return values.flatten(-2)[..., : end - begin] >= threshold(p)


def threshold(p: float) -> int:
    """The least of the 65536 values that keeps its element when a share p of them is dropped."""
    return round(p * _VALUES)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied with; 0 where p is so near 1 that none is kept."""
    kept = _VALUES - threshold(p)
    return _VALUES / kept if kept else 0.0


def draw_seed(device: torch.device) -> Tensor:
    """A fresh int64 (1,) seed from torch's default generator, so that torch.manual_seed holds."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)

"""Which keys a query sees, as a policy with trip counts: whole tiles are skipped or left unmasked.

In a sequence with seqlen_q queries and seqlen_k keys, query i has position
p = i + seqlen_k - seqlen_q and sees keys from max(p - window_left, chunk_begin(p)) to
min(p + window_right, chunk_begin(p) + attention_chunk - 1).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.call.options import Options


@dataclass(frozen=True)
class Tile:
    """Queries [m_begin, m_end) against keys [n_begin, n_end)."""

    m_begin: int
    m_end: int
    n_begin: int
    n_end: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.m_end - self.m_begin, self.n_end - self.n_begin


class Mask:
    """The mask of one sequence pair."""

    def __init__(self, seqlen_q: int, seqlen_k: int, options: Options) -> None:
        left, right = options.window_left, options.window_right
        self._unbounded = seqlen_q + seqlen_k
        self._left = self._unbounded if left < 0 else min(left, self._unbounded)
        self._right = self._unbounded if right < 0 else min(right, self._unbounded)
        self._chunk = options.attention_chunk
        self._shift = seqlen_k - seqlen_q
        self.seqlen_k = seqlen_k
        self._whole = Tile(0, seqlen_q, 0, seqlen_k)

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self._sees_all(self._whole)

    @property
    def is_causal(self) -> bool:
        """Whether every query sees the keys up to its own position, and no others."""
        keys = self.seqlen_k
        in_chunk = self._chunk == 0 or self._chunk >= keys
        return self._right == 0 and self._left >= keys - 1 and in_chunk

    def visible_range(self, m_begin: int, m_end: int) -> tuple[int, int]:
        """[begin, end) of the keys that at least one query of [m_begin, m_end) may see."""
        first, last = m_begin + self._shift, m_end - 1 + self._shift
        begin, end = max(0, first - self._left), min(self.seqlen_k, last + self._right + 1)
        if self._chunk > 0:
            begin = max(begin, self._chunk_begin(first))
            end = min(end, self._chunk_begin(last) + self._chunk)
        return (begin, end) if begin < end else (0, 0)

    def hidden(self, tile: Tile, device: torch.device) -> Tensor | None:
        """bool (M, N), True where the mask hides the key; None if the whole tile is visible."""
        if self._sees_all(tile):
            return None
        window = (
            None if self._left == self._unbounded else self._left,
            None if self._right == self._unbounded else self._right,
        )
        relative = tile.m_begin + self._shift - tile.n_begin
        hidden = _outside_window(tile.shape, relative, window, device)
        if self._chunk == 0:
            return hidden
        positions = torch.arange(tile.m_begin, tile.m_end, device=device)[:, None] + self._shift
        keys = torch.arange(tile.n_begin, tile.n_end, device=device)
        begins = positions - positions.remainder(self._chunk)
        return hidden | (keys < begins) | (keys >= begins + self._chunk)

    def _sees_all(self, tile: Tile) -> bool:
        first, last = tile.m_begin + self._shift, tile.m_end - 1 + self._shift
        in_window = tile.n_begin >= last - self._left and tile.n_end - 1 <= first + self._right
        if self._chunk == 0 or not in_window:
            return in_window
        return (
            tile.n_begin >= self._chunk_begin(last)
            and tile.n_end <= self._chunk_begin(first) + self._chunk
        )

    def _chunk_begin(self, position: int) -> int:
        return position - position % self._chunk


@functools.lru_cache(maxsize=32)
def _outside_window(
    shape: tuple[int, int],
    relative: int,
    window: tuple[int | None, int | None],
    device: torch.device,
) -> Tensor:
    """True where key n is outside the window of query m, in a tile whose first query is
    `relative` keys past its first key. Tiles along a diagonal share one: never written to."""
    distance = torch.arange(shape[0], device=device)[:, None] + relative
    distance = distance - torch.arange(shape[1], device=device)  # query's position - key's
    left, right = window
    hidden = torch.zeros(shape, dtype=torch.bool, device=device)
    if left is not None:
        hidden |= distance > left
    if right is not None:
        hidden |= distance < -right
    return hidden

"""The descales of one unit, as the tiles need them.

Q's and K's descales join the softmax scale of a tile of scores, V's joins the factor that rescales
O from block to block. Only descales of single tokens, or of very few, multiply K and V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.backends.cpu.mask import Tile
from flash8.backends.cpu.sequences import KeyRows, QueryRows, Unit
from flash8.call.options import Options
from flash8.tensors.descales import BLOCK, checked, is_per_token
from flash8.tensors.float8 import E4M3

#: Keys that a tile has at least: fewer with one descale are multiplied by it.
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class KeyDescale:
    """A descale of K or V: one per head, or one per block of `block` keys.

    The unit's first key is `phase` keys past the start of a block.
    """

    values: Tensor  # (B or 1, heads_kv or 1, blocks or 1)
    block: int | None
    phase: int

    def of(self, tile: Tile) -> Tensor:
        """(B or 1, heads_kv or 1, 1, 1): broadcasts over (B, heads_kv, G, M)."""
        index = 0 if self.block is None else (tile.n_begin + self.phase) // self.block
        return self.values[:, :, index, None, None]


class RunningDescale:
    """V's descale along the walk over KV blocks: O is kept in units of the current block's.

    alpha' = alpha * s_v[previous block] / s_v[block], and the last one goes into the epilogue.
    """

    def __init__(self, descale: KeyDescale | None) -> None:
        self._descale = descale
        self._current: Tensor | None = None

    def enter(self, tile: Tile, alpha: Tensor) -> Tensor:
        """The factor that takes O from the previous block's units to those of `tile`."""
        if self._descale is None:
            return alpha
        previous, self._current = self._current, self._descale.of(tile)
        return alpha if previous is None else alpha * (previous / self._current)

    def leave(self, factor: Tensor) -> Tensor:
        """`factor` times the descale that O is still to be multiplied with."""
        return factor if self._current is None else factor * self._current


@dataclass(frozen=True)
class Descales:
    """What multiplies the scores and the values of a unit's tiles."""

    q: Tensor | None  # (B or 1, heads_kv or 1, G or 1, seqlen_q or 1): times softmax_scale
    k: KeyDescale | None
    v: KeyDescale | None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(block, phase) of the key blocks that have descales of their own, if any have."""
        for descale in (self.k, self.v):
            if descale is not None and descale.block is not None:
                return descale.block, descale.phase
        return None

    def q_rows(self, begin: int, end: int) -> Tensor | None:
        """Q's factor for queries [begin, end)."""
        if self.q is None or self.q.shape[3] == 1:
            return self.q
        return self.q[..., begin:end]

    def scores(self, tile: Tile) -> Tensor | None:
        """The factor of a tile of Q K^T, broadcasting over (B, heads_kv, G, M, N)."""
        factor = self.q_rows(tile.m_begin, tile.m_end)
        if self.k is not None:
            k = self.k.of(tile)
            factor = k if factor is None else factor * k
        return None if factor is None else factor[..., None]


def key_factor(unit: Unit, descale: Tensor | None, cache: Tensor, paged: bool) -> Tensor | None:
    """(B, seqlen_k, heads_kv, 1): what multiplies the keys of a unit, where tokens have descales of
    their own, or pages that are too small for tiles."""
    if descale is None or descale.dim() != 3:
        return None
    if is_per_token(descale, cache):
        return checked(unit.keys.tokens(descale))[..., None]
    if not paged or _largest_block(cache.shape[1]) >= _LEAST_BLOCK:
        return None
    of_tokens = descale.transpose(1, 2).expand(-1, cache.shape[1], -1)
    return checked(unit.keys.tokens(of_tokens))[..., None]


def load_descales(
    unit: Unit, q: Tensor, options: Options, scale: float, grouped: tuple[int, int], page: int
) -> Descales:
    """The descales of a unit. `grouped`: (heads_kv, G); `page`: rows per page of a paged cache.

    Wider queries carry the softmax scale themselves; float8 ones cannot, and Q's factor does.
    """
    return Descales(
        _query_factor(unit, q, options.q_descale, scale, grouped) if q.dtype == E4M3 else None,
        _key_descale(unit, options.k_descale, page),
        _key_descale(unit, options.v_descale, page),
    )


def _query_factor(
    unit: Unit, q: Tensor, descale: Tensor | None, scale: float, grouped: tuple[int, int]
) -> Tensor:
    heads_kv, group = grouped
    if descale is None:
        return q.new_full((1, 1, 1, 1), scale, dtype=torch.float32)
    descale = checked(descale)
    if descale.dim() == 0:
        return (descale * scale).reshape(1, 1, 1, 1)
    if descale.dim() == 2:
        rows = descale[unit.batch][..., None]
    else:
        rows = _query_blocks(unit.queries, descale)
    heads = rows.shape[1]
    shape = (heads_kv, group if heads == heads_kv * group else 1)
    factor: Tensor = rows.unflatten(1, shape) * scale
    return factor


def _query_blocks(queries: QueryRows, descale: Tensor) -> Tensor:
    """(B, heads, seqlen_q): the block descale of every row."""
    blocks = descale[queries.batch]
    first = 0
    if queries.packed:
        blocks, first = descale, queries.start // BLOCK + queries.batch.start
    index = torch.arange(queries.seqlen, device=descale.device) // BLOCK + first
    return blocks[:, :, index]


def _key_descale(unit: Unit, descale: Tensor | None, page: int) -> KeyDescale | None:
    if descale is None:
        return None
    descale = checked(descale)
    if descale.dim() == 0:
        return KeyDescale(descale.reshape(1, 1, 1), None, 0)
    if descale.dim() == 2:
        return KeyDescale(descale[unit.batch][..., None], None, 0)
    return _key_blocks(unit, unit.keys, descale, page)


def _key_blocks(unit: Unit, keys: KeyRows, descale: Tensor, page: int) -> KeyDescale:
    if keys.pages is not None:
        block = _largest_block(page)
        values = descale[keys.pages][..., 0].transpose(0, 1)[None]  # (1, heads_kv, pages)
        values = values.repeat_interleave(page // block, dim=2)
        return KeyDescale(values, block, keys.start)
    if keys.packed:
        first = keys.start // BLOCK + unit.batch.start
        return KeyDescale(descale[:, :, first:], BLOCK, 0)
    return KeyDescale(descale[keys.batch], BLOCK, keys.start)


def _largest_block(page: int) -> int:
    """The largest divisor of a page size that is not above `BLOCK`."""
    return next(size for size in range(min(page, BLOCK), 0, -1) if page % size == 0)

"""Scores of one tile: softcap, then ALiBi, then the mask; and dropout of the probabilities."""

import torch
from torch import Tensor

from flash8.backends.cpu import study
from flash8.backends.cpu.accumulator import float8_matmul
from flash8.backends.cpu.mask import Mask, Tile
from flash8.backends.cpu.operands import Operands
from flash8.call.checks import FP8
from flash8.call.options import Options
from flash8.tensors.philox import COLUMNS_PER_DRAW, keep_mask


class Scores:
    """What happens between S = Q K^T and the softmax, for the tiles of one unit."""

    def __init__(self, operands: Operands, options: Options) -> None:
        self.mask = Mask(operands.seqlen_q, operands.seqlen_k, options)
        self._operands = operands
        self.softcap = options.softcap
        self._dropout_p = options.dropout_p
        seed = options.dropout_seed
        self._study = study.current()
        self._seed = 0 if seed is None else int(seed.item())

    def tile(self, q_tile: Tensor, qv_tile: Tensor | None, tile: Tile) -> Tensor:
        """S of a tile before the cap, (B, heads_kv, G, M, N), from stacked rows of q and qv."""
        keys = slice(tile.n_begin, tile.n_end)
        k_tile = self._operands.k[:, :, keys].transpose(-1, -2)
        if self._operands.dtype == FP8:
            s = float8_matmul(q_tile, k_tile, self._study)
        else:
            s = q_tile @ k_tile
        operands, descales = self._operands, self._operands.descales
        s = _scaled(operands.split_rows(s), descales.scores(tile))
        if qv_tile is not None:
            by_v = operands.split_rows(qv_tile @ operands.v[:, :, keys].transpose(-1, -2))
            s += _scaled(by_v, None if descales.v is None else descales.v.of(tile)[..., None])
        return s

    def cap(self, s: Tensor) -> Tensor:
        """softcap * tanh(s / softcap), in place."""
        return s if self.softcap == 0.0 else s.div_(self.softcap).tanh_().mul_(self.softcap)

    def cap_gradient(self, ds: Tensor, capped: Tensor | None) -> Tensor:
        """ds times the derivative of `cap`, which is 1 - (capped / softcap)^2, in place."""
        return ds if capped is None else ds.mul_(1.0 - (capped / self.softcap).square_())

    def hidden(self, tile: Tile) -> Tensor | None:
        """bool (M, N), True where the mask hides the key; None if the whole tile is visible."""
        hidden = self.mask.hidden(tile, self._operands.q.device)
        words = self._operands.tree_mask
        if words is None or tile.n_end <= self._first_new_key():
            return hidden
        drafts = self._hidden_drafts(words[tile.m_begin : tile.m_end], tile)
        return drafts if hidden is None else hidden | drafts

    def _first_new_key(self) -> int:
        return self._operands.seqlen_k - self._operands.seqlen_q

    def _hidden_drafts(self, words: Tensor, tile: Tile) -> Tensor:
        """bool (M, N): True where a bit hides one of the sequence's last keys."""
        bits = torch.arange(tile.n_begin, tile.n_end, device=words.device) - self._first_new_key()
        seen = (words[:, None] >> bits.clamp(0, 31)) & 1
        return (seen == 0) & (bits >= 0)

    def bias_and_mask(self, s: Tensor, tile: Tile, hidden: Tensor | None) -> Tensor:
        """Adds ALiBi and hides what is `hidden` of the tile, in place."""
        slopes = self._operands.slopes
        if slopes is not None:
            s -= slopes * self._distance(tile)
        return s if hidden is None else s.masked_fill_(hidden, float("-inf"))

    def keep(self, tile: Tile) -> Tensor | None:
        """The dropout mask of a tile, (B, heads_kv, G, M, N), or None without dropout."""
        if self._dropout_p == 0.0:
            return None
        batch_heads = self._operands.batch_heads
        rows = torch.arange(tile.m_begin, tile.m_end, device=batch_heads.device)
        skipped = tile.n_begin % COLUMNS_PER_DRAW
        columns = (tile.n_begin - skipped, tile.n_end)
        return keep_mask(self._seed, batch_heads, rows, columns, self._dropout_p)[..., skipped:]

    def _distance(self, tile: Tile) -> Tensor:
        device = self._operands.q.device
        rows = torch.arange(tile.m_begin, tile.m_end, device=device)[:, None]
        keys = torch.arange(tile.n_begin, tile.n_end, device=device)
        shift = self._operands.seqlen_k - self._operands.seqlen_q
        return (rows + shift - keys).abs_().to(self._operands.q.dtype)


def _scaled(s: Tensor, factor: Tensor | None) -> Tensor:
    """In place."""
    return s if factor is None else s.mul_(factor)

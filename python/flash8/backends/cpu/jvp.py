"""Forward mode: the tangents of O and LSE from those of the inputs, in one walk over the tiles.

With P = exp(S - LSE) and dots for tangents:

    S' = scale * (q' . k + q . k' + qv' . v + qv . v'), times the derivative of the softcap
    LSE' = sum of P S' [+ exp(s_aux - LSE) s_aux']
    O' = sum of P S' v + sum of P v' - LSE' O

O is summed up here again, in the dtype of accumulation: its rounding would not cancel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.backends.cpu.mask import Tile
from flash8.backends.cpu.operands import Operands, heads_first, load, tokens_first
from flash8.backends.cpu.products import product, select
from flash8.backends.cpu.scores import Scores
from flash8.backends.cpu.sequences import Unit, units
from flash8.call.options import Options
from flash8.tensors.philox import keep_scale


@dataclass(frozen=True)
class _Tangents:
    """Of the operands of one unit, laid out and scaled like them; None is zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    qv: Tensor | None
    sink: Tensor | None


def jvp(
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    qv_tangent: Tensor | None,
    s_aux_tangent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    lse: Tensor,
    options: Options,
    out_tangent: Tensor,
    lse_tangent: Tensor,
) -> None:
    """Fills the tangents of O and LSE (every row of them). `lse`: of the forward."""
    out_tangent.zero_()
    lse_tangent.zero_()
    for unit in units(q, k, options):
        if unit.queries.seqlen == 0:
            continue
        operands = load(unit, q, k, v, qv, s_aux, options)
        tangents = _tangents(
            unit,
            operands,
            (q_tangent, k_tangent, v_tangent, qv_tangent, s_aux_tangent),
        )
        lse_rows = unit.queries.rows(lse).unflatten(1, (operands.k.shape[1], operands.group))
        o, row = _unit(operands, tangents, lse_rows, options)
        unit.queries.tokens(out_tangent).copy_(tokens_first(o))
        unit.queries.rows(lse_tangent).copy_(row.flatten(1, 2))


def _tangents(unit: Unit, operands: Operands, given: tuple[Tensor | None, ...]) -> _Tangents:
    heads_kv, group, dtype = operands.k.shape[1], operands.group, operands.q.dtype
    q, k, v, qv, sink = given

    def queries(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return heads_first(unit.queries.tokens(x), heads_kv, dtype) * operands.scale

    def keys(x: Tensor | None) -> Tensor | None:
        return None if x is None else heads_first(unit.keys.tokens(x), heads_kv, dtype).squeeze(2)

    sinks = None if sink is None else sink.to(dtype).unflatten(0, (heads_kv, group))[..., None]
    return _Tangents(queries(q), keys(k), keys(v), queries(qv), sinks)


def _unit(
    operands: Operands, tangents: _Tangents, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """The tangents of a unit's O, (B, heads_kv, G, seqlen_q, head_dim_v), and LSE."""
    scores = Scores(operands, options)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    block_m, block_n = operands.blocks()
    blocks = []
    for m_begin in range(0, operands.seqlen_q, block_m):
        m_end = min(m_begin + block_m, operands.seqlen_q)
        block = _Block(operands, tangents, scores, lse[..., m_begin:m_end], options.dropout_p)
        begin, end = scores.mask.visible_range(m_begin, m_end)
        for n_begin in range(begin - begin % block_n, end, block_n):
            block.add(Tile(m_begin, m_end, n_begin, min(n_begin + block_n, operands.seqlen_k)))
        blocks.append(block.finish())
    o, row = zip(*blocks, strict=True)
    return torch.cat(o, dim=3), torch.cat(row, dim=3)


class _Block:
    """The sums of one block of queries."""

    def __init__(
        self,
        operands: Operands,
        tangents: _Tangents,
        scores: Scores,
        lse: Tensor,
        dropout_p: float,
    ) -> None:
        self._operands, self._tangents, self._scores = operands, tangents, scores
        self._lse, self._dropout_p = lse, dropout_p
        self._row_sum = torch.zeros_like(lse)  # of P S'
        shape = (*lse.shape, operands.v.shape[-1])
        self._o, self._tangent = lse.new_zeros(shape), lse.new_zeros(shape)

    def add(self, tile: Tile) -> None:
        scores, operands = self._scores, self._operands
        queries, keys = slice(tile.m_begin, tile.m_end), slice(tile.n_begin, tile.n_end)
        q_tile = operands.q[:, :, :, queries].flatten(2, 3)
        qv_tile = None if operands.qv is None else operands.qv[:, :, :, queries].flatten(2, 3)
        s = scores.cap(scores.tile(q_tile, qv_tile, tile))
        capped = s.clone() if scores.softcap > 0.0 else None
        hidden = scores.hidden(tile)
        p = select(scores.bias_and_mask(s, tile, hidden).sub_(self._lse[..., None]).exp_(), hidden)
        keep = scores.keep(tile)
        kept = p if keep is None else p * keep * keep_scale(self._dropout_p)
        v_tile = operands.v[:, :, keys]
        ds = self._scores_tangent(q_tile, qv_tile, tile)
        if ds is not None:
            ds = select(scores.cap_gradient(ds, capped), hidden)
            self._row_sum += select(p * ds, hidden).sum(dim=-1)
            self._tangent += self._product(select(kept * ds, hidden), v_tile, hidden)
        if self._tangents.v is not None:
            self._tangent += self._product(kept, self._tangents.v[:, :, keys], hidden)
        self._o += self._product(kept, v_tile, hidden)

    def finish(self) -> tuple[Tensor, Tensor]:
        lse_tangent = self._row_sum
        if self._tangents.sink is not None and self._operands.sink is not None:
            share = (self._operands.sink - self._lse).exp_()
            lse_tangent = lse_tangent + share * self._tangents.sink
        return self._tangent - lse_tangent[..., None] * self._o, lse_tangent

    def _scores_tangent(self, q_tile: Tensor, qv_tile: Tensor | None, tile: Tile) -> Tensor | None:
        """S' before the cap, (B, heads_kv, G, M, N)."""
        queries, keys = slice(tile.m_begin, tile.m_end), slice(tile.n_begin, tile.n_end)
        o, t = self._operands, self._tangents
        found = None
        for left, right in (
            (t.q, o.k),
            (o.q if t.k is not None else None, t.k),
            (t.qv, o.v),
            (o.qv if t.v is not None else None, t.v),
        ):
            if left is None or right is None:
                continue
            rows = left[:, :, :, queries].flatten(2, 3)
            share = rows @ right[:, :, keys].transpose(-1, -2)
            found = share if found is None else found.add_(share)
        return None if found is None else o.split_rows(found)

    def _product(self, weights: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
        """Weights (B, heads_kv, G, M, N) times values (B, heads_kv, N, d)."""
        return self._operands.split_rows(product(weights.flatten(2, 3), values, hidden))

"""The backward of an FP8 forward with some of its five products in FP8.

The same formulas as `backward`, on tiles of 128 x 128, with

    S, dP      from Q8, K8 and dO8, V8                               2 products or more
    dV         from P8 = e4m3(448 P) and dO8                         3 products or more
    dQ, dK     from dS8, scaled by the amax of its tile, K8 and Q8   5 products

and the others from operands rounded to O's 16-bit type. D = rowsum(dO * O) comes from the 16-bit
dO and O. An FP8 contraction is never longer than a tile: its sums are promoted to fp32.

Rounding leaves rowsum(dS) different from what it is in exact arithmetic, and K's bias would carry
that difference into dQ. The product uses K without its mean: rowsum(dS) * mean is subtracted again,
and the exact rowsum(dS) times the mean is added.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash8.backends.cpu import study
from flash8.backends.cpu.accumulator import float8_matmul
from flash8.backends.cpu.mask import Tile
from flash8.backends.cpu.operands import Operands, heads_first, load, tokens_first
from flash8.backends.cpu.products import Matmul, product, select, transposed
from flash8.backends.cpu.scores import Scores
from flash8.backends.cpu.sequences import Unit, units
from flash8.call.options import Options
from flash8.tensors.descales import BLOCK
from flash8.tensors.float8 import E4M3, MAX, rounded
from flash8.tensors.philox import keep_scale

_SMALLEST_DESCALE = 2.0**-126


@dataclass(frozen=True)
class _How:
    """What is FP8, and in which types."""

    products: int  # 2, 3 or 5
    gradient_dtype: torch.dtype  # of dO and dS
    wide_dtype: torch.dtype  # of the other operands
    study: study.Study

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.wide_dtype).to(x.dtype)


@dataclass(frozen=True)
class _Rows:
    """Per-row inputs of a unit, heads first: (B, heads_kv, G, seqlen_q[, head_dim_v])."""

    dout: Tensor
    dout8: Tensor  # float8 values
    dout_descale: Tensor  # (B, heads_kv, G, seqlen_q), constant in every block of 128 rows
    lse: Tensor  # of the scores without K's mean; +inf where a row has seen nothing
    d: Tensor  # rowsum(dO * O) - dLSE
    ds_sum: Tensor  # rowsum(dS) in exact arithmetic
    p_sink: Tensor | None

    def block(self, rows: slice) -> "_Rows":
        cut: dict[str, Any] = {
            name: x if x is None else x[:, :, :, rows] for name, x in vars(self).items()
        }
        return _Rows(**cut)


@dataclass(frozen=True)
class _Sums:
    """Gradients of a unit in fp32, laid out like its operands."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    ds_sum: Tensor  # (B, heads_kv, G, seqlen_q): of the rounded dS


def fp8_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    fp8_products: int,
    gradient_dtype: torch.dtype,
    gradient_descale: Tensor | None,
    options: Options,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    ds_aux: Tensor,
) -> None:
    """Fills dq, dk, dv (every row of them) and ds_aux where the forward had s_aux."""
    for gradient in (dq, dk, dv, ds_aux):
        gradient.zero_()
    if dout is None:
        dout = torch.zeros_like(out)
    how = _How(fp8_products, gradient_dtype, out.dtype, study.current())
    by_block = options.k_descale is not None and options.k_descale.dim() == 3
    sink_gradient = None if s_aux is None else lse.new_zeros(s_aux.shape)
    for unit in units(q8, k8, options):
        if unit.queries.seqlen == 0:
            continue
        operands = load(unit, q8, k8, v8, None, s_aux, options)
        wide = _wide_rows(unit, operands, dout, dlse, out, lse)
        rows = _quantized_rows(wide, how, gradient_descale, by_block)
        sums = _Unit(operands, rows, how, options).run()
        unit.queries.tokens(dq).copy_(tokens_first(sums.dq))
        unit.keys.tokens(dk).copy_(sums.dk.transpose(1, 2))
        unit.keys.tokens(dv).copy_(sums.dv.transpose(1, 2))
        if sink_gradient is not None and rows.p_sink is not None:
            sink_gradient -= (rows.p_sink * rows.d).sum(dim=(0, 3)).flatten()
    if sink_gradient is not None:
        ds_aux.copy_(sink_gradient)


def _wide_rows(
    unit: Unit, operands: Operands, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> _Rows:
    """The rows with dO in place of dO8."""
    heads_kv, grouped = operands.k.shape[1], (operands.k.shape[1], operands.group)
    dout_rows = heads_first(unit.queries.tokens(dout), heads_kv, torch.float32)
    out_rows = heads_first(unit.queries.tokens(out), heads_kv, torch.float32)
    lse_rows = unit.queries.rows(lse).unflatten(1, grouped)
    empty = lse_rows == float("-inf")
    d = torch.where(empty, 0.0, (dout_rows * out_rows).sum(dim=-1))
    share = 0.0 if operands.sink is None else (operands.sink - lse_rows).exp()
    p_sink = None if operands.sink is None else torch.where(empty, 0.0, share)
    ds_sum = torch.zeros_like(d) if p_sink is None else p_sink * d
    if dlse is not None:
        dlse_rows = torch.where(empty, 0.0, unit.queries.rows(dlse).unflatten(1, grouped))
        ds_sum = ds_sum + (dlse_rows if p_sink is None else (1.0 - p_sink) * dlse_rows)
        d = d - dlse_rows
    shift = operands.lse_shift(slice(0, operands.seqlen_q))
    lse_rows = lse_rows if shift is None else lse_rows - shift
    lse_rows = lse_rows.masked_fill(empty, float("inf"))
    return _Rows(dout_rows, dout_rows, torch.ones_like(d), lse_rows, d, ds_sum, p_sink)


def _quantized_rows(rows: _Rows, how: _How, descale: Tensor | None, by_block: bool) -> _Rows:
    """dO in float8: with a given descale, or one of its own per head or per 128 rows."""
    if descale is not None:
        row_descale = descale.expand_as(rows.d)
    else:
        magnitude = torch.where(rows.dout.isfinite(), rows.dout.abs(), 0.0).amax(dim=-1)
        parts = magnitude.split(BLOCK if by_block else max(1, magnitude.shape[-1]), dim=-1)
        tops = [part.amax(dim=-1, keepdim=True).expand_as(part) for part in parts]
        row_descale = _descale(torch.cat(tops, dim=-1), how.gradient_dtype)
    dout8 = rounded(rows.dout / row_descale[..., None], how.gradient_dtype)
    return _Rows(rows.dout, dout8, row_descale, rows.lse, rows.d, rows.ds_sum, rows.p_sink)


def _descale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(amax == 0.0, 1.0, (amax / MAX[dtype]).clamp_min(_SMALLEST_DESCALE))


class _Unit:
    """The walk over the tiles of one unit."""

    def __init__(self, operands: Operands, rows: _Rows, how: _How, options: Options) -> None:
        self._operands, self._rows, self._how = operands, rows, how
        self._scores = Scores(operands, options)
        self._dropout_p = options.dropout_p
        self._has_softcap = options.softcap > 0.0
        self._sums = _Sums(
            torch.zeros_like(operands.q),
            torch.zeros_like(operands.k),
            torch.zeros_like(operands.v),
            torch.zeros_like(rows.d),
        )

    def run(self) -> _Sums:
        o = self._operands
        for m_begin in range(0, o.seqlen_q, BLOCK):
            m_end = min(m_begin + BLOCK, o.seqlen_q)
            begin, end = self._scores.mask.visible_range(m_begin, m_end)
            for n_begin in range(begin - begin % BLOCK, end, BLOCK):
                self._tile(Tile(m_begin, m_end, n_begin, min(n_begin + BLOCK, o.seqlen_k)))
        sums = self._sums
        return _Sums(self._finished_dq(), sums.dk, sums.dv, sums.ds_sum)

    def _finished_dq(self) -> Tensor:
        """dQ with K's mean put right, times the softmax scale."""
        dq, scale = self._sums.dq, self._operands.scale
        if self._has_softcap or self._operands.seqlen_k == 0:
            return dq * scale
        k = self._operands.k
        if self._operands.descales.k is not None:
            k = k * self._key_rows()
        # Of what is finite: a key that no query sees may hold anything.
        finite = k.isfinite()
        mean = k.where(finite, 0.0).sum(dim=2) / finite.sum(dim=2).clamp_min(1)
        mean = mean[:, :, None, None]  # (B, heads_kv, 1, 1, head_dim)
        dq = dq + (self._rows.ds_sum - self._sums.ds_sum)[..., None] * mean
        if self._operands.k_mean is not None:
            dq = dq + self._rows.ds_sum[..., None] * self._operands.k_mean
        return dq * scale

    def _key_rows(self) -> Tensor:
        """K's descale of every key, (B or 1, heads_kv or 1, seqlen_k, 1)."""
        descale = self._operands.descales.k
        assert descale is not None
        tiles = range(0, self._operands.seqlen_k, BLOCK)
        ends = [min(n + BLOCK, self._operands.seqlen_k) for n in tiles]
        rows = [
            descale.of(Tile(0, 0, n, end))[..., 0].expand(-1, -1, end - n)
            for n, end in zip(tiles, ends, strict=True)
        ]
        return torch.cat(rows, dim=2)[..., None]

    def _tile(self, tile: Tile) -> None:
        """Adds one tile's share to all gradients."""
        rows = self._rows.block(slice(tile.m_begin, tile.m_end))
        o, keys = self._operands, slice(tile.n_begin, tile.n_end)
        q8 = o.q[:, :, :, tile.m_begin : tile.m_end]
        s = self._scores.cap(self._scores.tile(q8.flatten(2, 3), None, tile))
        capped = s.clone() if self._has_softcap else None
        hidden = self._scores.hidden(tile)
        p = self._scores.bias_and_mask(s, tile, hidden).sub_(rows.lse[..., None]).exp_()
        p = select(p, hidden)
        dp = select(self._dp(rows, o.v[:, :, keys], tile), hidden)
        keep = self._scores.keep(tile)
        kept = p if keep is None else p * keep
        survival = keep_scale(self._dropout_p)
        if keep is not None:
            dp = dp * keep * survival
        self._sums.dv[:, :, keys] += self._dv(kept, rows, hidden) * survival
        ds = self._scores.cap_gradient(dp.sub_(rows.d[..., None]).mul_(p), capped)
        self._add_dq_dk(select(ds, hidden), q8, tile, hidden)

    def _dp(self, rows: _Rows, v8: Tensor, tile: Tile) -> Tensor:
        """dO V^T, (B, heads_kv, G, M, N)."""
        stacked = rows.dout8.flatten(2, 3)
        dtypes = (self._how.gradient_dtype, E4M3)
        dp = float8_matmul(stacked, v8.transpose(-1, -2), self._how.study, dtypes=dtypes)
        dp = self._operands.split_rows(dp) * rows.dout_descale[..., None]
        if self._operands.descales.v is not None:
            dp = dp * self._operands.descales.v.of(tile)[..., None]
        if self._operands.v_mean is not None:
            dp = dp + (rows.dout * self._operands.v_mean).sum(dim=-1, keepdim=True)
        return dp

    def _dv(self, p: Tensor, rows: _Rows, hidden: Tensor | None) -> Tensor:
        """P^T dO, (B, heads_kv, N, head_dim_v)."""
        how, by_keys = self._how, transposed(hidden)
        if how.products < 3:
            stacked = how.rounded(p).flatten(2, 3).transpose(-1, -2)
            return product(stacked, rows.dout.flatten(2, 3), by_keys)
        p8 = rounded(p * how.study.p_scale)
        matmul = self._matmul(E4M3, how.gradient_dtype)
        # Heads of a group have descales of their own, so each is a product of its own.
        dv = product(p8.transpose(-1, -2), rows.dout8, by_keys, matmul)
        factor = rows.dout_descale[..., :1, None] / how.study.p_scale
        return (dv * factor).sum(dim=2)

    def _matmul(self, *dtypes: torch.dtype) -> Matmul:
        """The product of float8 values of these types."""
        return lambda a, b: float8_matmul(a, b, self._how.study, dtypes=(dtypes[0], dtypes[1]))

    def _add_dq_dk(self, ds: Tensor, q8: Tensor, tile: Tile, hidden: Tensor | None) -> None:
        """dQ += dS K, dK += dS^T Q times the softmax scale, and the row sums of the rounded dS."""
        how, o = self._how, self._operands
        queries, keys = slice(tile.m_begin, tile.m_end), slice(tile.n_begin, tile.n_end)
        q_factor = o.descales.q_rows(tile.m_begin, tile.m_end)
        assert q_factor is not None
        q_factor = q_factor[..., None]  # times softmax_scale
        k_factor = 1.0 if o.descales.k is None else o.descales.k.of(tile)[..., None]
        k8, by_keys = o.k[:, :, None, keys], transposed(hidden)
        if how.products < 5:
            ds = how.rounded(ds)
            dq = product(ds, how.rounded(k8 * k_factor), hidden)
            q = how.rounded(q8 * (q_factor / o.scale)) * o.scale
            dk = product(ds.transpose(-1, -2), q, by_keys)
        else:
            finite = torch.where(ds.isfinite(), ds.abs(), 0.0)
            descale = _descale(finite.amax(dim=(-2, -1), keepdim=True), how.gradient_dtype)
            ds8 = rounded(ds / descale, how.gradient_dtype)
            matmul = self._matmul(how.gradient_dtype, E4M3)
            dq = product(ds8, k8, hidden, matmul) * (descale * k_factor)
            dk = product(ds8.transpose(-1, -2), q8, by_keys, matmul)
            dk = dk * (descale * q_factor[..., :1, :])
            ds = ds8 * descale
        self._sums.dq[:, :, :, queries] += dq
        self._sums.dk[:, :, keys] += dk.sum(dim=2)
        self._sums.ds_sum[..., queries] += ds.sum(dim=-1)

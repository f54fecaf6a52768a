"""The backward: P is recomputed tile by tile from LSE, then five products make the gradients.

With D = rowsum(dO * O) - dLSE and P = exp(S - LSE) (Dao et al., arXiv 2205.14135, Algorithm 4):

    dV = P^T dO        dP = dO V^T        dS = P * (dP - D)        dQ = dS K        dK = dS^T Q

and with qv: dV += dS^T Qv, dQv = dS V. The sink's probability has no value, so
ds_aux = -sum over rows of exp(s_aux - LSE) * D.

With smooth_k dQ = dS (K - c) + rowsum(dS) c, c the mean of K. P's rows sum to 1 - p_sink,
p_sink = exp(s_aux - LSE), so that rowsum(dS) = dLSE + p_sink * D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.backends.cpu import grouped, packed
from flash8.backends.cpu.mask import Tile
from flash8.backends.cpu.operands import Operands, heads_first, load, tokens_first
from flash8.backends.cpu.products import product, select, transposed
from flash8.backends.cpu.scores import Scores
from flash8.backends.cpu.sequences import Unit, is_plain_batch, units
from flash8.call.options import Options
from flash8.tensors.philox import keep_scale

#: How far the sum of a row of P may be from 1 by rounding.
_WHOLE = {torch.float32: 1e-5, torch.float64: 1e-13}


@dataclass(frozen=True)
class _Rows:
    """Per-row inputs of one unit's backward, heads first."""

    dout: Tensor  # (B, heads_kv, G, seqlen_q, head_dim_v)
    lse: Tensor  # (B, heads_kv, G, seqlen_q), +inf where a row has seen nothing
    d: Tensor  # (B, heads_kv, G, seqlen_q): rowsum(dO * O) - dLSE
    dlse: Tensor | None  # (B, heads_kv, G, seqlen_q)

    def block(self, rows: slice) -> "_Rows":
        dlse = None if self.dlse is None else self.dlse[..., rows]
        return _Rows(self.dout[:, :, :, rows], self.lse[..., rows], self.d[..., rows], dlse)


@dataclass(frozen=True)
class _Accumulators:
    """Gradients of one unit in the dtype of accumulation, laid out like its operands."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dqv: Tensor | None


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dqv: Tensor,
    ds_aux: Tensor,
) -> None:
    """Fills dq, dk, dv (every row of them), and dqv, ds_aux where the forward had qv, s_aux."""
    if dout is not None and dlse is None and not options.smooth_k:
        run = packed.run_of(q, k, v, qv, s_aux, options)
        if run is not None and packed.backward_run(run, dout, q, k, v, out, lse, (dq, dk, dv)):
            return
    if dout is None:
        dout = torch.zeros_like(out)
    sink_gradient = None if s_aux is None else s_aux.new_zeros(s_aux.shape, dtype=lse.dtype)
    found = list(units(q, k, options))
    groups, others = grouped.groups(found, q, k, v, qv, options, of_backward=True)
    plain = is_plain_batch(options)  # then there is one group at most, or others
    if others or not plain:
        for gradient in (dq, dk, dv, dqv, ds_aux):
            gradient.zero_()
    given = (dout, dlse, q, k, v, s_aux, out, lse, options)
    for group in groups:
        if not grouped.backward(group, *given, grouped.Gradients(dq, dk, dv, sink_gradient)):
            others.extend(group.units)
            if plain:
                dk.zero_()
                dv.zero_()
    for unit in others:
        if unit.queries.seqlen == 0:
            continue
        operands = load(unit, q, k, v, qv, s_aux, options)
        rows = _load_rows(unit, operands, dout, dlse, out, lse)
        sums = _backward_unit(operands, rows, options)
        unit.queries.tokens(dq).copy_(tokens_first(sums.dq).mul_(operands.scale))
        if sums.dqv is not None:
            unit.queries.tokens(dqv).copy_(tokens_first(sums.dqv).mul_(operands.scale))
        unit.keys.accumulate(dk, sums.dk.transpose(1, 2))
        unit.keys.accumulate(dv, sums.dv.transpose(1, 2))
        if sink_gradient is not None and operands.sink is not None:
            sink_gradient += _sink_gradient(operands.sink, rows)
    if sink_gradient is not None:
        ds_aux.copy_(sink_gradient)


def _load_rows(
    unit: Unit, operands: Operands, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> _Rows:
    dtype, heads_kv = operands.q.dtype, operands.k.shape[1]
    grouped = (heads_kv, operands.group)
    dout_rows = heads_first(unit.queries.tokens(dout), heads_kv, dtype)
    out_rows = heads_first(unit.queries.tokens(out), heads_kv, dtype)
    d = (dout_rows * out_rows).sum(dim=-1)
    if dlse is not None:
        dlse = unit.queries.rows(dlse).unflatten(1, grouped)
        d -= dlse
    lse_rows = unit.queries.rows(lse).unflatten(1, grouped)
    empty = lse_rows == float("-inf")
    # Whatever dO holds where nothing is seen: 0 * NaN would be NaN.
    d.masked_fill_(empty, 0.0)
    return _Rows(dout_rows, lse_rows.masked_fill(empty, float("inf")), d, dlse)


def _backward_unit(operands: Operands, rows: _Rows, options: Options) -> _Accumulators:
    scores = Scores(operands, options)
    mean = _key_mean(operands.k) if options.smooth_k else None
    k_of_dq = operands.k if mean is None else operands.k - mean
    sums = _Accumulators(
        torch.zeros_like(operands.q),
        torch.zeros_like(operands.k),
        torch.zeros_like(operands.v),
        None if operands.qv is None else torch.zeros_like(operands.qv),
    )
    block_m, block_n = operands.blocks()
    for m_begin in range(0, operands.seqlen_q, block_m):
        m_end = min(m_begin + block_m, operands.seqlen_q)
        block = rows.block(slice(m_begin, m_end))
        begin, end = scores.mask.visible_range(m_begin, m_end)
        for n_begin in range(begin - begin % block_n, end, block_n):
            tile = Tile(m_begin, m_end, n_begin, min(n_begin + block_n, operands.seqlen_k))
            whole = n_begin <= begin and end <= tile.n_end
            _backward_tile(operands, scores, block, sums, tile, options.dropout_p, whole, k_of_dq)
    if mean is not None:
        sums.dq.add_(_row_sums_of_ds(operands.sink, rows)[..., None] * mean[:, :, None])
    return sums


def _backward_tile(
    operands: Operands,
    scores: Scores,
    rows: _Rows,
    sums: _Accumulators,
    tile: Tile,
    dropout_p: float,
    whole: bool,
    k_of_dq: Tensor,
) -> None:
    """Adds one tile's share to all gradients. `whole`: its queries see no other keys. `k_of_dq`: K
    as it makes dQ."""
    queries, keys = slice(tile.m_begin, tile.m_end), slice(tile.n_begin, tile.n_end)
    q_tile = operands.q[:, :, :, queries].flatten(2, 3)
    qv_tile = None if operands.qv is None else operands.qv[:, :, :, queries].flatten(2, 3)
    dout_tile = rows.dout.flatten(2, 3)
    k_tile, v_tile = k_of_dq[:, :, keys], operands.v[:, :, keys]

    hidden = scores.hidden(tile)
    by_keys = transposed(hidden)  # of products over queries
    s = scores.cap(scores.tile(q_tile, qv_tile, tile))
    capped = s.clone() if scores.softcap > 0.0 else None
    p = scores.bias_and_mask(s, tile, hidden).sub_(rows.lse[..., None]).exp_()
    p = select(p, hidden)  # a row whose LSE is NaN is that to no key that it does not see
    dp = select(operands.split_rows(dout_tile @ v_tile.transpose(-1, -2)), hidden)
    p_dropped = p
    keep = scores.keep(tile)
    if keep is not None:
        survival = keep.to(p.dtype).mul_(keep_scale(dropout_p))
        p_dropped, dp = p * survival, dp.mul_(survival)
    p_tile = _product_operand(p_dropped, operands).transpose(-1, -2)
    sums.dv[:, :, keys] += product(p_tile, dout_tile, by_keys)
    d = _row_sums(p, dp, rows, operands.sink) if whole else rows.d
    ds = scores.cap_gradient(dp.sub_(d[..., None]).mul_(p), capped)
    # (B, heads_kv, G * M, N)
    ds_tile = _product_operand(select(ds, hidden), operands)
    # q and qv carry the softmax scale already; dq and dqv get it at the end.
    sums.dk[:, :, keys] += product(ds_tile.transpose(-1, -2), q_tile, by_keys)
    sums.dq[:, :, :, queries] += operands.split_rows(product(ds_tile, k_tile, hidden))
    if qv_tile is not None and sums.dqv is not None:
        sums.dv[:, :, keys] += product(ds_tile.transpose(-1, -2), qv_tile, by_keys)
        sums.dqv[:, :, :, queries] += operands.split_rows(product(ds_tile, v_tile, hidden))


def _row_sums(p: Tensor, dp: Tensor, rows: _Rows, sink: Tensor | None) -> Tensor:
    """D from rows that are whole in this tile: rowsum(P * dP) - dLSE.

    It is rowsum(dO * O) without the rounding of O, and makes dS exactly 0 where one key is visible.
    Where P does not sum to 1, O and LSE are of more keys than this call has (ring attention): then
    only rowsum(dO * O) has their share.
    """
    d = (p * dp).sum(dim=-1)
    if rows.dlse is not None:
        d.sub_(rows.dlse)
    total = p.sum(dim=-1)
    if sink is not None:
        total += (sink - rows.lse).exp_()
    return torch.where((total - 1.0).abs_() < _WHOLE[p.dtype], d, rows.d)


def _key_mean(k: Tensor) -> Tensor:
    """Of the finite values of each sequence and head, (B, heads_kv, 1, head_dim); 0 of no key."""
    finite = torch.isfinite(k)
    total = torch.where(finite, k, 0.0).sum(dim=2, keepdim=True)
    return total / finite.sum(dim=2, keepdim=True).clamp_min(1)


def _row_sums_of_ds(sink: Tensor | None, rows: _Rows) -> Tensor:
    """What each row of dS sums to in exact arithmetic, (B, heads_kv, G, seqlen_q)."""
    total = torch.zeros_like(rows.d) if rows.dlse is None else rows.dlse
    if sink is not None:
        total = total + (sink - rows.lse).exp_() * rows.d
    return torch.where(rows.lse == float("inf"), 0.0, total)


def _product_operand(x: Tensor, operands: Operands) -> Tensor:
    """(B, heads_kv, G, M, N) as the stacked operand of a product, rounded as the kernel's is."""
    stacked = x.flatten(2, 3)
    if operands.dtype in (torch.float16, torch.bfloat16):
        return stacked.to(operands.dtype).to(stacked.dtype)
    return stacked


def _sink_gradient(sink: Tensor, rows: _Rows) -> Tensor:
    """-sum of exp(s_aux - LSE) * D over the rows of a unit, (heads,)."""
    probability = (sink - rows.lse).exp_()
    return -(probability * rows.d).sum(dim=(0, 3)).flatten()

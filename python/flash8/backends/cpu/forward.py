"""The forward: for each block of queries a walk over KV blocks from right to left."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.backends.cpu import grouped, packed, study
from flash8.backends.cpu.accumulator import accumulator_for
from flash8.backends.cpu.combine import combine_into
from flash8.backends.cpu.descales import RunningDescale
from flash8.backends.cpu.groups import Group
from flash8.backends.cpu.mask import Tile
from flash8.backends.cpu.operands import Operands, load, tokens_first
from flash8.backends.cpu.scores import Scores
from flash8.backends.cpu.sequences import Unit, check_values, is_plain_batch, units
from flash8.backends.cpu.softmax import softmax_for
from flash8.call.checks import FP8
from flash8.call.options import Options
from flash8.tensors.philox import keep_scale
from flash8.tensors.tokens import Tokens
from flash8.tensors.v_colmajor import from_colmajor


@dataclass(frozen=True)
class _Outputs:
    """Where one unit's O and LSE go: (B, seqlen_q, heads, head_dim_v), (B, heads, seqlen_q)."""

    out: Tensor
    lse: Tensor

    def store(self, m_begin: int, o: Tensor, lse: Tensor) -> None:
        """Stores a block of rows: o (B, heads_kv, G, M, head_dim_v), lse (B, heads_kv, G, M)."""
        rows = slice(m_begin, m_begin + o.shape[3])
        self.out[:, rows] = tokens_first(o).to(self.out.dtype)
        self.lse[:, :, rows] = lse.flatten(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    out_partial: Tensor,
    lse_partial: Tensor,
) -> None:
    """Fills out and lse (every row of them), and the partials where num_splits > 1."""
    if q.device.type == "cpu":
        check_values(q, k, options)
    if options.v_colmajor_tokens is not None:
        v = _by_token(v, options.v_colmajor_tokens, options)
        options = options._replace(v_colmajor_tokens=None)
    run = None if _is_wider(out, q) else packed.run_of(q, k, v, qv, s_aux, options)
    if run is not None and packed.forward_run(run, q, k, v, out, lse):
        return
    if options.num_splits == 1:
        _forward_split(q, k, v, qv, s_aux, options, out, lse, split=0)
        return
    for split in range(options.num_splits):
        # The partials keep heads before rows; their O is addressed like O itself.
        partial = out_partial[split].transpose(-2, -3)
        _forward_split(q, k, v, qv, s_aux, options, partial, lse_partial[split], split)
    combine_into(out, lse, out_partial.transpose(-2, -3), lse_partial.transpose(-1, -2))


def _is_wider(out: Tensor, q: Tensor) -> bool:
    """Whether O is to keep what its sums have, which torch's compiled attention may round to q's
    type."""
    return out.dtype.itemsize > q.dtype.itemsize


def _by_token(v: Tensor, keys: int, options: Options) -> Tensor:
    return from_colmajor(v, keys, Tokens(options.cu_seqlens_k))


def _forward_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    split: int,
) -> None:
    """Attention over one of num_splits parts of the keys. The sink belongs to the first part."""
    found = list(units(q, k, options))  # raises what is wrong with them before anything is written
    sink = s_aux if split == 0 else None
    groups: list[Group] = []
    others = found
    if not _is_wider(out, q):
        groups, others = grouped.groups(found, q, k, v, qv, options)
    if others or not is_plain_batch(options):
        out.zero_()
        lse.fill_(float("-inf"))
    given = (q, k, v, sink, options, out, lse)
    failed = [group for group in groups if not grouped.forward(group, *given)]
    others.extend(unit for group in failed for unit in group.units)
    for unit in others:
        if unit.queries.seqlen == 0:
            continue
        operands = load(unit, q, k, v, qv, sink, options)
        outputs = _Outputs(unit.queries.tokens(out), unit.queries.rows(lse))
        _forward_unit(unit, operands, options, outputs, split)
    for group in failed:
        grouped.restore_rows(group, *given)


def _forward_unit(
    unit: Unit, operands: Operands, options: Options, outputs: _Outputs, split: int
) -> None:
    scores = Scores(operands, options)
    block_m, block_n = operands.blocks()
    grid = operands.descales.grid or (block_n, 0)
    for m_begin in range(0, operands.seqlen_q, block_m):
        m_end = min(m_begin + block_m, operands.seqlen_q)
        n_blocks = _blocks_of_split(scores, m_begin, m_end, grid, options.num_splits, split)
        o, lse = _forward_block(operands, scores, (m_begin, m_end), n_blocks, options.dropout_p)
        outputs.store(m_begin, o, lse)


def _blocks_of_split(
    scores: Scores, m_begin: int, m_end: int, grid: tuple[int, int], num_splits: int, split: int
) -> list[Tile]:
    """The visible KV blocks of one split, from right to left.

    grid: the size of a block, and how far past a block's start the first key is.
    """
    block_n, phase = grid
    begin, end = scores.mask.visible_range(m_begin, m_end)
    if begin == end:
        return []
    first, last = (begin + phase) // block_n, -(-(end + phase) // block_n)
    per_split = -(-max(0, last - first) // num_splits)
    first += split * per_split
    last = min(last, first + per_split)
    seqlen_k = scores.mask.seqlen_k
    return [
        Tile(
            m_begin,
            m_end,
            max(0, n * block_n - phase),
            min((n + 1) * block_n - phase, seqlen_k),
        )
        for n in reversed(range(first, last))
    ]


def _forward_block(
    operands: Operands,
    scores: Scores,
    rows: tuple[int, int],
    n_blocks: list[Tile],
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """O (B, heads_kv, G, M, head_dim_v) and LSE (B, heads_kv, G, M) of a block of queries."""
    queries = slice(*rows)
    q_rows = operands.q[:, :, :, queries]
    q_tile = q_rows.flatten(2, 3)  # (B, heads_kv, G * M, head_dim)
    qv_tile = None if operands.qv is None else operands.qv[:, :, :, queries].flatten(2, 3)
    shape, studied = tuple(q_rows.shape[:-1]), study.current()
    softmax = softmax_for(operands.dtype, shape, q_rows, studied)
    sums = accumulator_for(operands.dtype == FP8, shape, operands.v, studied)
    v_descale = RunningDescale(operands.descales.v)
    for tile in n_blocks:
        hidden = scores.hidden(tile)
        s = scores.cap(scores.tile(q_tile, qv_tile, tile))
        p, alpha = softmax.step(scores.bias_and_mask(s, tile, hidden))
        keep = scores.keep(tile)
        if keep is not None:
            p = p.mul_(keep)
        alpha = v_descale.enter(tile, alpha)
        sums.add(alpha, p, operands.v[:, :, tile.n_begin : tile.n_end], hidden)
    shift = operands.lse_shift(queries)
    normalise, lse = softmax.finish(_shifted(operands.sink, shift))
    factor = v_descale.leave(normalise * keep_scale(dropout_p))
    o = sums.finish().mul_(factor[..., None])
    if operands.v_channel_descale is not None:
        o *= operands.v_channel_descale
    if operands.v_mean is not None:
        o += (softmax.row_sum() * normalise)[..., None] * operands.v_mean
    empty = lse == float("-inf")
    o = torch.where(empty[..., None], 0.0, o)
    return o, lse if shift is None else torch.where(empty, lse, lse + shift)


def _shifted(sink: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The sink against scores of smoothed keys: s_aux - softmax_scale * q . k_mean, per row."""
    return sink if sink is None or shift is None else sink - shift

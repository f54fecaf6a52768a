"""Units that torch's compiled attention serves, in groups of equal lengths.

What it does not have is added around it:

- a sink scales O after the fact: O * exp(LSE - LSE'), LSE' = log(exp(LSE) + exp(s_aux));
- the gradient of LSE is taken off rowsum(dO * O), in which one more channel of dO, 1, and of O,
  -dLSE, makes up for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flash8.backends.cpu import compiled
from flash8.backends.cpu.groups import Group
from flash8.backends.cpu.sequences import Unit, is_plain_batch
from flash8.call.options import Options

#: A row of the operands stays a multiple of a vector.
_MORE_CHANNELS = 8


def groups(
    found: list[Unit],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: Options,
    *,
    of_backward: bool = False,
) -> tuple[list[Group], list[Unit]]:
    """The units that the ops serve, by lengths, and the others."""
    if not compiled.can_do(q, k, v, qv, options) or (of_backward and options.smooth_k):
        return [], found
    by_lengths: dict[tuple[int, int], list[Unit]] = {}
    for unit in found:
        by_lengths.setdefault((unit.queries.seqlen, unit.keys.seqlen), []).append(unit)
    served, others = [], []
    for lengths, units in by_lengths.items():
        common = compiled.common_keys(*lengths, options)
        if common is None:
            others.extend(units)
        else:
            served.append(Group(tuple(units), common))
    return served, others


def forward(
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
) -> bool:
    """Fills the group's rows of out and lse. False: that is for tiles, and nothing was written."""
    made = _forward(group, group.queries(q), group.keys(k), group.keys(v), s_aux, options)
    if made is None or (group.hides and not compiled.is_finite(made[0])):
        return False
    group.store_queries(out, made[0])
    group.store_rows(lse, made[1])
    return True


def restore_rows(
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
) -> None:
    """After tiles have filled out and lse: rows that see only numbers are what they are where the
    hidden keys are numbers, too, to the bit."""
    keys, values = group.keys(k), group.keys(v)
    good = [x.isfinite().all(dim=-1, keepdim=True) for x in (keys, values)]
    clean = [x.where(seen, 0.0) for x, seen in zip((keys, values), good, strict=True)]
    made = _forward(group, group.queries(q), clean[0], clean[1], s_aux, options)
    if made is None:
        return
    both = _rows_before(~(good[0] & good[1]), made[0].shape[1], group.common)
    o = torch.where(both[..., None, None], made[0].to(out.dtype), group.queries(out))
    group.store_queries(out, o)
    of_keys = _rows_before(~good[0], made[0].shape[1], group.common)
    group.store_rows(lse, torch.where(of_keys[:, None], made[1], group.rows(lse)))


def _rows_before(bad: Tensor, seqlen_q: int, common: int) -> Tensor:
    """bool (B, seqlen_q): the rows that see no bad key, (B, seqlen_k, heads_kv, 1)."""
    keys = bad.any(dim=2)[..., 0]
    first = torch.where(keys.any(dim=1), keys.int().argmax(dim=1), keys.shape[1])
    return torch.arange(seqlen_q) < (first - common)[:, None]


def _forward(
    group: Group,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    s_aux: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """O (B, seqlen_q, heads, head_dim_v) and LSE. None: parts cannot be merged."""
    has_sink = s_aux is not None
    planned = compiled.plan(queries, keys, values, group.common, options, has_sink=has_sink)
    made = compiled.attend_by(planned, queries, keys, values)
    if made is None:
        return None
    o, lse = made
    if o.shape[-1] > values.shape[-1]:
        o = o[..., : values.shape[-1]]
    if s_aux is not None:
        with_sink = torch.logaddexp(lse, s_aux.to(lse.dtype)[:, None])
        if not compiled.tells_weights(with_sink):
            return None
        o = o * (lse - with_sink).exp_()[..., None]
        lse = with_sink
    return o.transpose(1, 2), lse


class Gradients(NamedTuple):
    """Where gradients are added to; `sink`: (heads,) in fp32."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    sink: Tensor | None


def backward(
    group: Group,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
    gradients: Gradients,
) -> bool:
    """Fills or adds the group's gradients. False as in `forward`."""
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    channels = max(head_dim, head_dim_v)
    dlse_rows = None if dlse is None else group.rows(dlse)
    if dlse_rows is not None:
        channels = _with_channels(channels)
    tokens = (group.queries(dout), group.queries(q), group.keys(k), group.keys(v))
    operands = [compiled.operand(x, torch.float32, channels) for x in (*tokens, group.queries(out))]
    do, o, row = operands[0], operands[4], group.rows(lse)
    if dlse_rows is not None:
        do[..., -1] = 1.0
        o[..., -1] = -dlse_rows
    made = compiled.attend_backward(operands, row, group.common, options.scale(q))
    if made is None:
        return False
    dq, dk, dv = (x.transpose(1, 2) for x in made)
    group.store_queries(gradients.dq, dq[..., :head_dim])
    if is_plain_batch(options):  # no keys belong to two units
        group.store_keys(gradients.dk, dk[..., :head_dim])
        group.store_keys(gradients.dv, dv[..., :head_dim_v])
    else:
        group.accumulate_keys(gradients.dk, dk[..., :head_dim])
        group.accumulate_keys(gradients.dv, dv[..., :head_dim_v])
    if gradients.sink is not None and s_aux is not None:
        d = (do * o).sum(dim=-1)
        share = (s_aux.to(row.dtype)[:, None] - row).exp_().mul_(d)
        gradients.sink.sub_(share.sum(dim=(0, 2)))
    return True


def _with_channels(channels: int) -> int:
    """At least one more."""
    return (channels // _MORE_CHANNELS + 1) * _MORE_CHANNELS

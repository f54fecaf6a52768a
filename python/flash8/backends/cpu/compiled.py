"""torch's compiled attention of CPU tensors, and what it can do.

It has the tiles of `forward` and `backward` in C++. What it can do is one mask, causal from the
top left, one head_dim, and scores that are only scaled:

- a causal mask is a square behind keys that all queries see. They are two parts, whose results
  merge by their LSE; with O and LSE of both, the gradients of each are what they are in the whole;
- head_dims that differ are filled up with zeros, which change neither scores nor values.

`grouped` adds sinks and the gradient of LSE.

Operands of 16 bits are products of fp32 here, P and dS are not rounded, and gradients are summed
up in fp32. Where the CPU has products of 16 bits (oneDNN says so), the forward uses them.

The ops' names are private to torch. They are tried once on a small problem, and where they are
not what is expected, nothing is served.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash8.backends.cpu.mask import Mask
from flash8.call.options import Options

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Beyond it a unit of LSE's last place is more than the error of fp32 results may be: weights of
#: parts, and P of a backward, whose scores torch's ops round otherwise than the forward's.
_MOST_LSE = 100.0
#: A few queries read 16-bit keys once: so many at a time are converted, into memory that stays
#: in the caches of the CPU, and the results merged.
_FEW_QUERIES = 16
_KEYS_OF_PART = 512
#: So many numbers are looked at one by one sooner than by reductions.
_FEW_ROWS = 64
#: With one key P is 1 and dS is 0, which roundings of LSE and rowsum(dO * O) would miss.
LEAST_KEYS = 2


class Ops(NamedTuple):
    """(q, k, v, dropout_p, causal, scale=) -> (O, LSE), and
    (dO, q, k, v, O, LSE, dropout_p, causal, scale=) -> (dQ, dK, dV)."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.cache
def ops() -> Ops | None:
    """torch's ops; None where this torch has none that do what is expected."""
    aten = torch.ops.aten
    try:
        # The function of the same name is called in half of the time that the op takes to read its
        # arguments; the backward has none.
        name = "_scaled_dot_product_flash_attention_for_cpu"
        found = Ops(
            getattr(torch, name, None) or getattr(aten, name).default,
            getattr(aten, f"{name}_backward").default,
        )
        return found if _are_right(found) else None
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def required_ops() -> Ops:
    """They, where `can_do` has found them."""
    found = ops()
    assert found is not None
    return found


def common_keys(seqlen_q: int, seqlen_k: int, options: Options) -> int | None:
    """How many keys, the first ones, all queries of a unit see, where a causal square follows them
    or nothing; None for other masks."""
    if seqlen_q == 0 or seqlen_k < LEAST_KEYS:
        return None
    mask = Mask(seqlen_q, seqlen_k, options)
    if mask.is_full:
        return seqlen_k
    return seqlen_k - seqlen_q if mask.is_causal and seqlen_k >= seqlen_q else None


def attend(operands: Sequence[Tensor], common: int, scale: float) -> tuple[Tensor, Tensor] | None:
    """O and LSE of operands q, k and v, not finite where the mask hides what is no number: products
    do not keep it out. None if parts cannot be merged, or a row may have no finite score."""
    forward = required_ops().forward
    q, k, v = operands
    if common == k.shape[2]:
        o, lse = forward(q, k, v, 0.0, False, scale=scale)
        return (o, lse) if is_told(lse) else None
    o, lse = forward(q, k[:, :, common:], v[:, :, common:], 0.0, True, scale=scale)
    if common > 0:
        others, row = forward(q, k[:, :, :common], v[:, :, :common], 0.0, False, scale=scale)
        if not (_has_scores(lse) and _has_scores(row)):
            return None
        total = torch.logaddexp(lse, row)
        o = o * (lse - total).exp_()[..., None] + others * (row - total).exp_()[..., None]
        lse = total
    return (o, lse) if is_told(lse) else None


class Plan(NamedTuple):
    """How the ops serve a batch: what sizes, types and options decide, and no data."""

    common: int  # keys, as `common_keys` says
    scale: float
    dtype: torch.dtype  # of the products
    channels: int  # of the operands, filled up
    in_parts: bool  # whether 16-bit keys are converted a part at a time


def plan(
    queries: Tensor, keys: Tensor, values: Tensor, common: int, options: Options, *, has_sink: bool
) -> Plan:
    """For tokens (B, seqlen, heads, d)."""
    seqlen_k, channels = keys.shape[1], max(keys.shape[3], values.shape[3])
    whole = common in (0, seqlen_k) and not has_sink
    in_parts = (
        common == seqlen_k >= 2 * _KEYS_OF_PART
        and queries.shape[1] <= _FEW_QUERIES
        and channels == min(keys.shape[3], values.shape[3])
        and not has_products(keys.dtype)
    )
    dtype = queries.dtype if whole and has_products(queries.dtype) else torch.float32
    return Plan(common, options.scale(queries), dtype, channels, in_parts)


def attend_by(
    plan: Plan, queries: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor] | None:
    """`attend` of tokens (B, seqlen, heads, d)."""
    if plan.in_parts:
        return attend_in_parts(queries, keys, values, plan.scale)
    dtype, channels = plan.dtype, plan.channels
    q, k = operand(queries, dtype, channels), operand(keys, dtype, channels)
    return attend((q, k, operand(values, dtype, channels)), plan.common, plan.scale)


def attend_in_parts(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """`attend` of tokens that see all keys, whose channels are as many as those of the values."""
    forward = required_ops().forward
    q = operand(queries, torch.float32, queries.shape[-1])
    parts = []
    buffers = [x.new_empty((*x[:, :_KEYS_OF_PART].shape,), dtype=q.dtype) for x in (keys, values)]
    for begin in range(0, keys.shape[1], _KEYS_OF_PART):
        k, v = (x[:, begin : begin + _KEYS_OF_PART] for x in (keys, values))
        part = [buffer[:, : k.shape[1]].copy_(x) for buffer, x in zip(buffers, (k, v), strict=True)]
        parts.append(forward(q, *(x.transpose(1, 2) for x in part), 0.0, False, scale=scale))
    o, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    if not _has_scores(lse):
        return None
    total = lse.logsumexp(dim=0)
    o = (o * (lse - total).exp_()[..., None]).sum(dim=0)
    return (o, total) if is_told(total) else None


def attend_backward(
    operands: Sequence[Tensor], lse: Tensor, common: int, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of q, k and v, from operands dO, q, k, v and O. None if they are not finite
    where the mask may hide what is no number, or LSE is of scores that this does not round so."""
    if not tells_weights(lse):
        return None
    backward = required_ops().backward
    dout, q, k, v, out = operands
    if common == k.shape[2]:
        dq, dk, dv = backward(dout, q, k, v, out, lse, 0.0, False, scale=scale)
        return dq, dk, dv
    keys = (k[:, :, common:], v[:, :, common:])
    made = backward(dout, q, *keys, out, lse, 0.0, True, scale=scale)
    if common > 0:
        keys = (k[:, :, :common], v[:, :, :common])
        first = backward(dout, q, *keys, out, lse, 0.0, False, scale=scale)
        dk, dv = (torch.cat(pair, dim=2) for pair in zip(first[1:], made[1:], strict=True))
        made = (made[0] + first[0], dk, dv)
    return made if all(is_finite(x) for x in made) else None


def can_do(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, options: Options) -> bool:
    """Whether the ops serve units of this call whose mask they have."""
    return (
        q.device.type == "cpu"
        and q.dtype in _DTYPES
        and k.dtype == q.dtype
        and qv is None
        and options.softcap == 0.0
        and options.dropout_p == 0.0
        and options.alibi_slopes is None
        and options.tree_mask is None
        and options.num_splits == 1
        and options.split_keys == 0
        and ops() is not None
    )


def operand(tokens: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """(B, seqlen, heads, d) as (B, heads, seqlen, channels), as the products take it: channels
    next to each other, rows that do not overlap."""
    if tokens.dtype != dtype:
        tokens = tokens.to(dtype)
    missing = channels - tokens.shape[-1]
    if missing == 0 and tokens.is_contiguous():
        return tokens.transpose(1, 2)
    *steps, channel = tokens.stride()
    if missing > 0:
        tokens = F.pad(tokens, (0, missing))
    elif channel != 1 or steps[1] < channels or _overlap(tokens, channels):
        tokens = tokens.contiguous()
    return tokens.transpose(1, 2)


def _overlap(tokens: Tensor, channels: int) -> bool:
    """Whether channels of two rows are the same memory, but for rows that are one expanded row. The
    ops make O with the strides of q, as if its channels were innermost."""
    steps = zip(tokens.shape, tokens.stride()[:-1], strict=False)
    return any(n > 1 and 0 < step < channels for n, step in steps)


def _has_scores(lse: Tensor) -> bool:
    """Whether every row has a finite score. 0 is what the op says of others, and of NaN among less
    keys than a vector has; of a row whose LSE is 0 that cannot be told."""
    return lse.abs().amin().item() > 0.0


def is_told(lse: Tensor) -> bool:
    """Both: `_has_scores`, and a backward may rely on it."""
    if lse.numel() <= _FEW_ROWS:
        return all(0.0 < abs(x) <= _MOST_LSE for x in lse.flatten().tolist())
    least, most = (x.item() for x in lse.aminmax())
    if least < 0.0:
        least, most = (x.item() for x in lse.abs().aminmax())
    return least > 0.0 and most <= _MOST_LSE


def tells_weights(lse: Tensor) -> bool:
    """Whether fp32 has the places for exp(LSE of a part - LSE). NaN is no number to tell by."""
    return lse.abs().amax().item() <= _MOST_LSE


def is_finite(x: Tensor) -> bool:
    """False if x holds anything but numbers. A sum that overflows only costs the time of tiles."""
    return math.isfinite(x.sum(dtype=torch.float32).item())


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies numbers of this type, or somebody converts them one by one."""
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in names:
        return True
    try:
        return bool(getattr(torch.ops.mkldnn, names[dtype])())
    except (AttributeError, RuntimeError):
        return False


def _are_right(found: Ops) -> bool:
    """Whether they are the attention that they are called for: grouped heads, a causal mask, LSE in
    the natural logarithm, gradients."""
    q, k, v, do = (_waves(4 if i in (0, 3) else 2, 1.3 + i) for i in range(4))
    scale = 0.7
    hidden = torch.ones(5, 5, dtype=torch.bool, device="cpu").triu(1)
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    s = (q @ keys.mT * scale).masked_fill(hidden, float("-inf"))
    p = s.softmax(-1)
    o, lse = p @ values, s.logsumexp(-1)
    ds = p * (do @ values.mT - (do * o).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (2, 2)).sum(2) for x in (ds.mT @ q, p.mT @ do))
    made = found.forward(q, k, v, 0.0, True, scale=scale)
    gradients = found.backward(do, q, k, v, *made, 0.0, True, scale=scale)
    pairs = zip((*made, *gradients), (o, lse, ds @ keys, dk, dv), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def _waves(heads: int, step: float) -> Tensor:
    values = torch.arange(heads * 5 * 8, dtype=torch.float32, device="cpu") * step
    return values.sin_().view(1, heads, 5, 8)

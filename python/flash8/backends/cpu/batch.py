"""Dense batches that torch's compiled attention serves as a whole, with little around it.

A short attention takes less than a tenth of a millisecond, so it counts that nothing is looked at
twice, and that O and the gradients are what the ops have made, not copies.
"""

import torch
from torch import Tensor

from flash8.backends.cpu import compiled
from flash8.backends.cpu.sequences import is_plain_batch
from flash8.call.options import Options


def forward_batch(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, s_aux: Tensor | None, options: Options
) -> tuple[Tensor, Tensor] | None:
    """O and LSE; None if it is not such a batch."""
    plan = plan_batch(q, k, v, qv, s_aux, options)
    return None if plan is None else forward_planned(q, k, v, plan)


def plan_batch(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, s_aux: Tensor | None, options: Options
) -> compiled.Plan | None:
    """How the forward of such a batch is served; None if it is none."""
    common = None if qv is not None or s_aux is not None else _common_keys(q, k, v, options)
    return None if common is None else compiled.plan(q, k, v, common, options, has_sink=False)


def forward_planned(
    q: Tensor, k: Tensor, v: Tensor, plan: compiled.Plan
) -> tuple[Tensor, Tensor] | None:
    """`forward_batch` by its plan. None: that is for tiles."""
    made = compiled.attend_by(plan, q, k, v)
    if made is None or (plan.common < k.shape[1] and not compiled.is_finite(made[0])):
        return None
    o, lse = made
    return _tokens_first(o, q.dtype), lse.contiguous()


def backward_batch(
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
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of q, k and v; None if it is not such a batch."""
    if dout is None or any(x is not None for x in (dlse, qv, s_aux)) or options.smooth_k:
        return None
    common = _common_keys(q, k, v, options)
    if common is None:
        return None
    operands = [compiled.operand(x, torch.float32, q.shape[3]) for x in (dout, q, k, v, out)]
    made = compiled.attend_backward(operands, lse, common, options.scale(q))
    if made is None:
        return None
    dq, dk, dv = (_tokens_first(x, q.dtype) for x in made)
    return dq, dk, dv


def _common_keys(q: Tensor, k: Tensor, v: Tensor, options: Options) -> int | None:
    """`compiled.common_keys` of a dense batch; None if the ops do not serve it."""
    if not is_plain_batch(options) or q.numel() == 0 or v.shape[3] != q.shape[3]:
        return None
    if not compiled.can_do(q, k, v, None, options):
        return None
    return compiled.common_keys(q.shape[1], k.shape[1], options)


def _tokens_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, heads, seqlen, d) of the ops, which is nobody else's, as a contiguous (B, seqlen, heads,
    d) that is no view: autograd makes a difference."""
    if x._is_view():
        return x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)
    x.transpose_(1, 2)
    if x.dtype == dtype and x.is_contiguous():
        return x
    return x.to(dtype, memory_format=torch.contiguous_format)

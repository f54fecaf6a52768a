"""The derivatives of a forward call, for the op and for launches that went past it.

What is saved and how gradients come of it is written once; the two differ in who asks for it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flash8 import backends
from flash8.call import observed
from flash8.call.options import Arguments, Options, WithoutTensors
from flash8.ops import backward_plans
from flash8.tensors.float8 import E4M3

InputGradients = tuple[Tensor | None, ...]


def save(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, Tensor],
    arguments: Arguments,
    options: WithoutTensors,
) -> tuple[Any, ...]:
    """Saves q, k, v, qv and s_aux, O and LSE, and the options for `gradients`, those that are
    tensors from `arguments`. Returns the tensors, which `tangents` wants saved for forward."""
    ctx.set_materialize_grads(False)
    saved = (*inputs, *outputs, *[arguments[name] for name in options.tensors])
    ctx.save_for_backward(*saved)
    ctx.options = options
    return saved


def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> InputGradients:
    """Those of q, k, v, qv and s_aux."""
    if dout is None and dlse is None:
        return (None,) * 5
    saved, given = ctx.saved_tensors, ctx.options
    if not torch.is_grad_enabled():  # nobody differentiates once more, which the op would refuse
        done = backward_plans.find(saved, dout, dlse, given.numbers, given.tensors)
        if done is not None:
            return done[0], done[1], done[2], None, done[3]
    q, k, v, qv, s_aux, out, lse, options = _with_options(saved, given)
    backward: Callable[..., Any] = torch.ops.flash8.backward
    unseen = observed.is_unseen(q, dout, dlse) and not backends.kernels_wanted(q)
    if unseen and not torch.is_grad_enabled():
        from flash8.ops import attention

        backward = attention.backward_past_op
    dq, dk, dv, dqv, ds_aux = backward(dout, dlse, q, k, v, qv, s_aux, out, lse, *options)
    return dq, dk, dv, None if qv is None else dqv, None if s_aux is None else ds_aux


def tangents(ctx: Any, given: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Those of O and LSE, from those of all arguments."""
    q_tangent, k_tangent, v_tangent, qv_tangent, s_aux_tangent, *others = given
    refuse_tangents(others)
    q, k, v, qv, s_aux, _, lse, options = _saved(ctx)
    inputs = (q_tangent, k_tangent, v_tangent, qv_tangent, s_aux_tangent)
    found: tuple[Tensor, Tensor] = torch.ops.flash8.jvp(*inputs, q, k, v, qv, s_aux, lse, *options)
    return found


def refuse_tangents(tangents: Iterable[Any]) -> None:
    """Of all options: they have none."""
    for name, tangent in zip(Options._fields, tangents, strict=True):
        if tangent is not None:
            raise RuntimeError(f"{name} is not differentiable, got a tangent of it; detach it")


def _saved(ctx: Any) -> tuple[Any, ...]:
    """q, k, v, qv and s_aux, O and LSE, and the options, as `save` got them."""
    return _with_options(ctx.saved_tensors, ctx.options)


def _with_options(saved: tuple[Any, ...], options: WithoutTensors) -> tuple[Any, ...]:
    q, k, v, qv, s_aux, out, lse, *tensors = saved
    if k.dtype == E4M3:
        raise ValueError(
            f"attention on raw {E4M3} inputs has no backward: call flash8.fp8_attention on "
            "16-bit tensors, which quantizes inside and is differentiable"
        )
    return q, k, v, qv, s_aux, out, lse, options.with_tensors(tensors)


class Launched(torch.autograd.Function):
    """Makes O and LSE of a launch that has been made already the outputs of a node.

    The launch does not wait for the node to be built. They come in a tuple, in which autograd does
    not look for inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s_aux: Tensor | None,
        outputs: tuple[Tensor, Tensor],
        arguments: Arguments,
        options: WithoutTensors,
    ) -> tuple[Tensor, Tensor]:
        save(ctx, (q, k, v, None, s_aux), outputs, arguments, options)
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> InputGradients:
        dq, dk, dv, _, ds_aux = gradients(ctx, dout, dlse)
        return dq, dk, dv, ds_aux, None, None, None

"""The derivatives of a forward call, for the op and for launches that went past it.

What is saved and how gradients come of it is written once; the two differ in who asks for it.
"""

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from flash8.call.options import NUMBER_FIELDS, TENSOR_FIELDS, Options
from flash8.tensors.float8 import E4M3

_tensors_of = itemgetter(*map(Options._fields.index, TENSOR_FIELDS))
_numbers_of = itemgetter(*map(Options._fields.index, NUMBER_FIELDS))

InputGradients = tuple[Tensor | None, ...]


def save(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, Tensor],
    options: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Saves q, k, v, qv and s_aux, O and LSE, and the options for `gradients`, and returns the
    tensors, which `tangents` wants saved for forward."""
    ctx.set_materialize_grads(False)
    saved = (*inputs, *outputs, *_tensors_of(options))
    ctx.save_for_backward(*saved)
    ctx.numbers = _numbers_of(options)
    return saved


def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> InputGradients:
    """Those of q, k, v, qv and s_aux."""
    if dout is None and dlse is None:
        return (None,) * 5
    (q, k, v, qv, s_aux, out, lse), options = _saved(ctx)
    dq, dk, dv, dqv, ds_aux = torch.ops.flash8.backward(
        dout, dlse, q, k, v, qv, s_aux, out, lse, *options
    )
    return dq, dk, dv, None if qv is None else dqv, None if s_aux is None else ds_aux


def tangents(ctx: Any, given: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Those of O and LSE, from those of all arguments."""
    for name, tangent in zip(Options._fields, given[5:], strict=True):
        if tangent is not None:
            raise RuntimeError(f"{name} is not differentiable, got a tangent of it; detach it")
    (q, k, v, qv, s_aux, _, lse), options = _saved(ctx)
    found: tuple[Tensor, Tensor] = torch.ops.flash8.jvp(
        *given[:5], q, k, v, qv, s_aux, lse, *options
    )
    return found


def _saved(ctx: Any) -> tuple[tuple[Any, ...], Options]:
    """What `save` got."""
    saved = ctx.saved_tensors
    inputs, tensors = saved[:7], saved[7:]
    if inputs[1].dtype == E4M3:
        raise ValueError(
            f"attention on raw {E4M3} inputs has no backward: call flash8.fp8_attention on "
            "16-bit tensors, which quantizes inside and is differentiable"
        )
    return inputs, Options(
        **dict(zip(TENSOR_FIELDS, tensors, strict=True)),
        **dict(zip(NUMBER_FIELDS, ctx.numbers, strict=True)),
    )


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
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        save(ctx, (q, k, v, None, s_aux), outputs, options)
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> InputGradients:
        dq, dk, dv, _, ds_aux = gradients(ctx, dout, dlse)
        return dq, dk, dv, ds_aux, None, None

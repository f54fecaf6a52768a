"""The torch op behind `fp8_attention`: FP8 forward, straight-through gradients.

`flash8::fp8_forward` takes the wide q, k and v only to hand gradients to them: it computes with
their quantized twins and saves those, O and LSE, nothing wide of q, k and v.
"""

from typing import Any

import torch
from torch import Tensor

from flash8.backends import backend_for
from flash8.fp8 import backward16
from flash8.fp8.tokens import Tokens
from flash8.options import SCHEMA, Options

_library = torch.library.Library("flash8", "FRAGMENT")
_FLOAT8 = "Tensor q8, Tensor k8, Tensor v8"
_library.define(
    f"fp8_forward(Tensor q, Tensor k, Tensor v, Tensor? s_aux, {_FLOAT8}, int fp8_products, "
    f"ScalarType gradient_dtype, Tensor? gradient_descale, Tensor? gradient_amax, {SCHEMA}) "
    "-> (Tensor, Tensor)"
)
_library.define(
    f"fp8_backward(Tensor? dout, Tensor? dlse, {_FLOAT8}, Tensor? s_aux, Tensor out, Tensor lse, "
    f"int fp8_products, ScalarType gradient_dtype, Tensor? gradient_descale, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_FORWARD_INPUTS = 11  # before the options


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    fp8_products: int,
    gradient_dtype: torch.dtype,
    gradient_descale: Tensor | None,
    gradient_amax: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    out = v.new_empty((*q8.shape[:-1], v.shape[-1]))
    lse, _, _ = torch.ops.flash8.forward_out(q8, k8, v8, None, s_aux, out, *options)
    return out, lse


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, s_aux: Any, q8: Tensor, *rest: Any) -> Any:
    *batch, rows, heads, _ = q8.shape
    out = v.new_empty((*q8.shape[:-1], v.shape[-1]))
    return out, v.new_empty((*batch, heads, rows), dtype=torch.float32)


def _backward(
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
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(q8, k8, v8, s_aux, out)
    backend_for(q8).fp8_backward(
        dout,
        dlse,
        q8,
        k8,
        v8,
        s_aux,
        out,
        lse,
        fp8_products,
        gradient_dtype,
        gradient_descale,
        Options(*options),
        *gradients,
    )
    return gradients


def _backward_fake(
    dout: Any,
    dlse: Any,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    s_aux: Tensor | None,
    out: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(q8, k8, v8, s_aux, out)


def _empty_gradients(
    q8: Tensor, k8: Tensor, v8: Tensor, s_aux: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (out.new_empty(x.shape) for x in (q8, k8, v8))
    return dq, dk, dv, out.new_empty((0,)) if s_aux is None else torch.empty_like(s_aux)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, s_aux, q8, k8, v8, fp8_products, gradient_dtype, descale, amax, *options = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    tensors = [x for x in options if isinstance(x, Tensor)]
    ctx.save_for_backward(q8, k8, v8, s_aux, out, lse, descale, *tensors)
    ctx.options = [None if isinstance(x, Tensor) else x for x in options]
    ctx.tensor_fields = [i for i, x in enumerate(options) if isinstance(x, Tensor)]
    ctx.dtypes = (q.dtype, k.dtype, v.dtype)
    ctx.how = (fp8_products, gradient_dtype)
    ctx.gradient_amax = amax


def _autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    nothing = (None,) * (_FORWARD_INPUTS - 4 + len(Options._fields))
    if dout is None and dlse is None:
        return (None,) * 4 + nothing
    q8, k8, v8, s_aux, out, lse, descale, *tensors = ctx.saved_tensors
    fields = list(ctx.options)
    for field, tensor in zip(ctx.tensor_fields, tensors, strict=True):
        fields[field] = tensor
    options = Options(*fields)
    if ctx.gradient_amax is not None and dout is not None:
        amax = Tokens(options.cu_seqlens_q).finite_amax(dout.float(), "tensor")
        ctx.gradient_amax.copy_(torch.maximum(ctx.gradient_amax, amax))
    if ctx.how[0] == 0:
        gradients = backward16.backward(dout, dlse, q8, k8, v8, s_aux, out, lse, options)
    else:
        gradients = torch.ops.flash8.fp8_backward(
            dout, dlse, q8, k8, v8, s_aux, out, lse, *ctx.how, descale, *options
        )
    dq, dk, dv = (
        gradient.to(dtype) for gradient, dtype in zip(gradients[:3], ctx.dtypes, strict=True)
    )
    return (dq, dk, dv, None if s_aux is None else gradients[3], *nothing)


for _name, _implementation, _fake in (
    ("fp8_forward", _forward, _forward_fake),
    ("fp8_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"flash8::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "flash8::fp8_forward", _autograd, setup_context=_setup, lib=_library
)

#: The op, called with its arguments in the order of its schema.
forward = torch.ops.flash8.fp8_forward

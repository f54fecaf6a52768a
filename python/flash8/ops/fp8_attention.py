"""The torch op behind `fp8_attention`: FP8 forward, straight-through gradients.

`flash8::fp8_forward` takes the wide q, k and v only to hand gradients to them: it computes with
their quantized twins and saves those, O and LSE, nothing wide of q, k and v. Where the twins of q
and k are rotated, by the rotation of this seed, the gradients are rotated back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash8 import backends
from flash8.call import derivatives
from flash8.call.autocast import unaffected
from flash8.call.options import SCHEMA, Options, without_tensors
from flash8.ops import batching
from flash8.ops import fp8_backward16 as backward16
from flash8.ops.autograd import refuse_tangents
from flash8.tensors.hadamard import Rotation
from flash8.tensors.tokens import Tokens

_library = torch.library.Library("flash8", "FRAGMENT")
_FLOAT8 = "Tensor q8, Tensor k8, Tensor v8"
_library.define(
    f"fp8_forward(Tensor q, Tensor k, Tensor v, Tensor? s_aux, {_FLOAT8}, int? rotation, "
    "int fp8_products, ScalarType gradient_dtype, Tensor? gradient_descale, Tensor? gradient_amax, "
    f"{SCHEMA}) -> (Tensor, Tensor)"
)
_library.define(
    f"fp8_backward(Tensor? dout, Tensor? dlse, {_FLOAT8}, Tensor? s_aux, Tensor out, Tensor lse, "
    f"int fp8_products, ScalarType gradient_dtype, Tensor? gradient_descale, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
#: Of what fp8_forward takes after q, k, v and s_aux.
_NO_GRADIENTS = (None,) * (len(torch.ops.flash8.fp8_forward.default._schema.arguments) - 4)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    rotation: int | None,
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
    given = Options(*options)
    gradients = _empty_gradients(q8, k8, v8, s_aux, out)
    if fp8_products == 0:
        if backends.has_fp8_backward(q8, k8, v8, out, given):
            from flash8.backends.hopper import backward_fp8

            backward_fp8.serve(dout, dlse, q8, k8, v8, s_aux, out, lse, given, *gradients)
            return gradients
        dq, dk, dv, ds_aux = backward16.backward(dout, dlse, q8, k8, v8, s_aux, out, lse, given)
        return dq, dk, dv, gradients[3] if ds_aux is None else ds_aux
    backends.backend_for(q8).fp8_backward(
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
        given,
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
    q, k, v, s_aux, q8, k8, v8, seed, products, gradient_dtype, descale, amax, *options = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    given = Options(*options)
    ctx.options = without_tensors(given)
    tensors = [getattr(given, name) for name in ctx.options.tensors]
    saved = (q8, k8, v8, s_aux, out, lse, descale, *tensors)
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.dtypes = (q.dtype, k.dtype, v.dtype)
    ctx.how = (products, gradient_dtype)
    ctx.gradient_amax = amax
    ctx.rotation = None if seed is None else Rotation(q.shape[-1], seed)


def _autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    if dout is None and dlse is None:
        return (None, None, None, None, *_NO_GRADIENTS)
    q8, k8, v8, s_aux, out, lse, descale, options = _saved(ctx)
    if ctx.gradient_amax is not None and dout is not None:
        amax = Tokens(options.cu_seqlens_q).finite_amax(dout.float(), "tensor")
        ctx.gradient_amax.copy_(torch.maximum(ctx.gradient_amax, amax))
    *widened, ds_aux = torch.ops.flash8.fp8_backward(
        dout, dlse, q8, k8, v8, s_aux, out, lse, *ctx.how, descale, *options
    )
    dq, dk, dv = (x.to(dtype) for x, dtype in zip(widened, ctx.dtypes, strict=True))
    if ctx.rotation is not None:
        dq, dk = (_widened(x, ctx.rotation.invert) for x in (dq, dk))
    return (dq, dk, dv, None if s_aux is None else ds_aux, *_NO_GRADIENTS)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """q8, k8, v8 and s_aux, O and LSE, the gradient's descale, and the options."""
    q8, k8, v8, s_aux, out, lse, descale, *tensors = ctx.saved_tensors
    return q8, k8, v8, s_aux, out, lse, descale, ctx.options.with_tensors(tensors)


def _jvp(
    ctx: Any,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    sink: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    """Of tangents of what `_forward` takes, in its order."""
    if ctx.rotation is not None:
        q, k = (None if x is None else _widened(x, ctx.rotation.apply) for x in (q, k))
    _q8, _k8, _v8, _seed, _products, _dtype, _descale, _amax, *options = others
    refuse_tangents(options)
    q8, k8, v8, s_aux, out, lse, _, options = _saved(ctx)
    o, row = backward16.tangents((q, k, v, sink), q8, k8, v8, s_aux, lse, options)
    return o.to(out.dtype), row


def _widened(x: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
    """x rotated in fp32 (fp64 for fp64) and rounded once."""
    return rotate(x if x.dtype == torch.float64 else x.float()).to(x.dtype)


for _name, _implementation, _fake in (
    ("fp8_forward", _forward, _forward_fake),
    ("fp8_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, unaffected(derivatives.refuse_tangents(_implementation)), _key)
    torch.library.register_fake(f"flash8::{_name}", _fake, lib=_library)
    batching.register(_library, _name)
derivatives.register(_library, "fp8_forward", derivatives.Formulas(_setup, _autograd, _jvp))
derivatives.register(_library, "fp8_backward", derivatives.NO_SECOND_ORDER)

#: The op, called with its arguments in the order of its schema.
forward = torch.ops.flash8.fp8_forward

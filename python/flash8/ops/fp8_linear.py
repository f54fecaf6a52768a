"""The torch ops of a linear layer in FP8.

    out = scale_x x8 @ (scale_w w8)^T + bias

`flash8::fp8_linear` takes the wide x (M, K) and weight (N, K) only to hand gradients to them: these
pass straight through the rounding. It multiplies x8 (M, K) and w8 (N, K), whose K may be filled up
with zeros. Gradients are products of 16 bits, of the wide x and weight, or of e4m3:

    dx = dout8 w8         dout8 by tensor, or by 1x128 along N; w8 as in the forward
    dw = dout8^T kept8    by tensor, or dout8 by 1x128 along M, kept8 = x by 128x128
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flash8.call import derivatives
from flash8.call.autocast import unaffected
from flash8.ops import gemm as _gemm  # noqa: F401  the op that is called below
from flash8.ops.quantize_matrix import quantize_matrix, transposed

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "fp8_linear(Tensor x, Tensor weight, Tensor? bias, Tensor x8, Tensor scale_x, Tensor w8, "
    "Tensor scale_w, Tensor kept8, Tensor scale_kept, bool by_blocks, bool fp8_gradients) -> Tensor"
)
_library.define(
    "fp8_linear_backward(Tensor dout, Tensor? kept8, Tensor? scale_kept, Tensor? w8, "
    "Tensor? scale_w, SymInt out_features, SymInt in_features, bool by_blocks, "
    "ScalarType x_dtype, ScalarType weight_dtype) -> (Tensor, Tensor)"
)


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x8: tuple[Tensor, Tensor],
    w8: tuple[Tensor, Tensor],
    kept8: tuple[Tensor, Tensor] | None,
    by_blocks: bool,
) -> Tensor:
    """(M, N) in x's dtype. x8, w8, kept8: data and scale. With kept8 gradients are FP8."""
    kept = x8 if kept8 is None else kept8
    found: Tensor = torch.ops.flash8.fp8_linear(
        x, weight, bias, *x8, *w8, *kept, by_blocks, kept8 is not None
    )
    return found


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x8: Tensor,
    scale_x: Tensor,
    w8: Tensor,
    scale_w: Tensor,
    *_: Any,
) -> Tensor:
    return _multiply(x8, w8, scale_x, scale_w.t(), bias, x.dtype)


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _multiply(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """a (M, K) times b (N, K) transposed."""
    found: Tensor = torch.ops.flash8.scaled_mm(a, b.t(), scale_a, scale_b, bias, None, dtype, False)
    return found


class _Backward(NamedTuple):
    """What `flash8::fp8_linear_backward` is given: without w8 no dx is wanted, without kept8 no
    dw."""

    dout: Tensor
    kept8: Tensor | None
    scale_kept: Tensor | None
    w8: Tensor | None
    scale_w: Tensor | None
    out_features: int
    in_features: int
    by_blocks: bool
    x_dtype: torch.dtype
    weight_dtype: torch.dtype


def _backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Backward(*arguments)
    dout = call.dout
    dx, dw = dout.new_empty((0,), dtype=call.x_dtype), dout.new_empty((0,), dtype=call.weight_dtype)
    d8 = scale_d = None
    if call.w8 is not None and call.scale_w is not None:
        d8, scale_d = quantize_matrix(dout, "1x128" if call.by_blocks else "tensor")
        w8 = transposed(call.w8, call.in_features)
        dx = _multiply(d8, w8, scale_d, call.scale_w, None, call.x_dtype)
    if call.kept8 is not None and call.scale_kept is not None:
        if call.by_blocks:
            turned, scale_d = quantize_matrix(dout.t().contiguous(), "1x128")
        else:
            if d8 is None or scale_d is None:
                d8, scale_d = quantize_matrix(dout, "tensor")
            turned = transposed(d8, call.out_features)
        x8 = transposed(call.kept8, call.in_features)
        dw = _multiply(turned, x8, scale_d, call.scale_kept, None, call.weight_dtype)
    return dx, dw


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Backward(*arguments)
    new, n, k = call.dout.new_empty, call.out_features, call.in_features
    dx = new((0,) if call.w8 is None else (call.dout.shape[0], k), dtype=call.x_dtype)
    return dx, new((0,) if call.kept8 is None else (n, k), dtype=call.weight_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, _, w8, scale_w, kept8, scale_kept, by_blocks, fp8_gradients = inputs
    ctx.set_materialize_grads(False)
    ctx.by_blocks, ctx.fp8_gradients = by_blocks, fp8_gradients
    ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.sizes = tuple(weight.shape)
    for_x = (w8, scale_w) if fp8_gradients else (weight, None)
    for_weight = (kept8, scale_kept) if fp8_gradients else (x, None)
    ctx.save_for_backward(
        *(for_x if x.requires_grad else (None, None)),
        *(for_weight if weight.requires_grad else (None, None)),
    )
    ctx.has_bias_gradient = bias is not None and bias.requires_grad


def _autograd(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    others = (None,) * 8
    if dout is None:
        return None, None, None, *others
    of_weight, scale_w, of_x, scale_x = ctx.saved_tensors
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    dx = dw = db = None
    if ctx.has_bias_gradient:
        db = dout.sum(0, dtype=torch.float32).to(bias_dtype)
    if ctx.fp8_gradients:
        how = *ctx.sizes, ctx.by_blocks, x_dtype, weight_dtype
        dx, dw = torch.ops.flash8.fp8_linear_backward(dout, of_x, scale_x, of_weight, scale_w, *how)
        return dx if of_weight is not None else None, dw if of_x is not None else None, db, *others
    if of_weight is not None:
        dx = dout @ of_weight.to(dout.dtype)
    if of_x is not None:
        dw = (dout.t() @ of_x).to(weight_dtype)
    return dx, dw, db, *others


def _refuse_tangents(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError("flash8.nn.Fp8Linear has no forward-mode AD: its gradients are for backward")


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _refuse_second_order(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "flash8.nn.Fp8Linear with FP8 gradients has no second derivative: grad_dtype=None has"
    )


for _name, _function, _fake in (
    ("fp8_linear", _forward, _forward_fake),
    ("fp8_linear_backward", _backward, _backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, unaffected(derivatives.refuse_tangents(_function)), _key)
    torch.library.register_fake(f"flash8::{_name}", _fake, lib=_library)
derivatives.register(
    _library, "fp8_linear", derivatives.Formulas(_setup, _autograd, _refuse_tangents)
)
derivatives.register(
    _library,
    "fp8_linear_backward",
    derivatives.Formulas(_save_nothing, _refuse_second_order, _refuse_second_order),
)

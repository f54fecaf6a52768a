"""Operands of `gemm.scaled_mm` on a compiled kernel (cutlass_kernels/quantize/matrix.cu): one
launch, by row or by 1x128, of a matrix, of RMSNorm of it, or of SiLU-multiply."""

import functools

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import kernels, streams
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper.quantize_matrix_variants import (
    Input,
    Prologue,
    QuantizeMatrixVariant,
)
from flash8.call.request import MatrixRequest
from flash8.tensors.float8 import E4M3

_DTYPES: dict[torch.dtype, Input] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
_MOST = 2**31 - 2**20


def refusal(request: MatrixRequest) -> str | None:
    """Why no kernel serves this call, or None."""
    if request.granularity not in ("row", "1x128"):
        return f"scales by {request.granularity!r} are made by other kernels"
    if request.scale is not None or request.amax is not None:
        return "a scale or an amax is given"
    if request.x.numel() == 0:
        return "there is nothing to quantize"
    if max(request.x.shape) > _MOST:
        return f"x has shape {tuple(request.x.shape)}; the kernel takes sizes up to 2^31 - 2^20"
    return None


def variant(request: MatrixRequest) -> QuantizeMatrixVariant:
    """The kernel of a call that is not refused."""
    prologue: Prologue = "none" if request.norm is None else "rms_norm"
    if request.up is not None:
        prologue = "silu_mul"
    return _variant(_DTYPES[request.x.dtype], prologue)


def quantize_matrix(request: MatrixRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Data, scales, and x + residual (empty without one), on x's stream."""
    x = request.x
    data = quantizer.allocate(request.data_shape, E4M3, x)
    scale = quantizer.allocate(request.scale_shape, torch.float32, x)
    summed = (0,) if request.residual is None else tuple(x.shape)
    filled = data, scale, quantizer.allocate(summed, x.dtype, x)
    launch(request, *filled)
    return filled


def launch(request: MatrixRequest, data: Tensor, scale: Tensor, summed: Tensor) -> None:
    """The same, into what is given: contiguous, of the request's shapes."""
    x = _readable(request.x)
    call = _native.QuantizeMatrixParams()
    call.rows, call.columns = x.shape
    call.x, call.x_stride = x.data_ptr(), _row_stride(x)
    call.out, call.out_stride = data.data_ptr(), data.stride(0)
    call.scale, call.scale_stride = scale.data_ptr(), scale.stride(0)
    call.by_row, call.row_threads = int(request.granularity == "row"), request.row_threads
    other = request.residual if request.up is None else request.up
    if other is not None:
        other = _readable(other)
        call.other, call.other_stride = other.data_ptr(), _row_stride(other)
    if request.residual is not None:
        call.sum, call.sum_stride = summed.data_ptr(), summed.stride(0)
    weight = None
    if request.norm is not None:
        weight = request.norm.weight
        weight = weight.contiguous() if weight.dtype == x.dtype else weight.float().contiguous()
        call.norm_weight, call.norm_eps = weight.data_ptr(), request.norm.eps
        call.norm_is_fp32 = int(weight.dtype == torch.float32)
    kernel, device = kernels.kernel(variant(request)), x.device.index or 0
    # x, other and weight live until the launch is enqueued; the stream does the rest.
    _native.launch_quantize_matrix(kernel, device, streams.current_stream(x), call)


def _readable(x: Tensor) -> Tensor:
    """As it lies, or a copy with contiguous columns."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _row_stride(x: Tensor) -> int:
    """torch gives a dimension of one any stride; here it is 0."""
    return 0 if x.shape[0] == 1 else x.stride(0)


@functools.cache
def _variant(dtype: Input, prologue: Prologue) -> QuantizeMatrixVariant:
    return QuantizeMatrixVariant(dtype, prologue)

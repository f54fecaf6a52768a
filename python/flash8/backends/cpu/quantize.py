"""The quantizer in plain torch operations: any device, traceable, the kernels' specification."""

import torch
from torch import Tensor

from flash8.call.request import Request
from flash8.tensors.arguments import describe, require_tensor
from flash8.tensors.descales import SMALLEST, checked
from flash8.tensors.float8 import E4M3, MAX, saturating_cast
from flash8.tensors.rotary import embed_position
from flash8.tensors.v_colmajor import to_colmajor

_WIDE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def quantize(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Data, descale and mean; descale and mean are empty where the caller has them already."""
    if request.batch == 0:
        return _of_no_sequence(request)
    x, tokens, rotation = request.x, request.tokens, request.rotation
    y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if request.rope is not None:
        y = embed_position(y, request.rope, request.batch, request.cu_seqlens)
    mean = None if request.mean is None else request.mean.to(y.dtype)
    if request.smooth:
        mean = tokens.finite_mean(y)
    if mean is not None:
        y = y - (mean if mean.dim() == 2 else tokens.spread(mean, y))
    if rotation is not None:
        y = rotation.apply(y)
        mean = None if mean is None else rotation.apply(mean)
    if request.amax is not None:
        found = tokens.finite_amax(y.float(), "tensor")
        request.amax.copy_(torch.maximum(request.amax, found))
    descale = request.descale
    if descale is None:
        descale = descale_of(tokens.finite_amax(y, request.granularity), request.dtype)
    inverse = checked(descale).reciprocal()
    scaled = y * tokens.spread_descale(inverse, y, request.granularity)
    data = saturating_cast(scaled, request.dtype)
    if request.v_colmajor:
        data = to_colmajor(data, tokens)
    nothing = y.new_empty((0,), dtype=torch.float32)
    return data, descale, nothing if mean is None else mean.float()


def _of_no_sequence(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that belong to no sequence are zeros, with the descales of zeros."""
    shapes = request.data_shape(), request.descale_shape(), request.mean_shape()
    data, amax, mean = (request.x.new_zeros(shape, dtype=torch.float32) for shape in shapes)
    descale = descale_of(amax, request.dtype) if request.descale is None else request.descale
    return data.to(request.dtype), descale, mean


def descale_of(amax: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """The fp32 descale of values up to amax: 1 where amax is 0, never so small as to overflow.

    Args:
        amax: floating point, any shape.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Raises:
        TypeError: naming the argument that is wrong.
    """
    require_tensor("amax", amax, _WIDE)
    if not isinstance(dtype, torch.dtype) or dtype not in MAX:
        raise TypeError(f"dtype must be one of {', '.join(map(str, MAX))}, got {describe(dtype)}")
    descale = (amax.double() / MAX[dtype]).clamp_min(SMALLEST)
    return torch.where(amax == 0.0, 1.0, descale).float()

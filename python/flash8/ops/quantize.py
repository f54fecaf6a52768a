"""The torch op of compiled quantizers, behind `flash8.fp8.quantize`.

It is traced as it is; which kernel is trusted is asked when it runs."""

from typing import Any

import torch
from torch import Tensor

from flash8.backends import index_checks
from flash8.backends.cpu import quantize as portable
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper.verify import trust
from flash8.call.request import Request
from flash8.tensors.hadamard import Rotation
from flash8.tensors.rotary import Rope

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "quantize(Tensor x, str granularity, ScalarType dtype, int? hadamard_seed, bool smooth, "
    "Tensor? mean, Tensor? cos, Tensor? sin, Tensor? offsets, bool interleaved, "
    "Tensor? cu_seqlens, Tensor? seqused, Tensor? descale, Tensor(a!)? amax, bool v_colmajor) "
    "-> (Tensor, Tensor, Tensor)"
)


def quantize(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Data, descale and mean; empty where `quantizer.quantize` says so."""
    r = request
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.flash8.quantize(
        r.x,
        r.granularity,
        r.dtype,
        None if r.rotation is None else r.rotation.seed,
        r.smooth,
        r.mean,
        *((None, None, None, True) if r.rope is None else r.rope),
        r.cu_seqlens,
        r.seqused,
        r.descale,
        r.amax,
        r.v_colmajor,
    )
    return found


def _request(
    x: Tensor,
    granularity: str,
    dtype: torch.dtype,
    seed: int | None,
    smooth: bool,
    mean: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    offsets: Tensor | None,
    interleaved: bool,
    *rest: Any,
) -> Request:
    rotation = None if seed is None else Rotation(x.shape[-1], seed)
    rope = None if cos is None or sin is None else Rope(cos, sin, offsets, interleaved)
    return Request(x, granularity, dtype, rotation, smooth, mean, rope, *rest)


def _quantize(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    request = _request(*arguments)
    device = request.x.device
    index_checks.check_quantize(request.x, request.cu_seqlens, request.seqused, request.descale)
    if all(trust.is_trusted(variant, device) for variant in quantizer.variants(request)):
        return quantizer.quantize(request)
    data, descale, mean = portable.quantize(request)
    # Not what the caller gave: an op returns no argument of its own.
    descale = descale if request.descale is None else descale.new_empty((0,))
    return data, descale, mean if request.mean_shape() != (0,) else mean.new_empty((0,))


def _quantize_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    request = _request(*arguments)
    x = request.x
    descale = (0,) if request.descale is not None else request.descale_shape()
    return (
        x.new_empty(request.data_shape(), dtype=request.dtype),
        x.new_empty(descale, dtype=torch.float32),
        x.new_empty(request.mean_shape(), dtype=torch.float32),
    )


for _key in ("CPU", "CUDA"):
    _library.impl("quantize", _quantize, _key)
torch.library.register_fake("flash8::quantize", _quantize_fake, lib=_library)

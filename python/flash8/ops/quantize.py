"""The torch ops of compiled quantizers: behind `flash8.fp8.quantize`, and behind an append.

They are traced as they are; which kernel is trusted is asked when they run."""

from typing import Any

import torch
from torch import Tensor

from flash8.backends import index_checks
from flash8.backends.cpu import append_quantized as portable_append
from flash8.backends.cpu import quantize as portable
from flash8.backends.hopper import append_quantized as appender
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper.verify import trust
from flash8.call import derivatives
from flash8.call.request import Appended, Request
from flash8.tensors.hadamard import Rotation
from flash8.tensors.rotary import Rope

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "quantize(Tensor x, str granularity, ScalarType dtype, int? hadamard_seed, bool smooth, "
    "Tensor? mean, Tensor? cos, Tensor? sin, Tensor? offsets, bool interleaved, "
    "Tensor? cu_seqlens, Tensor? seqused, Tensor? descale, Tensor(a!)? amax, bool v_colmajor) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "append_quantized(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor starts, "
    "Tensor? cu_seqlens, Tensor? page_table, Tensor? kv_batch_idx, Tensor? k_descale, "
    "Tensor? v_descale, Tensor? k_mean, Tensor? v_mean, Tensor? cos, Tensor? sin, Tensor? offsets, "
    "bool interleaved) -> ()"
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


def append(k: Appended, v: Appended) -> None:
    """Writes new rows into the two e4m3 caches of a call, which only keys have a position in."""
    rope = (None, None, None, True) if k.rope is None else k.rope
    where = (k.starts, k.cu_seqlens, k.page_table, k.kv_batch_idx)
    scales = (k.descale, v.descale, k.mean, v.mean)
    torch.ops.flash8.append_quantized(k.cache, v.cache, k.x, v.x, *where, *scales, *rope)


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    k_mean: Tensor | None,
    v_mean: Tensor | None,
    *position: Any,
) -> None:
    rope = None if position[0] is None else Rope(*position)
    where = (starts, cu_seqlens, page_table, kv_batch_idx)
    both = (
        Appended(k_cache, k, *where, k_descale, k_mean, rope),
        Appended(v_cache, v, *where, v_descale, v_mean),
    )
    # What refuses one of them has to be met before either is written.
    for appended in both:
        index_checks.check_append(appended.cache, appended.x, *where, appended.descale)
    trusted = [trust.is_trusted(appender.variant(appended), k.device) for appended in both]
    if not all(trusted):
        portable_append.append(*both)
        return
    for appended in both:
        appender.append(appended)


def _append_fake(*_: Any) -> None:
    return None


for _name, _implementation, _fake in (
    ("quantize", _quantize, _quantize_fake),
    ("append_quantized", _append, _append_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"flash8::{_name}", _fake, lib=_library)
derivatives.refuse(
    _library,
    "append_quantized",
    "flash8 quantizes keys into a cache in place here, which has no derivative; append under "
    "torch.no_grad(), and detach what is differentiated",
)

"""From wider tensors to float8 and back: x ~ rotation^-1(descale * data + mean).

The order is fixed: rotary embedding, then K's or V's mean is subtracted, then the rotation, then
the scale. Each step before the last is exact for attention: K's mean shifts all scores of a row
alike and comes back in LSE (SageAttention 2, arXiv 2411.10958), V's mean is added to O, and the
rotations of q and k cancel.

    descale = amax / max_of_dtype       amax over finite values
    amax = 0                            descale = 1
    descale is at least 2^-126          so that its inverse is finite
    data = saturate(x * (1 / descale))  +-inf becomes the largest value, NaN stays NaN
"""

from typing import Any

import torch
from torch import Tensor

from flash8 import backends
from flash8.backends import cpu
from flash8.backends.cpu import quantize as portable
from flash8.backends.cpu.quantize import descale_of
from flash8.backends.hopper import quantize as quantizer
from flash8.call.request import Request
from flash8.ops import quantize as kernels
from flash8.tensors import descales, memory
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    describe,
    require_bool,
    require_rank,
    require_shape,
    require_tensor,
    to_int32,
)
from flash8.tensors.float8 import E4M3, E5M2, MAX
from flash8.tensors.hadamard import Rotation, rotation_for
from flash8.tensors.rotary import Rope
from flash8.tensors.scaled_tensor import ScaledTensor
from flash8.tensors.tokens import GRANULARITIES, Tokens

__all__ = ["Rope", "dequantize", "descale_of", "quantize"]

_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def quantize(
    x: Tensor,
    granularity: str = "tensor",
    *,
    dtype: torch.dtype = E4M3,
    hadamard: bool | int | Rotation | None = None,
    smooth_k: bool | Tensor = False,
    smooth_v: bool | Tensor = False,
    rope: Rope | tuple[Any, ...] | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    descale: Tensor | None = None,
    amax: Tensor | None = None,
    v_colmajor: bool = False,
) -> ScaledTensor:
    """Quantizes q, k or v for the attention functions. Not differentiable: see `fp8_attention`.

    Args:
        x: (batch, seqlen, heads, d), (total, heads, d) with cu_seqlens, or for "page"
            (pages, page_size, heads, d); bf16, fp16, fp32 or fp64.
        granularity: what has a descale of its own: "tensor", "head" (of a sequence), "block" (128
            tokens of a head), "page" (of a head) or, for v only, "channel" (of a head of a
            sequence). A descale per token is refused: for K it would cost a multiply per score.
        dtype: float8_e4m3fn, or float8_e5m2 for gradients.
        hadamard: rotate heads, for q and k alike: True, or an int seed of the random signs.
        smooth_k: take K's mean over the tokens of each head off first: True, or the mean to use,
            (heads, d) or (batch, heads, d), in x's basis. Exact for O and LSE without softcap.
        smooth_v: the same for V; added to O by the attention functions.
        rope: rotate by position first, (cos, sin[, offsets[, interleaved]]).
        cu_seqlens: int32 or int64 (batch + 1,), the sequences of a packed x.
        seqused: int32 or int64 (batch,): only so many tokens of each sequence count for amax and
            mean.
        descale: a given fp32 descale of the granularity's shape, as delayed scaling has it.
        amax: with a given descale: fp32 (), raised to the largest finite value where that is more.
        v_colmajor: keys innermost, (batch, heads, d, 128 * blocks) or packed
            (heads, d, 128 * blocks), for v: `flash8.tensors.v_colmajor` has the order. Keys that
            do not count are zero.

    Returns:
        ScaledTensor with data in x's shape unless it is v_colmajor.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    require_tensor("x", x, _INPUT_DTYPES)
    _check(x, granularity, dtype, cu_seqlens, seqused)
    _check_outputs(x, granularity, descale, amax, v_colmajor)
    rotation = rotation_for(hadamard, x.shape[-1])
    smooth, mean = _checked_mean(x, smooth_k, smooth_v, granularity, cu_seqlens)
    position = _checked_rope(x, rope, cu_seqlens)
    request = Request(
        x=x.detach(),  # no_grad forgets gradients, and no tangents
        granularity=granularity,
        dtype=dtype,
        rotation=rotation,
        smooth=smooth,
        mean=None if mean is None else mean.detach(),
        rope=position,
        cu_seqlens=to_int32(cu_seqlens),
        seqused=to_int32(seqused),
        descale=descale,
        amax=amax,
        v_colmajor=v_colmajor,
    )
    _check_descale(request)
    with torch.no_grad():
        serve = kernels.quantize if _has_kernels(request) else portable.quantize
        data, found_descale, found_mean = serve(request)
    if mean is not None and rotation is None:
        found_mean = mean.float()
    return ScaledTensor(
        data,
        found_descale if descale is None else descale,
        granularity,
        None if mean is None and not smooth else found_mean,
        rotation,
        cu_seqlens,
        x.shape[-3] if v_colmajor else None,
    )


def _check_descale(request: Request) -> None:
    """Its shape says how it is read, so it has to be one that x has."""
    if request.descale is None:
        return
    if request.granularity == "channel":
        shape = request.descale_shape()
        shapes = [shape[1:], shape]
    else:
        names = ["tensor", "head", "block", *(() if request.packed else ("page",))]
        shapes = [request._replace(granularity=name).descale_shape() for name in names]
    found = tuple(request.descale.shape)
    if found not in shapes:
        known = ", ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(
            f"descale must have one of the shapes {known} of granularity {request.granularity!r} "
            f"for {describe(request.x)}, got {found}"
        )


def _has_kernels(request: Request) -> bool:
    """Whether compiled kernels serve it; a warning says once why not where they were asked for."""
    if not backends.kernels_wanted(request.x):
        return False
    reason = quantizer.refusal(request)
    if reason is not None and request.x.numel() and not torch.compiler.is_compiling():
        backends.tell_about_refusal(reason)
    return reason is None


def dequantize(x: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """rotation^-1(descale * data + mean) in `dtype`: x as `quantize` got it, up to rounding.

    Raises TypeError when x is no ScaledTensor or `dtype` no floating point one.
    """
    if not isinstance(x, ScaledTensor):
        raise TypeError(f"x must be a ScaledTensor, got {describe(x)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point torch.dtype, got {describe(dtype)}")
    tokens = Tokens(x.cu_seqlens)
    y = x.by_token().float()
    y = y * tokens.spread_descale(x.descale, y, x.granularity)
    if x.mean is not None:
        y = y + (x.mean if x.mean.dim() == 2 else tokens.spread(x.mean, y))
    if x.rotation is not None:
        y = x.rotation.invert(y)
    return y.to(dtype)


def _check(x: Tensor, granularity: Any, dtype: Any, cu_seqlens: Any, seqused: Any) -> None:
    if granularity not in GRANULARITIES:
        reason = ""
        if granularity in ("token", "row"):
            reason = (
                ": a descale per token of K would cost a multiply per score, where block "
                "descales cost nothing"
            )
        raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}{reason}")
    if dtype not in MAX:
        raise TypeError(f"dtype must be {E4M3} or {E5M2}, got {dtype}")
    if cu_seqlens is None:
        layout = "(pages, page_size, heads, d)" if granularity == "page" else "(b, s, heads, d)"
        require_rank("x", x, 4, f"{layout}; (total, heads, d) needs cu_seqlens")
    else:
        require_rank("x", x, 3, "(total, heads, d) with cu_seqlens")
        require_tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES, x)
        require_rank("cu_seqlens", cu_seqlens, 1, "(batch + 1,)")
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens must have batch + 1 elements, at least 1, got 0")
    if granularity == "page" and (cu_seqlens is not None or seqused is not None):
        raise ValueError(
            "granularity 'page' takes no cu_seqlens or seqused: pages know no sequence"
        )
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(f"x must have heads and a head dimension, got {describe(x)}")
    if seqused is not None:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        require_tensor("seqused", seqused, INDEX_DTYPES, x)
        require_shape("seqused", seqused, (batch,), "(batch,)")
    if all(memory.is_readable(y) for y in (x, cu_seqlens, seqused) if y is not None):
        cpu.check_tokens(x, cu_seqlens, seqused)


def _check_outputs(x: Tensor, granularity: str, descale: Any, amax: Any, v_colmajor: Any) -> None:
    require_bool("v_colmajor", v_colmajor)
    if v_colmajor and granularity == "page":
        raise ValueError("v_colmajor is for sequences; pages are stored by tokens")
    if descale is not None:
        require_tensor("descale", descale, torch.float32, x)
        if granularity == "channel" and descale.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                "descale per channel must have shape (heads, d) or (batch, heads, d), ending in "
                f"{tuple(x.shape[-2:])}, got {tuple(descale.shape)}"
            )
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            descales.check_value("descale", descale)
    if amax is not None:
        require_tensor("amax", amax, torch.float32, x)
        require_shape("amax", amax, (), "one value")
        if descale is None:
            raise ValueError("amax is gathered beside a given descale, got descale=None")


def _checked_mean(
    x: Tensor, smooth_k: Any, smooth_v: Any, granularity: str, cu_seqlens: Tensor | None
) -> tuple[bool, Tensor | None]:
    """Whether to subtract x's own mean, or the mean to subtract."""
    for name, value in (("smooth_k", smooth_k), ("smooth_v", smooth_v)):
        if not isinstance(value, Tensor):
            require_bool(name, value)
    if smooth_k is not False and smooth_v is not False:
        raise ValueError("smooth_k and smooth_v cannot be combined: x is one of k and v")
    given = smooth_v if smooth_k is False else smooth_k
    if not isinstance(given, Tensor):
        if given and granularity == "page":
            raise ValueError(
                "smooth_k (smooth_v) must be the mean itself for granularity 'page', got True: "
                "pages know neither their sequence nor how many of their tokens are used"
            )
        return given, None
    require_tensor("the mean in smooth_k (smooth_v)", given, (*_INPUT_DTYPES,), x)
    heads, width = x.shape[-2:]
    if given.dim() == 2:
        require_shape("the mean in smooth_k (smooth_v)", given, (heads, width), "(heads, d)")
    else:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (batch, heads, width)
        require_shape("the mean in smooth_k (smooth_v)", given, shape, "(batch, heads, d)")
    return False, given


def _checked_rope(x: Tensor, given: Any, cu_seqlens: Tensor | None) -> Rope | None:
    if given is None:
        return None
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"rope must be a Rope or a tuple (cos, sin, ...), got {describe(given)}")
    rope = Rope(*given)
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        require_tensor(f"rope.{name}", table, _INPUT_DTYPES, x)
        require_rank(f"rope.{name}", table, 2, "(seqlen_rotary, rotary_dim / 2)")
    require_shape("rope.sin", rope.sin, tuple(rope.cos.shape), "rope.cos's shape")
    if 2 * rope.cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"rope.cos must have at most head_dim / 2 = {x.shape[-1] // 2} columns, "
            f"got shape {tuple(rope.cos.shape)}"
        )
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and cu_seqlens is None:
        first = 0 if rope.offsets is None else int(max(rope.offsets.tolist(), default=0))
        last = first + x.shape[1] - 1
        if x.numel() and last >= rope.cos.shape[0]:
            raise ValueError(
                f"rope.cos must have a row for every position up to {last}, "
                f"got {rope.cos.shape[0]} rows"
            )
    return rope

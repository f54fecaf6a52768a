"""From wider tensors to float8 and back: x ~ rotation^-1(descale * data + mean).

The order is fixed: rotary embedding, then K's or V's mean is taken off, then the rotation, then
the scale. Each step before the last is exact for attention: K's mean shifts all scores of a row
alike and comes back in LSE (SageAttention 2, arXiv 2411.10958), V's mean is added to O, and the
rotations of q and k cancel.

    descale = amax / max_of_dtype       amax over finite values
    amax = 0                            descale = 1
    descale is at least 2^-126          so that its inverse is finite
    data = saturate(x * (1 / descale))  +-inf becomes the largest value, NaN stays NaN
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash8.arguments import (
    describe,
    require_bool,
    require_rank,
    require_shape,
    require_tensor,
)
from flash8.float8 import E4M3, E5M2, MAX, saturating_cast
from flash8.fp8.hadamard import Rotation, rotation_for
from flash8.fp8.tokens import GRANULARITIES, Tokens
from flash8.rotary import apply_rotary, token_positions
from flash8.scaled_tensor import ScaledTensor

_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SMALLEST_DESCALE = 2.0**-126


class Rope(NamedTuple):
    """Rotary embedding before quantization. cos, sin: (seqlen_rotary, rotary_dim / 2)."""

    cos: Tensor
    sin: Tensor
    offsets: Tensor | None = None  # int (batch,): the position of each sequence's first token
    interleaved: bool = True


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
) -> ScaledTensor:
    """Quantizes q, k or v for the attention functions. Not differentiable: see `fp8_attention`.

    Args:
        x: (batch, seqlen, heads, d), (total, heads, d) with cu_seqlens, or for "page"
            (pages, page_size, heads, d); bf16, fp16, fp32 or fp64.
        granularity: what has a descale of its own: "tensor", "head" (of a sequence), "block" (128
            tokens of a head) or "page" (of a head). A descale per token is refused: for K it would
            cost a multiply per score.
        dtype: float8_e4m3fn, or float8_e5m2 for gradients.
        hadamard: rotate heads, for q and k alike: True, or an int seed of the random signs.
        smooth_k: take K's mean over the tokens of each head off first: True, or the mean to use,
            (heads, d) or (batch, heads, d), in x's basis. Exact for O and LSE without softcap.
        smooth_v: the same for V; added to O by the attention functions.
        rope: rotate by position first, (cos, sin[, offsets[, interleaved]]).
        cu_seqlens: int32 (batch + 1,), the sequences of a packed x.
        seqused: int32 (batch,): only so many tokens of each sequence count for amax and mean.
        descale: a given fp32 descale of the granularity's shape, as delayed scaling has it.

    Returns:
        ScaledTensor with data in x's shape.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    require_tensor("x", x, _INPUT_DTYPES)
    _check(x, granularity, dtype, cu_seqlens, seqused)
    rotation = rotation_for(hadamard, x.shape[-1])
    given_mean = _given_mean(smooth_k, smooth_v)
    with torch.no_grad():
        tokens = Tokens(cu_seqlens, seqused)
        y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if rope is not None:
            y = _rotate_by_position(y, Rope(*rope), cu_seqlens)
        mean = _mean(y, given_mean, tokens, granularity)
        if mean is not None:
            y = y - (mean if mean.dim() == 2 else tokens.spread(mean, y))
        if rotation is not None:
            y = rotation.apply(y)
            mean = None if mean is None else rotation.apply(mean)
        if descale is None:
            descale = descale_of(tokens.finite_amax(y, granularity), dtype)
        data = saturating_cast(y * tokens.spread_descale(descale, y).reciprocal(), dtype)
    mean = None if mean is None else mean.float()
    return ScaledTensor(data, descale, granularity, mean, rotation, cu_seqlens)


def dequantize(x: ScaledTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """rotation^-1(descale * data + mean) in `dtype`: x as `quantize` got it, up to rounding."""
    if not isinstance(x, ScaledTensor):
        raise TypeError(f"x must be a ScaledTensor, got {describe(x)}")
    y, tokens = x.data.float(), Tokens(x.cu_seqlens)
    y = y * tokens.spread_descale(x.descale, y)
    if x.mean is not None:
        y = y + (x.mean if x.mean.dim() == 2 else tokens.spread(x.mean, y))
    if x.rotation is not None:
        y = x.rotation.invert(y)
    return y.to(dtype)


def descale_of(amax: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """The fp32 descale of values up to amax: 1 where amax is 0, never so small as to overflow."""
    descale = (amax.double() / MAX[dtype]).clamp_min(_SMALLEST_DESCALE)
    return torch.where(amax == 0.0, 1.0, descale).float()


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
        require_tensor("cu_seqlens", cu_seqlens, torch.int32, x)
        require_rank("cu_seqlens", cu_seqlens, 1, "(batch + 1,)")
    if granularity == "page" and (cu_seqlens is not None or seqused is not None):
        raise ValueError(
            "granularity 'page' takes no cu_seqlens or seqused: pages know no sequence"
        )
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        raise ValueError(f"x must have heads and a head dimension, got {describe(x)}")
    if seqused is not None:
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        require_tensor("seqused", seqused, torch.int32, x)
        require_shape("seqused", seqused, (batch,), "(batch,)")


def _given_mean(smooth_k: Any, smooth_v: Any) -> Any:
    """False, True or a tensor."""
    for name, value in (("smooth_k", smooth_k), ("smooth_v", smooth_v)):
        if not isinstance(value, Tensor):
            require_bool(name, value)
    if smooth_k is not False and smooth_v is not False:
        raise ValueError("smooth_k and smooth_v cannot be combined: x is one of k and v")
    return smooth_v if smooth_k is False else smooth_k


def _mean(y: Tensor, given: Any, tokens: Tokens, granularity: str) -> Tensor | None:
    if given is False:
        return None
    if given is True:
        if granularity == "page":
            raise ValueError(
                "smooth_k (smooth_v) must be the mean itself for granularity 'page', got True: "
                "pages know neither their sequence nor how many of their tokens are used"
            )
        return tokens.finite_mean(y)
    require_tensor("the mean in smooth_k (smooth_v)", given, (*_INPUT_DTYPES,), y)
    heads, width = y.shape[-2:]
    if given.dim() == 2:
        require_shape("the mean in smooth_k (smooth_v)", given, (heads, width), "(heads, d)")
    else:
        batch = y.shape[0] if tokens.cu_seqlens is None else tokens.cu_seqlens.shape[0] - 1
        shape = (batch, heads, width)
        require_shape("the mean in smooth_k (smooth_v)", given, shape, "(batch, heads, d)")
    mean: Tensor = given.to(y.dtype)
    return mean


def _rotate_by_position(y: Tensor, rope: Rope, cu_seqlens: Tensor | None) -> Tensor:
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        require_tensor(f"rope.{name}", table, _INPUT_DTYPES, y)
        require_rank(f"rope.{name}", table, 2, "(seqlen_rotary, rotary_dim / 2)")
    require_shape("rope.sin", rope.sin, tuple(rope.cos.shape), "rope.cos's shape")
    if 2 * rope.cos.shape[1] > y.shape[-1]:
        raise ValueError(
            f"rope.cos must have at most head_dim / 2 = {y.shape[-1] // 2} columns, "
            f"got shape {tuple(rope.cos.shape)}"
        )
    batch = y.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    offsets = rope.offsets
    if offsets is None:
        offsets = torch.zeros(batch, dtype=torch.int64, device=y.device)
    positions = token_positions(y, offsets, cu_seqlens)
    if not torch.compiler.is_compiling() and y.device.type == "cpu" and positions.numel():
        last = int(positions.max())
        if cu_seqlens is None and last >= rope.cos.shape[0]:
            raise ValueError(
                f"rope.cos must have a row for every position up to {last}, "
                f"got {rope.cos.shape[0]} rows"
            )
    positions = positions.clamp(max=rope.cos.shape[0] - 1)  # rows behind the last sequence
    return apply_rotary(y, rope.cos, rope.sin, positions, interleaved=rope.interleaved)

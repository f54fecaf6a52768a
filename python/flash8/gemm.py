"""FP8 matrix products with scales: `scaled_mm`, `grouped_scaled_mm` of groups of rows or along K,
`qkv_projection`, and their operands: docs/gemm.md."""

from typing import Any, get_args, overload

import torch
from torch import Tensor

from flash8.call import grouped_scaled_mm as grouped_call
from flash8.call import scaled_mm as call
from flash8.call.request import MatrixRequest
from flash8.ops import gemm as ops
from flash8.ops import gemm_plans as plans
from flash8.ops import grouped_gemm as grouped_ops
from flash8.ops import grouped_gemm_plans as grouped_plans
from flash8.ops import quantize_matrix as quantizer
from flash8.projection import qkv_projection
from flash8.quantized_attention import quantize_attention
from flash8.tensors.arguments import (
    require_float,
    require_rank,
    require_shape,
    require_tensor,
)
from flash8.tensors.rms_norm import Norm

__all__ = [
    "grouped_scaled_mm",
    "qkv_projection",
    "quantize",
    "quantize_attention",
    "quantize_rms_norm",
    "quantize_silu_mul",
    "scaled_mm",
]

#: What torch's functions call the same: _scaled_mm, _scaled_grouped_mm, and those of
#: torch.nn.functional.
_ALIASES = {
    "input": "a",
    "mat_a": "a",
    "mat2": "b",
    "mat_b": "b",
    "output_dtype": "out_dtype",
}
_MISSING: Any = object()
_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scaled_mm(
    a: Tensor = _MISSING,
    b: Tensor = _MISSING,
    scale_a: Tensor | None = _MISSING,
    scale_b: Tensor = _MISSING,
    *,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    use_fast_accum: bool = False,
    split_k: int = 1,
    **torch_names: Any,
) -> Tensor:
    """out = scale_a * scale_b * (a @ b) + bias, of e4m3 matrices with fp32 scales.

    An e4m3 output is scale_result times that, rounded to nearest even and saturated: what is beyond
    448, infinity too, becomes 448, NaN stays NaN. As in torch._scaled_mm scale_result multiplies.
    It is the inverse of the descale that the output has as an operand of the next product.

    Where a is of 16 bits, without scale_a, it is quantized by 1x128 in the product: the result has
    the bits of `scaled_mm` of `quantize(a, "1x128")`. Up to 64 rows that is one kernel.

    The scales say by their shapes what has one of its own:

    | | scale_a | scale_b |
    |---|---|---|
    | tensor | one element | one element |
    | row of a, column of b | (M, 1) | (1, N) |
    | 1x128 by 128x128 | (M, ceil(K / 128)) | (ceil(K / 128), ceil(N / 128)) |
    | 128x128 by 128x128 | (ceil(M / 128), ceil(K / 128)) | likewise |

    A tensor's scale goes with a row's too. Scales may have any strides, and any values: NaN and
    infinities show in the output. They are what `flash8.fp8` calls descales: x ~ scale * x_fp8.

    Products of 128 of K are added up by the tensor core, whose accumulator has 14 bits, and then
    added to a sum in fp32, with scales of blocks times these. The method is that of DeepSeek-V3
    (arXiv 2412.19437, 3.3.2). `use_fast_accum` leaves all of K to the tensor core: faster, and less
    exact the longer K is.

    `split_k` cuts the K of up to 64 rows into so many ranges, which a kernel multiplies at a time:
    for an N that is too small to keep the device busy. Partial sums are added in the order of K,
    so a call has the same bits every time, and a row's do not depend on the other rows. But they
    are not those of an unsplit sum, which more than 64 rows always have. Without it a row's bits
    do not depend on M at all.

    Args:
        a: e4m3 (M, K), row-major: K contiguous. K is a multiple of 16. Or bf16 or fp16, without
            scale_a.
        b: e4m3 (K, N), column-major: K contiguous, as `weight.t()` of a weight (N, K).
        scale_a: fp32, as in the table; None or left out with an a of 16 bits, where scale_b is by
            128x128.
        scale_b: fp32, as in the table.
        bias: (N,), bf16, fp16 or fp32.
        scale_result: fp32, one element, for an e4m3 output only; 1 without it.
        out_dtype: torch.bfloat16 (the default), float16, float32 or float8_e4m3fn; that of `out` if
            it is given.
        out: (M, N), written and returned. Its rows are contiguous.
        use_fast_accum: As above; not with scales of blocks.
        split_k: 1, 2, 4 or 8 ranges of K. 0: as many as pay, by N, K and the number of the
            device's multiprocessors. More than 1 not with use_fast_accum.
        torch_names: `input`, `mat_a`, `mat2`, `mat_b`, `output_dtype`: torch's names for a, b and
            out_dtype.

    Returns:
        (M, N), of out_dtype. Without a derivative.

    Raises:
        TypeError: A dtype is not supported, or an argument is missing, unknown or given twice.
        ValueError: A shape, stride or device is not supported.
        RuntimeError: An input requires grad, or a CUDA graph is captured before the kernel's check.
    """
    if torch_names:
        a, b, out_dtype = _by_own_names("scaled_mm", torch_names, a, b, out_dtype)
    if scale_a is _MISSING and call.is_quantized_inside(a):
        scale_a = None
    options = bias, scale_result, out_dtype, out, use_fast_accum, split_k
    arguments = plans.arguments_of(a, b, scale_a, scale_b, *options)
    if arguments is not None and (found := plans.find(arguments)) is not None:
        return found
    _require_given("scaled_mm", a=a, b=b, scale_a=scale_a, scale_b=scale_b)
    product = call.check(a, b, scale_a, scale_b, *options)
    if out is not None:
        call.check_out(out, product)
    if arguments is not None and (found := plans.launch(arguments, product, out)) is not None:
        return found
    return ops.scaled_mm(product, out)


def grouped_scaled_mm(
    a: Tensor = _MISSING,
    b: Tensor = _MISSING,
    scale_a: Tensor = _MISSING,
    scale_b: Tensor = _MISSING,
    offs: Tensor | None = None,
    *,
    masked_m: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    use_fast_accum: bool = False,
    **torch_names: Any,
) -> Tensor:
    """out = scale_a * scale_b * (a @ b of the row's group): a layer of a mixture of experts. Or,
    with groups along K, out[g] = scale_a * scale_b * (a @ b over the group's K): the gradients of
    its weights.

    How much a group has stays on the device: nobody waits for it. Its bits are those that
    `scaled_mm` of the group gives. With G groups there are

    | | a, b, out | group g has |
    |---|---|---|
    | rows, one group after another | (M, K), (G, K, N), (M, N) | rows offs[g - 1] up to offs[g] |
    | rows, apart | (G, rows, K), (G, K, N), (G, rows, N) | rows 0 up to masked_m[g] of a[g] |
    | K, one group after another | (M, K), (K, N), (G, M, N) | of K, offs[g - 1] up to offs[g] |

    The first group begins at 0. Groups have any number of rows, or any part of K, none too. Rows of
    `out` from the last offset on are zeros, and so is out[g] without any K. Of groups that lie
    apart the rows that they do not have are not computed: in `out` they are left as they are, in a
    new tensor they are undefined.

    The indices are not looked at before they are used. One below zero or beyond the rows, or K,
    counts as the nearest that there is, and an offset below one before it as the largest of these.

    | scales by | scale_a | scale_b |
    |---|---|---|
    | tensor | one element | one element |
    | group | (G, 1, 1) | (G, 1, 1) |
    | row of a, column of b | (M,), (M, 1); (G, rows), (G, rows, 1) | (G, N), (G, 1, N) |
    | the same along K | (G * M,), (G, M, 1) | (G * N,), (G, 1, N) |
    | 1x128 by 128x128 | (M, k); (G, rows, k) | (G, k, ceil(N / 128)) |
    | the same along K | (M, k) | (k, ceil(N / 128)) |

    k is ceil(K / 128). Those by tensor, group, row and column go with one another. Along K blocks
    are those of all of K, wherever groups begin. Scales may have any strides, and any values.

    Args:
        a: e4m3, row-major: K contiguous. K is a multiple of 16.
        b: e4m3, column-major: K contiguous, as `weights.transpose(1, 2)` of (G, N, K).
        scale_a: fp32, as in the table.
        scale_b: fp32, as in the table.
        offs: int32 or int64 (G,), with `a` of 2 dimensions: where the rows, or K, of groups end.
        masked_m: int32 or int64 (G,), with `a` of 3 dimensions: how many rows each group has.
        out_dtype: torch.bfloat16 (the default), float16 or float32; that of `out` if it is given.
        out: Written and returned. Its rows are contiguous; with masked_m or along K all of it is.
        use_fast_accum: As in `scaled_mm`; not with scales of blocks.
        torch_names: `input`, `mat_a`, `mat2`, `mat_b`, `output_dtype`: torch's names for a, b and
            out_dtype. `bias` and `scale_result` may be None.

    Returns:
        (M, N), (G, rows, N) or (G, M, N), of out_dtype. Without a derivative.

    Raises:
        TypeError: A dtype is not supported, or an argument is missing, unknown or given twice.
        ValueError: A shape, stride or device is not supported.
        RuntimeError: An input requires grad, or a CUDA graph is captured before the kernel's check.
    """
    for name in ("bias", "scale_result"):
        if torch_names.pop(name, None) is not None:
            raise ValueError(f"{name} must be None: grouped products have none")
    if torch_names:
        a, b, out_dtype = _by_own_names("grouped_scaled_mm", torch_names, a, b, out_dtype)
    options = offs, masked_m, out_dtype, out, use_fast_accum
    arguments = grouped_plans.arguments_of(a, b, scale_a, scale_b, *options)
    if arguments is not None and (found := grouped_plans.find(arguments)) is not None:
        return found
    _require_given("grouped_scaled_mm", a=a, b=b, scale_a=scale_a, scale_b=scale_b)
    product = grouped_call.check(a, b, scale_a, scale_b, *options)
    if out is not None:
        grouped_call.check_out(out, product)
    if arguments is not None:
        found = grouped_plans.launch(arguments, product, out)
        if found is not None:
            return found
    return grouped_ops.grouped_scaled_mm(product, out)


def _by_own_names(
    function: str, torch_names: dict[str, Any], a: Any, b: Any, out_dtype: Any
) -> tuple[Any, Any, Any]:
    """a, b and out_dtype."""
    given: dict[str, Any] = {"a": a, "b": b}
    given["out_dtype"] = _MISSING if out_dtype is None else out_dtype
    for name, value in torch_names.items():
        meant = _ALIASES.get(name)
        if meant is None:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if given[meant] is not _MISSING:
            raise TypeError(f"{meant} and {name} are one argument: give one of them, not both")
        given[meant] = value
    wanted = None if given["out_dtype"] is _MISSING else given["out_dtype"]
    return given["a"], given["b"], wanted


def _require_given(function: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is _MISSING:
            raise TypeError(f"{function}() is missing the argument {name!r}")


def quantize(x: Tensor, granularity: str = "tensor") -> tuple[Tensor, Tensor]:
    """x ~ scale * data: a matrix as an operand of `scaled_mm`, (data, scale) as a and scale_a.

    A weight (N, K) is the other operand: its data.t() and scale.t() are b and scale_b, by "tensor",
    "row" or "128x128".

    Args:
        x: (M, K), bf16, fp16 or fp32.
        granularity: what has a scale of its own: "tensor", "row", "1x128" or "128x128".

    Returns:
        data: e4m3 (M, K), K filled up with zeros to a multiple of 16. Infinity is 448, NaN stays.
        scale: fp32, amax / 448 of what is finite (1 where that is 0): (1, 1), (M, 1),
            (M, ceil(K / 128)) or (ceil(M / 128), ceil(K / 128)).
        Both without a derivative.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    _check_matrix("x", x)
    names = get_args(call.Granularity)
    if granularity not in names:
        raise ValueError(f"granularity must be one of {names}, got {granularity!r}")
    return quantizer.quantize_matrix(x, granularity)  # type: ignore[arg-type]


@overload
def quantize_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = ..., granularity: str = ..., residual: None = None
) -> tuple[Tensor, Tensor]: ...
@overload
def quantize_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = ..., granularity: str = ..., residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]: ...
def quantize_rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    granularity: str = "1x128",
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`quantize` of RMSNorm of the rows of x: h * (1 / sqrt(mean(h^2) + eps)) * weight.

    h is x, or with a residual x + residual, rounded to x's dtype. All else is fp32: what is
    normalised is not rounded to x's dtype before it is quantized.

    Args:
        x: (M, K), bf16, fp16 or fp32.
        weight: (K,), bf16, fp16 or fp32.
        eps: a finite number.
        granularity: what has a scale of its own: "row" or "1x128".
        residual: as x.

    Returns:
        data, scale: as of `quantize`.
        h: as x, a tensor of its own; only with a residual.
        All without a derivative.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    _check_matrix("x", x)
    require_tensor("weight", weight, _INPUT_DTYPES, x)
    require_shape("weight", weight, x.shape[1:], "(K,)")
    if residual is not None:
        _check_as("residual", residual, x)
    norm = Norm(weight, require_float("eps", eps))
    request = MatrixRequest(x, _checked(granularity), norm=norm, residual=residual)
    data, scale, summed = quantizer.quantize(request)
    return (data, scale) if residual is None else (data, scale, summed)


def quantize_silu_mul(
    gate: Tensor, up: Tensor, *, granularity: str = "1x128"
) -> tuple[Tensor, Tensor]:
    """`quantize` of silu(gate) * up, in fp32: not rounded to gate's dtype before it is quantized.

    Both may be halves of one matrix: `quantize_silu_mul(*gate_up.chunk(2, -1))` copies nothing.

    Args:
        gate: (M, K), bf16, fp16 or fp32.
        up: as gate.
        granularity: what has a scale of its own: "row" or "1x128".

    Returns:
        data, scale: as of `quantize`, without a derivative. A kernel's exponential is approximate:
            what is quantized is off by up to 2^-16 of it.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    _check_matrix("gate", gate)
    _check_as("up", up, gate)
    data, scale, _ = quantizer.quantize(MatrixRequest(gate, _checked(granularity), up=up))
    return data, scale


def _check_matrix(name: str, x: Tensor) -> None:
    require_tensor(name, x, _INPUT_DTYPES)
    require_rank(name, x, 2, "(M, K)")


def _check_as(name: str, other: Tensor, x: Tensor) -> None:
    require_tensor(name, other, x.dtype, x)
    require_shape(name, other, x.shape, "(M, K)")


def _checked(granularity: str) -> Any:
    if granularity not in ("row", "1x128"):
        raise ValueError(f"granularity must be 'row' or '1x128', got {granularity!r}")
    return granularity

"""One scaled matrix product of e4m3 matrices: its arguments, checked, and what its scales mean."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flash8.tensors.arguments import (
    describe,
    differ,
    is_known,
    require_bool,
    require_int,
    require_rank,
    require_shape,
    require_tensor,
)
from flash8.tensors.float8 import E4M3
from flash8.tensors.memory import is_shared, require_writable

#: What has a scale of its own: a tensor, a row of A or column of B, 128 of K of a row of A, or
#: 128 of K of 128 rows of A or columns of B.
Granularity = Literal["tensor", "row", "1x128", "128x128"]
BLOCK = 128
WIDE = (torch.bfloat16, torch.float16, torch.float32)
_QUANTIZED_INSIDE = (torch.bfloat16, torch.float16)
OUT_DTYPES = (*WIDE, E4M3)
#: How many parts K may be cut into.
SPLITS = (1, 2, 4, 8)
UNIT_K = 16  # K of a product is a multiple of it
MOST = 2**31 - 2**20


class Product(NamedTuple):
    """A checked call: out = scale_a * scale_b * (a @ b) + bias, times scale_result if there is one.

    a: (M, K), row-major; b: (K, N), column-major. The scales are fp32, and of any strides.
    scale_a: None where a is of 16 bits, and is to be quantized by 1x128.
    scale_result: one element, for an e4m3 output.
    split_k: how many partial sums there are where a has few rows, 0: as many as pay
        (`split_k.splits_of`).
    """

    a: Tensor
    b: Tensor
    scale_a: Tensor | None
    scale_b: Tensor
    bias: Tensor | None
    out_dtype: torch.dtype
    fast_accum: bool = False
    scale_result: Tensor | None = None
    split_k: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.a.shape[0], self.b.shape[1], self.a.shape[1]

    @property
    def given_scale_a(self) -> Tensor:
        """That of an e4m3 a."""
        if self.scale_a is None:
            raise ValueError("a is not quantized yet, and has no scale")
        return self.scale_a

    @property
    def has_blocks(self) -> bool:
        """Whether scales change along K, so that they are applied block by block."""
        if self.scale_a is None:
            return True
        found, _ = granularity(*self.sizes, self.scale_a.shape, self.scale_b.shape)
        return found in ("1x128", "128x128")

    @property
    def rows_per_scale(self) -> int:
        """Rows of A that share a scale, or the scales of all blocks of K."""
        if self.scale_a is None:
            return 1
        m, n, k = self.sizes
        found, _ = granularity(m, n, k, self.scale_a.shape, self.scale_b.shape)
        return {"tensor": max(1, m), "row": 1, "1x128": 1, "128x128": BLOCK}[found]


def blocks_of(size: int) -> int:
    return -(-size // BLOCK)


def granularity(
    m: int, n: int, k: int, shape_a: torch.Size, shape_b: torch.Size
) -> tuple[Granularity, Granularity]:
    """Of scale_a and of scale_b. Where shapes fit two meanings, both give the same product.

    Raises:
        ValueError: they fit none.
    """
    of_a: Granularity | None = None
    of_b: Granularity | None = None
    if is_known(shape_a.numel() == 1):
        of_a = "tensor"
    elif not differ(shape_a, (m, 1)):
        of_a = "row"
    if is_known(shape_b.numel() == 1):
        of_b = "tensor"
    elif not differ(shape_b, (1, n)):
        of_b = "row"
    if of_a is not None and of_b is not None:
        return of_a, of_b
    if not differ(shape_b, (blocks_of(k), blocks_of(n))):
        if not differ(shape_a, (m, blocks_of(k))):
            return "1x128", "128x128"
        if not differ(shape_a, (blocks_of(m), blocks_of(k))):
            return "128x128", "128x128"
    raise ValueError(
        f"scale_a and scale_b must have one element or shapes (M, 1) and (1, N) = {(m, 1)} and "
        f"{(1, n)}, or, by blocks, (M, ceil(K / 128)) = {(m, blocks_of(k))} or (ceil(M / 128), "
        f"ceil(K / 128)) = {(blocks_of(m), blocks_of(k))} and (ceil(K / 128), ceil(N / 128)) = "
        f"{(blocks_of(k), blocks_of(n))}, got {tuple(shape_a)} and {tuple(shape_b)}"
    )


def is_quantized_inside(a: Any) -> bool:
    """Whether a is of 16 bits: without a scale it is to be quantized."""
    return isinstance(a, Tensor) and a.dtype in _QUANTIZED_INSIDE


def check(
    a: Any,
    b: Any,
    scale_a: Any,
    scale_b: Any,
    bias: Any,
    scale_result: Any,
    out_dtype: Any,
    out: Any,
    use_fast_accum: Any,
    split_k: Any,
) -> Product:
    """Raises TypeError and ValueError, naming the argument, its value and what is supported."""
    quantizes = scale_a is None and is_quantized_inside(a)
    _check_matrices(a, b, _QUANTIZED_INSIDE if quantizes else E4M3)
    m, n = a.shape[0], b.shape[1]
    found: tuple[Granularity, Granularity]
    require_tensor("scale_b", scale_b, torch.float32, a)
    if quantizes:
        shape = blocks_of(a.shape[1]), blocks_of(n)
        require_shape("scale_b", scale_b, shape, "(ceil(K / 128), ceil(N / 128)) without scale_a")
        found = "1x128", "128x128"
    else:
        require_tensor("scale_a", scale_a, torch.float32, a)
        found = granularity(m, n, a.shape[1], scale_a.shape, scale_b.shape)
    fast = require_bool("use_fast_accum", use_fast_accum)
    if fast and "128x128" in found:
        raise ValueError(
            "use_fast_accum must be False with scales of blocks, which are applied when a block "
            "is added to the sum"
        )
    splits = _check_split_k(split_k, fast)
    if bias is not None:
        require_tensor("bias", bias, WIDE, a)
        require_shape("bias", bias, (n,), "(N,)")
    dtype = _out_dtype(out_dtype, out)
    if scale_result is not None:
        _check_scale_result(scale_result, dtype, a)
    return Product(a, b, scale_a, scale_b, bias, dtype, fast, scale_result, splits)


def check_out(out: Any, product: Product) -> None:
    m, n, _ = product.sizes
    require_tensor("out", out, product.out_dtype, product.a)
    require_shape("out", out, (m, n), "(M, N)")
    require_writable("out", out)
    inputs = [x for x in product if isinstance(x, Tensor)]
    if not torch.compiler.is_compiling() and is_shared(out, inputs):
        raise ValueError("out must not share memory with an input")


def _check_matrices(a: Any, b: Any, dtypes: torch.dtype | tuple[torch.dtype, ...]) -> None:
    require_tensor("a", a, dtypes)
    require_tensor("b", b, E4M3, a)
    require_rank("a", a, 2, "(M, K)")
    require_rank("b", b, 2, "(K, N)")
    k = a.shape[1]
    if differ(b.shape[:1], (k,)):
        raise ValueError(
            f"b must have as many rows as a has columns, K = {k}, got shape {tuple(b.shape)}"
        )
    if k % UNIT_K != 0:
        raise ValueError(f"K, the columns of a, must be a multiple of {UNIT_K}, got {k}")
    if any(is_known(size > MOST) for size in (*a.shape, *b.shape)):
        raise ValueError(
            f"M, N and K must be at most {MOST}, got {a.shape[0]}, {b.shape[1]} and {k}"
        )
    if k > 1 and a.stride(1) != 1:
        raise ValueError(
            f"a must be row-major, its K contiguous, got strides {a.stride()}: call .contiguous()"
        )
    if k > 1 and b.stride(0) != 1:
        raise ValueError(
            f"b must be column-major, its K contiguous, got strides {b.stride()}: pass "
            "weight.t() of a contiguous weight (N, K), or b.t().contiguous().t()"
        )


def _check_scale_result(scale_result: Any, out_dtype: torch.dtype, a: Tensor) -> None:
    require_tensor("scale_result", scale_result, torch.float32, a)
    if scale_result.numel() != 1:
        raise ValueError(
            f"scale_result must have one element, got shape {tuple(scale_result.shape)}"
        )
    if out_dtype != E4M3:
        raise ValueError(
            f"scale_result goes with out_dtype={E4M3}, got {out_dtype}: torch would ignore it"
        )


def _check_split_k(split_k: Any, fast: bool) -> int:
    number = require_int("split_k", split_k, minimum=0, maximum=max(SPLITS))
    if number not in (0, *SPLITS):
        raise ValueError(f"split_k must be one of {SPLITS}, or 0: as many as pay, got {number}")
    if fast and number > 1:
        raise ValueError(
            f"split_k must be 0 or 1 with use_fast_accum, whose sum is the tensor core's over all "
            f"of K, got {number}"
        )
    return number


def _out_dtype(out_dtype: Any, out: Any) -> torch.dtype:
    if out_dtype is None and isinstance(out, Tensor):
        return require_tensor("out", out, OUT_DTYPES).dtype
    if out_dtype is None:
        return torch.bfloat16
    if out_dtype not in OUT_DTYPES:
        names = " or ".join(str(dtype) for dtype in OUT_DTYPES)
        raise TypeError(f"out_dtype must be {names}, got {describe(out_dtype)}")
    return out_dtype  # type: ignore[no-any-return]

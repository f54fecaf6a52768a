"""Hopper's FP8 matrix product, bit by bit.

A WGMMA adds 32 products to the accumulator C at a time. With E the largest exponent among the
products (e_a + e_b, of the operands as given) and C, everything is truncated toward zero to a
multiple of 2^(E - 13), summed exactly, and the sum is truncated to 13 bits of mantissa. So reported
and measured by microsoft/MMA-Sim; nothing below is an approximation of it.

Operands are e4m3 or e5m2 values held in fp32, where each of these steps is exact: a product has 8
bits, and in units of 2^(E - 13) the sum stays below 2^21.
"""

import torch
from torch import Tensor

from flash8.tensors.float8 import E4M3, E5M2

Dtypes = tuple[torch.dtype, torch.dtype]

K_STEP = 32  # contraction of one instruction
_FRACTION_BITS = 13
_EXPONENT_MASK = 0x7F800000
_RESULT_MASK = -1 << (23 - _FRACTION_BITS)
#: Stands in for the exponent of "all products are zero"; below every product of two float8 values.
_TINY = 2.0**-100
#: Subnormal operands have the exponent of the smallest normal number.
_SMALLEST_NORMAL = {E4M3: 2.0**-6, E5M2: 2.0**-14}
#: Elements of a block of products: it stays in cache.
_PRODUCTS = 1 << 17


def matmul(a: Tensor, b: Tensor, c: Tensor | None = None, dtypes: Dtypes = (E4M3, E4M3)) -> Tensor:
    """c + a @ b in the arithmetic of the tensor cores.

    a: fp32 (..., M, K), b: fp32 (..., K, N), holding values of the float8 `dtypes`; c: fp32
    (..., M, N), None: 0. K is cut into steps of 32 from its start.
    """
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    result = a.new_zeros((*batch, a.shape[-2], b.shape[-1]))
    if c is not None:
        result.copy_(c)
    flat = result.view(-1, *result.shape[-2:])
    a = a.expand(*batch, *a.shape[-2:]).reshape(-1, *a.shape[-2:])
    b = b.expand(*batch, *b.shape[-2:]).reshape(-1, *b.shape[-2:])
    for a_matrix, b_matrix, c_matrix in zip(a, b, flat, strict=True):
        _accumulate(a_matrix, b_matrix, c_matrix, dtypes)
    return result


def _accumulate(a: Tensor, b: Tensor, c: Tensor, dtypes: Dtypes) -> None:
    """c += a @ b for one (M, K) and (K, N), in place."""
    rows = max(1, _PRODUCTS // (K_STEP * b.shape[-1]))
    a_exponents = _operand_exponents(a, dtypes[0])
    b_exponents = _operand_exponents(b, dtypes[1])
    for start in range(0, a.shape[-1], K_STEP):
        step = slice(start, start + K_STEP)
        b_step, b_top = b[step], b_exponents[step]
        for begin in range(0, a.shape[0], rows):
            m = slice(begin, begin + rows)
            top = (a_exponents[m, step, None] * b_top).amax(dim=1)
            _add_step(c[m], a[m, step, None] * b_step, top)


def _add_step(c: Tensor, products: Tensor, top: Tensor) -> None:
    """One instruction: c (M, N) plus products (M, K_STEP, N), whose largest exponent is `top`."""
    top = torch.maximum(top, _exponent(c)).clamp_min_(_TINY)
    unit = top * 2.0**-_FRACTION_BITS
    inverse = unit.reciprocal()
    total = products.mul_(inverse[:, None]).trunc_().sum(dim=1)
    total += (c * inverse).trunc_()
    c.copy_(_truncated(total.mul_(unit)))


def _exponent(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), 0 for 0, inf for NaN and infinities."""
    return (x.contiguous().view(torch.int32) & _EXPONENT_MASK).view(torch.float32)


def _operand_exponents(x: Tensor, dtype: torch.dtype) -> Tensor:
    exponent, smallest = _exponent(x), _SMALLEST_NORMAL[dtype]
    return torch.where((exponent > 0) & (exponent < smallest), smallest, exponent)


def _truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & _RESULT_MASK).view(torch.float32)

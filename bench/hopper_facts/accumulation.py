"""The model of Hopper's WGMMA accumulation that the hardware is asked to confirm.

Per k-step: E is the largest exponent among the products (e_a + e_b) and C; every product and C is
truncated toward zero to a multiple of 2^(E - bits); the sum is exact; the result is written back
with `bits` mantissa bits, rounded toward zero (FP8: 13; BF16: 25, then fp32 toward zero).
Everything is done with Python integers and fractions of powers of two: slow and exact.
"""

import math
from collections.abc import Iterable

import numpy as np

FP8_BITS = 13
BF16_BITS = 25
_FP32_BITS = 23


def step(a: np.ndarray, b: np.ndarray, c: np.ndarray, bits: int) -> np.ndarray:
    """c + a b^T for one k-step. a (M, K), b (N, K), c (M, N), all finite, as float64."""
    rows, columns, sums = a.tolist(), b.tolist(), c.tolist()
    return np.array(
        [
            [_dot(x, y, start, bits) for y, start in zip(columns, starts, strict=True)]
            for x, starts in zip(rows, sums, strict=True)
        ]
    )


def _dot(a: Iterable[float], b: Iterable[float], c: float, bits: int) -> float:
    factors = [(x, y) for x, y in zip(a, b, strict=True) if x != 0.0 and y != 0.0]
    # The exponent of a product is the sum of its factors' exponents, whatever the mantissas give.
    exponents = [_exponent(x) + _exponent(y) for x, y in factors]
    terms = [x * y for x, y in factors]
    if c != 0.0:
        exponents.append(_exponent(c))
        terms.append(c)
    if not terms:
        return 0.0
    unit = 2.0 ** (max(exponents) - bits)
    total = sum(math.trunc(term / unit) for term in terms)
    return _truncate(total, unit, min(bits, _FP32_BITS))


def _exponent(x: float) -> int:
    return math.frexp(x)[1] - 1


def _truncate(total: int, unit: float, mantissa_bits: int) -> float:
    """total * unit with `mantissa_bits` bits behind the leading one, toward zero."""
    excess = abs(total).bit_length() - 1 - mantissa_bits
    if excess > 0:
        magnitude = (abs(total) >> excess) << excess
        total = magnitude if total > 0 else -magnitude
    return total * unit

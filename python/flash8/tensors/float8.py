"""The two 8-bit floating point types, and the one way this package casts to them."""

import functools

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
#: The largest finite values.
MAX = {E4M3: 448.0, E5M2: 57344.0}
#: The smallest normal number and the bits of the mantissa.
_FORMATS = {E4M3: (2.0**-6, 3), E5M2: (2.0**-14, 2)}
_EXPONENT_MASK = 0x7F800000


def saturating_cast(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x rounded to nearest even; beyond the range the largest finite value, NaN stays NaN.

    What `cvt.rn.satfinite` does. The clamp is explicit: a plain cast overflows differently from
    one release of PyTorch, and from one of the two types, to the next.
    """
    limit = MAX[dtype]
    return x.clamp(-limit, limit).to(dtype)


def rounded(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """`saturating_cast`, and back to x's fp32: the same values (a zero has no sign), in arithmetic
    that CPUs have vector instructions for."""
    smallest, mantissa_bits = _FORMATS[dtype]
    limit = MAX[dtype]
    x = x.clamp(-limit, limit)
    exponent = (x.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    # An fp32 sum with this number has the float8 type's last place for its own.
    shift = exponent.clamp_min_(smallest).mul_(1.5 * 2.0 ** (23 - mantissa_bits))
    return x.add_(shift).sub_(shift)


def widened(x: Tensor) -> Tensor:
    """float8 as fp32: looked up in a table, on CPUs much faster than the conversion."""
    table = _table(x.dtype, x.device)
    found = table.index_select(0, x.reshape(-1).view(torch.uint8).int())
    return found.view(x.shape)


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()

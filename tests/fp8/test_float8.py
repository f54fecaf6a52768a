"""Rounding to float8 and back in fp32 arithmetic, and the way back by a table."""

import pytest
import torch

from flash8.tensors.float8 import E4M3, E5M2, rounded, saturating_cast, widened


def same(a, b):
    return ((a == b) | (a.isnan() & b.isnan())).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounded_is_the_cast(dtype):
    """Of every sign, exponent and leading bits of the mantissa; the rest around each half."""
    tops = torch.arange(1 << 16) << 16
    rest = torch.tensor([0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (tops[:, None] + rest).flatten()
    x = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    assert same(rounded(x, dtype), saturating_cast(x, dtype).float())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_widened_is_the_conversion(dtype):
    x = torch.arange(256, dtype=torch.uint8).view(dtype).view(8, 32)
    assert same(widened(x), x.float())
    assert same(widened(x.T), x.T.float())

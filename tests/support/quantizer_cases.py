"""Tensors for the quantizer, and the comparison of what comes back, bit by bit."""

import torch
from torch import Tensor

from flash8 import fp8

ROPE_ROWS = 400


def draw(*shape, dtype=torch.bfloat16, seed=0, scale=1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * scale).to(dtype)


def tables(rotary_dim: int, rows: int = ROPE_ROWS) -> tuple[Tensor, Tensor]:
    rates = 10000.0 ** -(torch.arange(rotary_dim // 2) / (rotary_dim / 2))
    angles = torch.arange(rows)[:, None] * rates
    return angles.cos(), angles.sin()


def tensors_of(options: dict) -> list[Tensor]:
    flat = [*options.values(), *(options.get("rope") or ())]
    return [x for x in flat if isinstance(x, Tensor)]


def raw(x: Tensor) -> Tensor:
    """The bytes of 8-bit data; one of the NaNs for all."""
    return torch.where(x.float().isnan(), 0x7F, x.view(torch.uint8))


def assert_equal(have: fp8.ScaledTensor, want: fp8.ScaledTensor) -> None:
    assert have.data.shape == want.data.shape and have.data.dtype == want.data.dtype
    assert torch.equal(raw(have.data), raw(want.data))
    assert torch.equal(have.descale, want.descale)
    assert (have.mean is None) == (want.mean is None)
    if want.mean is not None:
        assert torch.equal(have.mean, want.mean)
    assert (have.granularity, have.rotation, have.v_colmajor_tokens) == (
        want.granularity,
        want.rotation,
        want.v_colmajor_tokens,
    )


def ragged(sequences: int) -> tuple[int, ...]:
    """Lengths of which every third is 0, but not the last of 33 or 65."""
    return tuple((5 * i + 1) % 7 + 1 if i % 3 else 0 for i in range(sequences))

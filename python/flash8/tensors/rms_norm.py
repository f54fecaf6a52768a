"""RMSNorm of the heads of Q and K (Zhang and Sennrich, 1910.07467), as Qwen3 and Gemma 3 have it.

Plain torch operations: they trace, and run on any device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_GROUP = 8  # channels of a thread of the appending kernel


class Norm(NamedTuple):
    """RMSNorm over head_dim."""

    weight: Tensor  # (head_dim,)
    eps: float


def norm_of(weight: Tensor | None, eps: float) -> Norm | None:
    """The norm that has this weight, if any."""
    return None if weight is None else Norm(weight, eps)


def rms_norm(x: Tensor, norm: Norm, group: int = _GROUP) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, of the last dimension, in fp32 (fp64 for fp64 x).

    The sum is that of the kernels, to the bit: of every `group`-th channel in turn, then by pairs.
    `group` is a power of two, by default that of the appending kernel.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, channels = x.to(compute), x.shape[-1]
    squares = torch.nn.functional.pad(x * x, (0, -channels % group)).unflatten(-1, (-1, group))
    total = squares[..., 0, :]
    for i in range(1, squares.shape[-2]):
        total = total + squares[..., i, :]
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    mean = total * torch.full((), channels, dtype=compute, device=x.device).reciprocal()
    # torch's root of fp32 may be off by its last bit on a CPU.
    root = (mean + norm.eps).double().sqrt().to(compute)
    normalised: Tensor = x * root.reciprocal() * norm.weight.to(compute)
    return normalised

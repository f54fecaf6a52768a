"""Rotation of heads by a randomised Hadamard matrix, which spreads outliers over all channels.

x -> x M with M = diag(signs) H / sqrt(n), M M^T = I, so (q M) . (k M) = q . k: exact before
rounding (QuaRot, arXiv 2404.00456; FlashAttention-3's incoherent processing). n is the largest
power of two that divides the head dimension; a head of 96 is rotated in three blocks of 32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash8.tensors.arguments import describe, require_int
from flash8.tensors.philox import MASK32, philox

#: A smaller block would spread an outlier over too few channels to be worth its time.
MIN_BLOCK = 8


@dataclass(frozen=True)
class Rotation:
    """The rotation of heads of `head_dim` elements that `seed` determines.

    Raises ValueError for a head_dim that is not a multiple of 8.
    """

    head_dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        require_int("seed", self.seed, minimum=0, maximum=2**63 - 1)
        if self.head_dim % MIN_BLOCK != 0:
            raise ValueError(
                f"hadamard needs a head_dim that is a multiple of {MIN_BLOCK} (a power of two is "
                f"rotated whole, others in power-of-two blocks), got {self.head_dim}"
            )

    @property
    def block(self) -> int:
        """Elements that are rotated together."""
        return self.head_dim & -self.head_dim

    def signs(self, device: torch.device) -> Tensor:
        """fp32 (head_dim,) of +1 and -1: bit 0 of the first word of Philox4x32-7 at counter
        (i, 0, 0, 0), key the low and high half of the seed."""
        index = torch.arange(self.head_dim, device=device)
        zero = torch.zeros_like(index)
        key = (self.seed & MASK32, self.seed >> 32)
        word = philox((index, zero, zero, zero), key)[0]
        return 1.0 - 2.0 * (word & 1).float()

    def apply(self, x: Tensor) -> Tensor:
        """x M for x (..., head_dim) in fp32 or fp64. Differentiable."""
        return self._transform(x * self.signs(x.device).to(x.dtype))

    def invert(self, x: Tensor) -> Tensor:
        """x M^T, the inverse of `apply`."""
        return self._transform(x) * self.signs(x.device).to(x.dtype)

    def _transform(self, x: Tensor) -> Tensor:
        """x H / sqrt(block), H symmetric, by log2(block) rounds of sums and differences."""
        y = x.unflatten(-1, (-1, self.block))
        size = 1
        while size < self.block:
            pairs = y.unflatten(-1, (-1, 2, size))
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            y = torch.stack((first + second, first - second), dim=-2).flatten(-3)
            size *= 2
        rotated: Tensor = (y * self.block**-0.5).flatten(-2)
        return rotated


def rotation_for(hadamard: Any, head_dim: int) -> Rotation | None:
    """None or False: none. True: seed 0. An int: that seed. A Rotation: itself, if it fits."""
    if hadamard is None or hadamard is False:
        return None
    if hadamard is True:
        return Rotation(head_dim)
    if isinstance(hadamard, int):
        return Rotation(head_dim, hadamard)
    if not isinstance(hadamard, Rotation):
        raise TypeError(
            f"hadamard must be a bool, an int seed or a Rotation, got {describe(hadamard)}"
        )
    if hadamard.head_dim != head_dim:
        raise ValueError(f"hadamard must be a rotation of head_dim {head_dim}, got {hadamard}")
    return hadamard

"""Matrices to e4m3 in plain torch operations: any device, traceable."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash8.backends.cpu.quantize import descale_of
from flash8.call.scaled_mm import BLOCK, blocks_of
from flash8.tensors.float8 import saturating_cast

#: What has a scale of its own.
MatrixGranularity = Literal["tensor", "row", "1x128", "128x128"]


def quantize_matrix(
    x: Tensor,
    granularity: MatrixGranularity,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (M, K) as e4m3, and its fp32 scales: (1, 1), (M, 1), (M, ceil(K / 128)), or (ceil(M / 128),
    ceil(K / 128)).

    scale: a given one of the tensor. amax: fp32 (), raised to the largest finite |x|.
    """
    y = x.float()
    if amax is not None:
        amax.copy_(torch.maximum(amax, pad(_finite(y).flatten(), (0, 1)).amax()))
    if granularity in ("tensor", "row"):
        if scale is None:
            found = pad(_finite(y), (0, 1)).amax(1, keepdim=True)
            if granularity == "tensor":
                found = pad(found, (0, 0, 0, 1)).amax(0, keepdim=True)
            scale = descale_of(found)
        return saturating_cast(y * scale.reciprocal()), scale
    m, k = x.shape
    height = BLOCK if granularity == "128x128" else 1
    rows, columns = blocks_of(m) if height == BLOCK else m, blocks_of(k)
    blocks = pad(y, (0, columns * BLOCK - k, 0, rows * height - m))
    blocks = blocks.view(rows, height, columns, BLOCK)
    scale = descale_of(_finite(blocks).amax((1, 3)))
    data = saturating_cast(blocks * scale.reciprocal()[:, None, :, None])
    return data.view(rows * height, columns * BLOCK)[:m, :k], scale


def _finite(x: Tensor) -> Tensor:
    """The magnitudes of what is finite."""
    return torch.where(x.isfinite(), x.abs(), 0.0)

"""Matrices to e4m3 in plain torch operations: any device, traceable."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash8.backends.cpu.quantize import descale_of
from flash8.call.request import MatrixRequest
from flash8.call.scaled_mm import BLOCK, UNIT_K, blocks_of
from flash8.tensors.float8 import saturating_cast
from flash8.tensors.rms_norm import rms_norm

_CHUNK = 16  # columns of a thread of the kernel, at a time


def quantize_matrix(request: MatrixRequest) -> tuple[Tensor, Tensor, Tensor]:
    """(M, K) as e4m3, K filled up with zeros to a multiple of 16, its fp32 scales: (1, 1), (M, 1),
    (M, ceil(K / 128)), or (ceil(M / 128), ceil(K / 128)), and x + residual, (0,) without one."""
    y, summed = _prepared(request)
    y = y.contiguous()  # K of an operand is contiguous, however x lies
    missing = -y.shape[1] % UNIT_K
    y = pad(y, (0, missing)) if missing else y
    granularity, scale, amax = request.granularity, request.scale, request.amax
    if amax is not None:
        amax.copy_(torch.maximum(amax, pad(_finite(y).flatten(), (0, 1)).amax()))
    if granularity in ("tensor", "row"):
        if scale is None:
            found = pad(_finite(y), (0, 1)).amax(1, keepdim=True)
            if granularity == "tensor":
                found = pad(found, (0, 0, 0, 1)).amax(0, keepdim=True)
            scale = descale_of(found)
        return saturating_cast(y * scale.reciprocal()), scale, summed
    m, k = y.shape
    height = BLOCK if granularity == "128x128" else 1
    rows, columns = blocks_of(m) if height == BLOCK else m, blocks_of(k)
    blocks = pad(y, (0, columns * BLOCK - k, 0, rows * height - m))
    blocks = blocks.view(rows, height, columns, BLOCK)
    scale = descale_of(_finite(blocks).amax((1, 3)))
    data = saturating_cast(blocks * scale.reciprocal()[:, None, :, None])
    return data.view(rows * height, columns * BLOCK)[:m, :k], scale, summed


def _prepared(request: MatrixRequest) -> tuple[Tensor, Tensor]:
    """What is quantized, in fp32, and x + residual in x's type."""
    x, summed = request.x, request.x.new_empty((0,))
    if request.up is not None:
        gate = x.float()
        return gate / (1.0 + (-gate).exp()) * request.up.float(), summed
    if request.residual is not None:
        x = summed = (x.float() + request.residual.float()).to(x.dtype)
    if request.norm is not None and x.shape[1] > 0:
        return rms_norm(x, request.norm, _CHUNK * request.row_threads), summed
    return x.float(), summed


def _finite(x: Tensor) -> Tensor:
    """The magnitudes of what is finite."""
    return torch.where(x.isfinite(), x.abs(), 0.0)

"""Matrices to e4m3, as operands of `flash8::scaled_mm`: on the quantizer's kernels where they have
the granularity.

To them 128 columns of a matrix are a head and its rows the tokens of one sequence: a block of 128
tokens of a head is a block of 128x128. Scales by row and by 1x128 are made by torch operations,
which torch.compile fuses.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash8 import backends
from flash8.backends.cpu.quantize_matrix import MatrixGranularity
from flash8.backends.cpu.quantize_matrix import quantize_matrix as portable
from flash8.backends.hopper import quantize as quantizer
from flash8.call.request import Request
from flash8.call.scaled_mm import BLOCK
from flash8.ops import quantize as kernels

UNIT_K = 16  # K of a product is a multiple of it


def quantize_matrix(
    x: Tensor,
    granularity: MatrixGranularity,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `backends.cpu.quantize_matrix`, but that K is filled up with zeros to a multiple of 16.
    Nothing is differentiated."""
    with torch.no_grad():
        x = x.detach()
        missing = -x.shape[1] % UNIT_K
        x = pad(x, (0, missing)) if missing else x
        request = _request(x, granularity, scale, amax)
        if request is None:
            return portable(x, granularity, scale, amax)
        data, descale, _ = kernels.quantize(request)
        if scale is None:
            scale = descale.view(1, 1) if granularity == "tensor" else descale[0].t()
        return data.view(x.shape), scale


def transposed(x: Tensor, columns: int) -> Tensor:
    """(columns, M filled up with zeros) of e4m3 x (M, at least `columns`), contiguous."""
    turned = x.view(torch.uint8)[:, :columns].t()
    missing = -x.shape[0] % UNIT_K
    turned = pad(turned, (0, missing)) if missing else turned
    return turned.contiguous().view(x.dtype)


def _request(
    x: Tensor, granularity: MatrixGranularity, scale: Tensor | None, amax: Tensor | None
) -> Request | None:
    """For the quantizer's kernels; None where they do not serve it."""
    if granularity not in ("tensor", "128x128") or not backends.kernels_wanted(x):
        return None
    width = BLOCK if granularity == "128x128" else math.gcd(x.shape[1], BLOCK)
    if width < UNIT_K or x.shape[1] % width != 0:
        return None
    request = Request(
        x=x.unflatten(1, (-1, width))[None],
        granularity="block" if granularity == "128x128" else "tensor",
        descale=None if scale is None else scale.view(()),
        amax=amax,
    )
    return request if quantizer.refusal(request) is None else None

"""Matrices to e4m3, as operands of `flash8::scaled_mm`: on kernels where they have the granularity.

Scales by row and by 1x128 have a kernel of their own, behind `flash8::quantize_matrix`. It is
traced as it is; whether the kernel is trusted is asked when it runs. To the attention's quantizer
128 columns of a matrix are a head and its rows the tokens of one sequence: a block of 128 tokens of
a head is a block of 128x128. What has no kernel is made by torch operations, which torch.compile
fuses.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash8 import backends
from flash8.backends.cpu.quantize_matrix import quantize_matrix as portable
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper import quantize_matrix as hopper
from flash8.backends.hopper.verify import trust
from flash8.call.autocast import unaffected
from flash8.call.request import MatrixRequest, Request
from flash8.call.scaled_mm import BLOCK, UNIT_K, Granularity
from flash8.ops import quantize as kernels
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import norm_of

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "quantize_matrix(Tensor x, str granularity, Tensor? up, Tensor? weight, float eps, "
    "Tensor? residual) -> (Tensor, Tensor, Tensor)"
)


def quantize_matrix(
    x: Tensor,
    granularity: Granularity,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Data and scales of a `MatrixRequest` of these."""
    data, scale, _ = quantize(MatrixRequest(x, granularity, scale, amax))
    return data, scale


def quantize(request: MatrixRequest) -> tuple[Tensor, Tensor, Tensor]:
    """As `backends.cpu.quantize_matrix`. Nothing is differentiated."""
    with torch.no_grad():
        request = _detached(request)
        if not backends.kernels_wanted(request.x):
            return portable(request)
        if hopper.refusal(request) is None:
            norm = (None, 0.0) if request.norm is None else request.norm
            found: tuple[Tensor, Tensor, Tensor] = torch.ops.flash8.quantize_matrix(
                request.x, request.granularity, request.up, *norm, request.residual
            )
            return found
        heads = _as_heads(request)
        if heads is None:
            return portable(request)
        data, descale, _ = kernels.quantize(heads)
        scale = request.scale
        if scale is None:
            by_tensor = request.granularity == "tensor"
            scale = descale.view(1, 1) if by_tensor else descale[0].t()
        return data.view(request.data_shape), scale, request.x.new_empty((0,))


def _detached(request: MatrixRequest) -> MatrixRequest:
    norm, up, residual = request.norm, request.up, request.residual
    return request._replace(
        x=request.x.detach(),
        up=None if up is None else up.detach(),
        norm=None if norm is None else norm._replace(weight=norm.weight.detach()),
        residual=None if residual is None else residual.detach(),
    )


def transposed(x: Tensor, columns: int) -> Tensor:
    """(columns, M filled up with zeros) of e4m3 x (M, at least `columns`), contiguous."""
    turned = x.view(torch.uint8)[:, :columns].t()
    missing = -x.shape[0] % UNIT_K
    turned = pad(turned, (0, missing)) if missing else turned
    return turned.contiguous().view(x.dtype)


def _as_heads(request: MatrixRequest) -> Request | None:
    """For the attention's quantizer; None where it does not serve it."""
    if request.granularity not in ("tensor", "128x128"):
        return None
    x, columns = request.x, request.data_shape[1]
    width = BLOCK if request.granularity == "128x128" else math.gcd(columns, BLOCK)
    if width < UNIT_K or columns % width != 0:
        return None
    x = pad(x, (0, columns - x.shape[1])) if columns != x.shape[1] else x
    heads = Request(
        x=x.unflatten(1, (-1, width))[None],
        granularity="block" if request.granularity == "128x128" else "tensor",
        descale=None if request.scale is None else request.scale.view(()),
        amax=request.amax,
    )
    return heads if quantizer.refusal(heads) is None else None


def _quantize_matrix(
    x: Tensor,
    granularity: Granularity,
    up: Tensor | None,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    request = MatrixRequest(x, granularity, up=up, norm=norm_of(weight, eps), residual=residual)
    if trust.is_trusted(hopper.variant(request), x.device):
        return hopper.quantize_matrix(request)
    data, scale, summed = portable(request)
    return data.contiguous(), scale.contiguous(), summed.contiguous()


def _quantize_matrix_fake(
    x: Tensor,
    granularity: Granularity,
    up: Tensor | None,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    request = MatrixRequest(x, granularity)
    return (
        x.new_empty(request.data_shape, dtype=E4M3),
        x.new_empty(request.scale_shape, dtype=torch.float32),
        x.new_empty((0,) if residual is None else x.shape),
    )


for _key in ("CPU", "CUDA"):
    _library.impl("quantize_matrix", unaffected(_quantize_matrix), _key)
torch.library.register_fake("flash8::quantize_matrix", _quantize_matrix_fake, lib=_library)

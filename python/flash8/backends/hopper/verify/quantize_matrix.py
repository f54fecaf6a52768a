"""A kernel that makes operands of products, against the portable code: bit by bit, but for
SiLU-multiply, whose exponential is approximate, against fp64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flash8.backends.cpu import quantize_matrix as portable
from flash8.backends.hopper import quantize_matrix as hopper
from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.request import MatrixRequest
from flash8.call.scaled_mm import BLOCK, Granularity
from flash8.tensors.float8 import E4M3, MAX
from flash8.tensors.rms_norm import Norm

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAN_BYTE = 0x7F
#: Of SiLU-multiply, relative: what the argument's rounding makes of exp where |gate| is up to 80.
SILU_TOLERANCE = 2.0**-16
_ROUNDING, _HALF_OF_SMALLEST = 2.0**-4, 2.0**-10  # of e4m3


def find_fault(variant: QuantizeMatrixVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for request in _Draw(variant, device).requests():
        fault = _fault(request)
        if fault is not None:
            return fault
    return None


def _fault(request: MatrixRequest) -> str | None:
    x = request.x
    have = (
        x.new_empty(request.data_shape, dtype=E4M3),
        x.new_empty(request.scale_shape, dtype=torch.float32),
        x.new_empty((0,) if request.residual is None else x.shape),
    )
    for filled in have:
        filled.view(-1).view(torch.uint8).fill_(_NAN_BYTE)
    watchdog = Watchdog(x.device)
    hopper.launch(request, *have)
    watchdog.wait()
    if request.up is not None:
        return silu_fault(request, have[0], have[1])
    want = portable.quantize_matrix(request)
    names = "bytes of the result", "scales", "bytes of x + residual"
    for name, a, b in zip(names, have, want, strict=True):
        a, b = (y.contiguous().view(torch.uint8) for y in (a, b))
        differ = int((a != b).sum())
        if differ:
            return f"{differ} of {a.numel()} {name} differ"
    return None


def silu_fault(request: MatrixRequest, data: Tensor, scale: Tensor) -> str | None:
    """What is wrong with SiLU-multiply of finite values, or None."""
    if request.up is None:
        raise ValueError("up is None; this compares SiLU-multiply")
    m, k = request.x.shape
    gate, up = request.x.double(), request.up.double()
    want = gate / (1.0 + (-gate).exp()) * up
    blocks = torch.nn.functional.pad(want, (0, -k % BLOCK)).view(m, -1, BLOCK).abs().amax(2)
    amax = blocks.amax(1, keepdim=True) if request.granularity == "row" else blocks
    off = (scale.double() * MAX[E4M3] - amax).abs()
    wrong = int((~(off <= SILU_TOLERANCE * amax)).sum())
    if wrong:
        return f"{wrong} of {scale.numel()} scales differ"
    wide = scale.double().expand(-1, blocks.shape[1]).repeat_interleave(BLOCK, 1)[:, :k]
    bound = (_ROUNDING + SILU_TOLERANCE) * want.abs() + _HALF_OF_SMALLEST * wide
    wrong = int((~((data[:, :k].float().double() * wide - want).abs() <= bound)).sum())
    wrong += int(data[:, k:].view(torch.uint8).count_nonzero())  # what K is filled up with
    return f"{wrong} of {data.numel()} values differ" if wrong else None


class _Draw:
    """Random matrices for a variant. They are drawn on the CPU: the same on every device."""

    def __init__(self, variant: QuantizeMatrixVariant, device: torch.device) -> None:
        self._variant, self._device = variant, device
        self._generator = torch.Generator("cpu").manual_seed(1)

    def requests(self) -> Iterator[MatrixRequest]:
        """Rows of 8 to 256 threads, the last ones longer than they hold; the end of a CTA's rows;
        by 16 bytes and by elements; as parts of wider matrices."""
        yield self._request(70, 200, "1x128")
        yield self._request(35, 333, "row")
        yield self._request(3, 2056, "row")
        yield self._request(3, 7168, "1x128")
        for granularity in ("row", "1x128"):
            yield self._request(2, 16520, granularity)

    def _request(self, m: int, k: int, granularity: Granularity) -> MatrixRequest:
        dtype = _DTYPES[self._variant.dtype]
        x, other = (self._normal(m, 2 * k) * 3.0).to(dtype).chunk(2, 1)
        if self._variant.prologue == "none":
            return MatrixRequest(x, granularity)
        if self._variant.prologue == "silu_mul":
            return MatrixRequest(x, granularity, up=other)
        weight = self._normal(k)
        by_row = granularity == "row"
        norm = Norm(weight if by_row else weight.to(dtype), 1e-5)
        return MatrixRequest(x, granularity, norm=norm, residual=other if by_row else None)

    def _normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return x.to(self._device)

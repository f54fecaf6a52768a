"""A quantizer kernel against the portable quantizer, bit by bit.

Each job is checked in a whole quantization, with the jobs that belong to it. The mean that kernels
compute themselves is a sum in another order: it is compared within a tolerance, and everything
after it bit by bit, given that mean.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from flash8.backends.cpu import quantize as portable
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.request import Request
from flash8.tensors.float8 import E4M3, E5M2
from flash8.tensors.hadamard import Rotation
from flash8.tensors.rotary import Rope

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_HEADS = 3
_MEAN_TOLERANCE = 1e-5  # of values about 1: a sum of some hundred in fp32
_NAN_BYTE = 0x7F  # of e4m3, and one of e5m2's
_POSITIONS = 300


def find_fault(variant: QuantizeVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    draw = _Draw(variant, device)
    for request in draw.requests():
        fault = _fault(request)
        if fault is not None:
            return fault
    return None


def _fault(request: Request) -> str | None:
    amax = None if request.amax is None else request.amax.clone()
    call = quantizer.Call(request._replace(amax=amax))
    for filled in (call.data, call.descale, call.mean):
        filled.view(-1).view(torch.uint8).fill_(_NAN_BYTE)
    watchdog = Watchdog(request.x.device)
    call.launch()
    watchdog.wait()
    data, descale, mean = portable.quantize(request)
    if request.smooth:
        off = float((call.mean - mean).abs().max())
        if not off <= _MEAN_TOLERANCE:
            return f"the mean is off by {off:.2g}, where {_MEAN_TOLERANCE:g} is allowed"
        data, descale, mean = portable.quantize(request._replace(smooth=False, mean=call.mean))
    rows = [("bytes of the result", call.data, data)]
    if request.descale is None:
        rows.append(("descales", call.descale, descale))
    if request.mean_shape() != (0,):
        rows.append(("elements of the mean", call.mean, mean))
    if amax is not None and request.amax is not None:
        rows.append(("values of amax", amax, request.amax))
    return _difference(rows)


def _difference(rows: list[tuple[str, Tensor, Tensor]]) -> str | None:
    """The first of (what, have, want) that are not the same bits. NaN has one pattern only."""
    for what, have, want in rows:
        wide = torch.uint8 if have.element_size() == 1 else torch.int32
        differ = int((have.view(wide) != want.view(wide)).sum())
        if differ:
            return f"{differ} of {have.numel()} {what} differ"
    return None


class _Draw:
    """Random input of a variant. It is drawn on the CPU: the same on every device."""

    def __init__(self, variant: QuantizeVariant, device: torch.device) -> None:
        self._variant, self._device = variant, device
        self._generator = torch.Generator("cpu").manual_seed(1)

    def requests(self) -> Iterator[Request]:
        """A packed one with every step, and a dense one with one descale for all of it."""
        variant, width = self._variant, self._variant.head_dim
        smooth = variant.job in ("mean", "mean_finish")
        lengths = self._int32(0, 130, 130, 170)
        out = E4M3 if variant.out == "e4m3" else E5M2
        yield Request(
            self._x(175, _HEADS, width),
            "head" if variant.job == "amax" else "block",
            out,
            rotation=None if smooth else Rotation(width, seed=5),
            smooth=smooth,
            mean=None if smooth else self._normal(3, _HEADS, width),
            rope=Rope(*self._tables(), self._int32(3, 0, 60), False),
            cu_seqlens=lengths,
            seqused=self._int32(129, 0, 33),
            v_colmajor=variant.v_colmajor,
        )
        given = variant.job == "cast"
        yield Request(
            self._x(2, 150, _HEADS, width),
            "tensor",
            out,
            smooth=smooth,
            rope=Rope(*self._tables(), None, True),
            descale=self._fp32(0.01) if given else None,
            amax=self._fp32(0.5) if given else None,
            v_colmajor=variant.v_colmajor,
        )

    def _x(self, *shape: int) -> Tensor:
        """Normal values and, here and there, larger ones."""
        dtype = torch.bfloat16 if self._variant.job == "mean_finish" else None
        x = self._normal(*shape)
        x.view(-1)[::1001] *= 20.0
        return x.to(dtype or _DTYPES[self._variant.dtype])

    def _tables(self) -> tuple[Tensor, Tensor]:
        angles = self._normal(_POSITIONS, self._variant.head_dim // 4) * 3.0
        return angles.cos(), angles.sin()

    def _normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return x.to(self._device)

    def _int32(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _fp32(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self._device)

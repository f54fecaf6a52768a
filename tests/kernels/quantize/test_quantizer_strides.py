"""Addresses beyond 2^31 elements in the quantizer's kernels: x, data, descales, means.

Tensors lie in sparse memory, as in test_large_strides.py. Results must be those of the same call on
dense tensors, to the bit, and an offset that is counted in 32 bits must be noticed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import cumulative
from flash8 import _native
from flash8.backends.hopper import kernels
from flash8.backends.hopper import quantize as quantizer
from flash8.call.request import Request
from flash8.tensors.float8 import E4M3
from flash8.tensors.hadamard import Rotation
from guarded import contiguous_strides
from quantizer_cases import draw
from quantizer_device import changed_kernels, device
from simulated_device import missing_compiler
from sparse_tensors import sparse

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BATCH, ROWS, HEADS, DIM = 2, 150, 2, 64
#: Elements between neighbours. Truncated to 32 bits it stays a stride that is in bounds.
FAR = 2**32 + 4096
STEP = 2**26 + 256  # between rows: the last ones are beyond 2^32
STRIDES = {"batch": FAR, "head": FAR, "block": FAR, "row": STEP}
#: What the strides of a reference step over.
DIMENSIONS = {
    "x": ("batch", "row", "head"),
    "out": ("batch", "row", "head"),
    "descale": ("batch", "head", "block"),
    "amax": ("batch", "head", "block"),
    "mean": ("batch", "head"),
    "mean_rotated": ("batch", "head"),
}

Reference = tuple[int, ...]
Edit = Callable[[Any], None]


def far_tensor(
    shape: tuple[int, ...], names: tuple[str, ...], far: str, dtype: torch.dtype
) -> Tensor:
    """Of dimensions with these names, of which one is far apart."""
    strides = list(contiguous_strides(shape))
    if far in names:
        strides[names.index(far)] = STRIDES[far]
    return sparse(shape, tuple(strides), dtype)


def reference(x: Tensor, names: tuple[str, ...], wanted: tuple[str, ...]) -> Reference:
    steps = dict(zip(names, x.stride(), strict=False))
    return (x.data_ptr(), *(steps.get(name, 0) for name in wanted))


@contextmanager
def launches(
    monkeypatch: Any, edit: Edit, tensors: list[Tensor], registry: Any = None
) -> Iterator[None]:
    """Inside, quantizer kernels get parameters that `edit` has changed, and may touch `tensors`."""
    original = _native.launch_quantize

    def launch(kernel: Any, index: int, stream: int, params: Any) -> None:
        edit(params)
        original(kernel, index, stream, params)

    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        device().configure(seed=1, strict_global=True)
        patch.setattr(_native, "launch_quantize", launch)
        if registry is not None:
            patch.setattr(kernels, "registry", lambda: registry)
        for x in tensors:
            device().register(x)
        try:
            yield
        finally:
            for x in tensors:
                device().unregister(x)


def narrowed(name: str) -> Edit:
    """The strides of one reference have lost their upper halves."""

    def edit(params: Any) -> None:
        address, *strides = getattr(params, name)
        setattr(params, name, (address, *(stride % 2**32 for stride in strides)))

    return edit


# --------------------------------------------------------------------------------------- quantizer


def request_of(kind: str) -> Request:
    x = draw(BATCH, ROWS, HEADS, DIM, scale=3.0) + 1.0
    if kind == "packed":
        return Request(x[0].contiguous(), "block", cu_seqlens=cumulative((70, 80)))
    if kind == "transposed":
        return Request(x, "block", v_colmajor=True)
    if kind == "blocks":
        return Request(x, "block")
    return Request(x, "head", rotation=Rotation(DIM, 3), smooth=True)


def quantized(
    monkeypatch: Any, kind: str, far: str, edit: Edit | None = None, registry: Any = None
) -> dict[str, Tensor]:
    """What a call writes, with tensors of which one dimension is far apart ("": none)."""
    request = request_of(kind)
    rows = ("row", "head") if request.packed else ("batch", "row", "head")
    by_head = ("batch", "head", "block")
    data = ("batch", "head", "row") if request.v_colmajor else rows
    shapes = {
        "x": (tuple(request.x.shape), rows, request.x.dtype),
        "out": (request.data_shape(), data, E4M3),
        "descale": (request.descale_shape(), by_head, torch.float32),
    }
    if request.smooth:
        mean = (request.mean_shape(), ("batch", "head"), torch.float32)
        shapes |= {"mean": mean, "mean_rotated": mean}
        shapes["amax"] = (request.descale_shape(), by_head, torch.float32)
    tensors = {n: far_tensor(s, names, far, dtype) for n, (s, names, dtype) in shapes.items()}
    tensors["x"].copy_(request.x)

    def redirect(params: Any) -> None:
        for name, x in tensors.items():
            ref = reference(x, shapes[name][1], DIMENSIONS[name])
            if request.packed and name == "descale":
                ref = (ref[0], 0, *ref[2:])
            setattr(params, name, ref)
        if edit is not None:
            edit(params)

    given = [request.cu_seqlens] if request.packed else []
    with launches(monkeypatch, redirect, [*tensors.values(), *given], registry):
        quantizer.Call(request).launch()
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


CASES = {
    "batch": ("all", "batch"),
    "head": ("all", "head"),
    "row": ("all", "row"),
    "block": ("blocks", "block"),
    "row of packed sequences": ("packed", "row"),
    "channel of transposed data": ("transposed", "row"),
    "head of transposed data": ("transposed", "head"),
}


def assert_same(have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in want.items():
        assert torch.equal(have[name].view(torch.uint8), x.view(torch.uint8)), name


@pytest.mark.parametrize("case", CASES)
def test_addresses_beyond_2_to_the_31_elements(monkeypatch, case):
    kind, far = CASES[case]
    want = quantized(monkeypatch, kind, "")
    assert want["out"].float().abs().sum() > 0
    assert_same(quantized(monkeypatch, kind, far), want)


@pytest.mark.parametrize("name", DIMENSIONS)
@pytest.mark.parametrize("far", ["batch", "head"])
def test_a_stride_of_32_bits_is_noticed(monkeypatch, far, name):
    want = quantized(monkeypatch, "all", far)
    with pytest.raises((AssertionError, _native.DriverError)):
        assert_same(quantized(monkeypatch, "all", far, narrowed(name)), want)


# ------------------------------------------------------------------- kernels that count in 32 bits

SLOW = pytest.mark.slow
#: file, an offset of 64 bits, and the call that must notice when it has 32.
OFFSETS = {
    "x": ("rows.cuh", "(tile.offset + row) * params.x.row_stride", ("all", "row"), ()),
    "data": ("cast.cu", "(tile.offset + row) * params.out.row_stride", ("packed", "row"), SLOW),
    "transposed data": (
        "v_colmajor.cuh",
        "row * params.out.row_stride",
        ("transposed", "row"),
        SLOW,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks) for name, (*_, marks) in OFFSETS.items()]
)
def test_offsets_of_32_bits_are_noticed(monkeypatch, tmp_path: Path, name):
    file, offset, (kind, far), _ = OFFSETS[name]
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    registry = changed_kernels(tmp_path, file, offset, f"static_cast<int>({offset})")
    want = quantized(monkeypatch, kind, far)
    near = quantized(monkeypatch, kind, "", registry=registry)
    assert_same(near, quantized(monkeypatch, kind, ""))
    with pytest.raises((AssertionError, _native.DriverError)):
        assert_same(quantized(monkeypatch, kind, far, registry=registry), want)

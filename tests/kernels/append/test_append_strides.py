"""Addresses beyond 2^31 elements in the appending kernel: new rows, caches, descales, page tables.

Tensors lie in sparse memory. Results must be those of the same call on dense tensors, to the bit,
and an offset that is counted in 32 bits must be noticed.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from append_cases import Append, assert_same, make
from flash8 import _native
from flash8.backends.hopper import append as hopper
from flash8.call.request import Appended
from flash8.tensors.float8 import E4M3
from guarded import contiguous_strides
from quantizer_device import changed_kernels, device
from simulated_device import missing_compiler
from sparse_tensors import sparse

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

#: Elements between neighbours. Truncated to 32 bits it stays a stride that is in bounds.
FAR = 2**32 + 4096
STEP = 2**26 + 256  # between rows: the last ones are beyond 2^32

Edit = Callable[[Any], None]


def apart(x: Tensor, dimension: int, step: int = FAR) -> Tensor:
    """A copy whose neighbours along one dimension are far from each other."""
    strides = list(contiguous_strides(tuple(x.shape)))
    strides[dimension] = step
    return sparse(tuple(x.shape), tuple(strides), x.dtype).copy_(x)


def far_cache(dimension: int, step: int = FAR) -> Callable[[Appended], Appended]:
    return lambda part: part._replace(cache=apart(part.cache, dimension, step))


def far_rows(dimension: int, step: int = FAR) -> Callable[[Appended], Appended]:
    return lambda part: part._replace(x=apart(part.x, dimension, step))


PAGED = {"page_size": 64, "cache": E4M3}
LONG = {"new": 70}
#: What is far apart in keys and values, and the call.
CASES = {
    "rows of a cache": (far_cache(0), {"rotary_dim": 32}),
    "tokens of a cache": (far_cache(1, STEP), {"new": 40}),
    "heads of a cache": (far_cache(2), {"rotary_dim": 32}),
    "pages": (far_cache(0), PAGED),
    "heads of pages": (far_cache(2), PAGED),
    "sequences of new rows": (far_rows(0), {"rotary_dim": 32, "interleaved": False}),
    "new rows": (far_rows(1, STEP), LONG),
    "packed new rows": (far_rows(0, STEP), {"new": (5, 0, 69)}),
    "heads of new rows": (far_rows(2), {}),
    "descales of slots": (lambda part: part._replace(descale=apart(part.descale, 0)), PAGED),
    "page table": (lambda part: part._replace(page_table=apart(part.page_table, 0)), PAGED),
}


def run(monkeypatch: Any, call: Append, edit: Edit | None = None) -> list[Tensor]:
    """What the call fills, with parameters that `edit` has changed."""
    original = _native.launch_append

    def launch(kernel: Any, index: int, stream: int, params: Any) -> None:
        if edit is not None:
            edit(params)
        original(kernel, index, stream, params)

    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        device().configure(seed=1, strict_global=True)
        patch.setattr(_native, "launch_append", launch)
        tensors = call.tensors()
        for x in tensors:
            device().register(x)
        try:
            rotated, lengths = hopper.append(call.k, call.v, queries=call.queries)
        finally:
            for x in tensors:
                device().unregister(x)
    filled = [call.k.cache, call.v.cache, lengths, *([] if rotated is None else [rotated])]
    return [x.clone(memory_format=torch.contiguous_format) for x in filled]


def case(name: str) -> tuple[Append, Append]:
    """The call on dense tensors, and on those that are far apart."""
    change, options = CASES[name]
    call = make(**options)
    # Whole tables: a copy of one that lies apart would hide how far.
    far = replace(call.copy(), k=change(call.copy().k), v=change(call.copy().v))
    return call, far


@pytest.fixture(autouse=True)
def tables_as_they_lie(monkeypatch):
    """Not copied to where their rows are close to each other."""
    held = vars(hopper)["_Held"]
    monkeypatch.setattr(held, "index", lambda self, x: self.keep(x).data_ptr())


@pytest.mark.parametrize("name", CASES)
def test_addresses_beyond_2_to_the_31_elements(monkeypatch, name):
    near, far = case(name)
    assert_same(run(monkeypatch, far), run(monkeypatch, near))


def test_queries_beyond_2_to_the_31_elements(monkeypatch):
    call = make(rotary_dim=32, new=70)
    want = run(monkeypatch, call.copy())
    for dimension, step in ((0, FAR), (1, STEP), (2, FAR)):
        far = call.copy()
        far.queries = far.queries._replace(x=apart(far.queries.x, dimension, step))
        assert_same(run(monkeypatch, far), want)


def narrow(field: str) -> Edit:
    """The strides of one reference have lost their upper halves."""

    def edit(params: Any) -> None:
        for rows in (params.k, params.v):
            address, *strides = getattr(rows, field)
            setattr(rows, field, (address, *(stride % 2**32 for stride in strides)))

    return edit


def narrow_table(params: Any) -> None:
    params.place.page_table_stride %= 2**32


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("rows of a cache", narrow("out")),
        ("heads of pages", narrow("out")),
        ("sequences of new rows", narrow("x")),
        ("heads of new rows", narrow("x")),
        ("descales of slots", narrow("descale")),
        ("page table", narrow_table),
    ],
)
def test_a_stride_of_32_bits_is_noticed(monkeypatch, name, edit):
    near, far = case(name)
    want = run(monkeypatch, near)
    with pytest.raises((AssertionError, _native.DriverError)):
        assert_same(run(monkeypatch, far, edit), want)


SLOW = pytest.mark.slow
#: file, an offset of 64 bits, and the call that must notice when it has 32.
OFFSETS = {
    "rows of a cache": ("append.cu", "place.row * rows.out.row_stride", "tokens of a cache", ()),
    "slots": ("append.cu", "place.slot * rows.out.batch_stride", "pages", SLOW),
    "new rows": ("quantize/new_token.cuh", "index * rows.x.row_stride", "new rows", SLOW),
    "packed new rows": (
        "quantize/new_token.cuh",
        "token * rows.x.row_stride",
        "packed new rows",
        SLOW,
    ),
    "pages": ("quantize/new_token.cuh", "line * params.page_table_stride", "page table", SLOW),
    "descales": ("quantize/new_row.cuh", "batch * ref.batch_stride", "descales of slots", SLOW),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=row[-1]) for name, row in OFFSETS.items()]
)
def test_offsets_of_32_bits_are_noticed(monkeypatch, tmp_path: Path, name):
    file, offset, of, _ = OFFSETS[name]
    near, far = case(of)
    want = run(monkeypatch, near.copy())
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    registry = changed_kernels(tmp_path, file, offset, f"static_cast<int>({offset})")
    monkeypatch.setattr(device(), "_registry", registry)
    assert_same(run(monkeypatch, near), want)
    with pytest.raises((AssertionError, _native.DriverError)):
        assert_same(run(monkeypatch, far), want)

"""The driver that does nothing refuses what cuda.h documents, which other tests rely on."""

import ctypes
import itertools

import pytest

pytest_plugins = ["driver_fixtures"]

INVALID_VALUE, CAPTURE_UNSUPPORTED = 1, 900
GOOD = {
    "data_type": 9,  # bfloat16
    "address": 4096,
    "dims": (128, 1000, 8, 2),
    "strides": (2048, 256, 2_048_000),
    "box": (64, 128, 1, 1),
    "element_strides": (1, 1, 1, 1),
    "interleave": 0,
    "swizzle": 3,
}
REFUSED = {
    "an unknown type": {"data_type": 99},
    "no dimension": {"dims": (), "strides": (), "box": (), "element_strides": ()},
    "no address": {"address": 0},
    "an address between": {"address": 4104},
    "an empty dimension": {"dims": (128, 0, 8, 2)},
    "a dimension too large": {"dims": (128, 2**32 + 1, 8, 2)},
    "a stride between": {"strides": (2056, 256, 2_048_000)},
    "a stride too large": {"strides": (2048, 256, 2**40)},
    "a stride of zero": {"strides": (2048, 0, 2_048_000)},
    "a stride within a row": {"dims": (128, 1000, 8, 1), "strides": (2048, 256, 16)},
    "an empty box": {"box": (64, 0, 1, 1)},
    "a box too large": {"box": (64, 257, 1, 1)},
    "a box between": {"box": (12, 128, 1, 1)},
    "a box wider than its swizzle": {"box": (128, 128, 1, 1)},
    "an element stride of zero": {"element_strides": (1, 0, 1, 1)},
    "an element stride too large": {"element_strides": (1, 9, 1, 1)},
    "an unknown swizzle": {"swizzle": 7},
}


def encode(fake, skew: int = 0, **given) -> int:
    """What cuTensorMapEncodeTiled returns. `skew` moves the map off its 64 bytes."""
    values = {**GOOD, **given}
    memory = ctypes.create_string_buffer(256)
    start = ctypes.addressof(memory)
    at = start + (-start % 64) + skew
    arrays = {
        "dims": ctypes.c_uint64,
        "strides": ctypes.c_uint64,
        "box": ctypes.c_uint32,
        "element_strides": ctypes.c_uint32,
    }
    dims, strides, box, steps = ((kind * 5)(*values[name]) for name, kind in arrays.items())
    return ctypes.CDLL(str(fake.path)).cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        values["data_type"],
        len(values["dims"]),
        ctypes.c_void_p(values["address"]),
        *(dims, strides, box, steps),
        *(values["interleave"], values["swizzle"], 2, 0),
    )


def test_a_tensor_map_that_is_right(fake):
    assert encode(fake) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_map_that_is_not(name, fake):
    assert encode(fake, **REFUSED[name]) == INVALID_VALUE


def test_a_tensor_map_off_its_alignment(fake):
    assert encode(fake, skew=16) == INVALID_VALUE


LOADS = ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuFuncSetAttribute")
WAITS = ("cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2", "cuCtxSynchronize", "cuStreamSynchronize")


@pytest.mark.parametrize(
    ("entry", "relaxed"), [*itertools.product((*LOADS, *WAITS), (False, True))]
)
def test_what_a_capture_allows(entry, relaxed, fake):
    """Loads are allowed to a thread that says that it knows, and waits to nobody."""
    library = ctypes.CDLL(str(fake.path))
    fake.fail(entry, 77)  # so that a legal call does nothing
    fake.capture(True)
    mode = ctypes.c_int(2 if relaxed else 0)
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    legal = relaxed and entry in LOADS
    assert getattr(library, entry)() == (77 if legal else CAPTURE_UNSUPPORTED)
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

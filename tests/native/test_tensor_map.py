"""TMA descriptors: what is handed to the driver, and what is refused before it."""

import struct

import pytest

from flash8 import _native
from flash8._native import ElementType, Swizzle

pytest_plugins = ["driver_fixtures"]

# (head_dim, seqlen, heads, batch) in bf16, a 64 x 128 box with a 128-byte swizzle.
GOOD = {
    "element_type": ElementType.BFLOAT16,
    "address": 4096,
    "dims": [128, 1000, 8, 2],
    "strides": [2048, 256, 2_048_000],
    "box": [64, 128, 1, 1],
    "swizzle": Swizzle.B128,
}


def test_the_driver_gets_what_was_asked_for(driver):
    encoded = _native.encode_tensor_map(driver, **GOOD)
    words = struct.unpack("<16Q", encoded)
    assert words[:9] == (9, 4, 4096, 3, 2 * 16, 2, 2_048_000, 1, 1)
    assert words[9:12] == (2048, 256, 2_048_000)


@pytest.mark.parametrize("dims", [[2**32], [64, 2**32, 3]])
def test_the_largest_sizes_are_accepted(driver, dims):
    shape = {
        "dims": dims,
        "strides": [2**40 - 16] * (len(dims) - 1),
        "box": [64] + [1] * (len(dims) - 1),
    }
    assert len(_native.encode_tensor_map(driver, **GOOD | shape)) == 128


BAD = [
    ({"dims": []}, "the tensor has 0 dimensions; TMA supports 1 to 5"),
    ({"dims": [8] * 6}, "the tensor has 6 dimensions"),
    ({"strides": [2048]}, "there are 1 strides; 4 dimensions need 3"),
    ({"address": 0}, "address is 0; it must be a multiple of 16 and not null"),
    ({"address": 4104}, "address is 4104"),
    ({"dims": [128, 0, 8, 2]}, r"dims\[1\] is 0; supported are 1 to 2\^32"),
    ({"dims": [128, 2**32 + 1, 8, 2]}, r"dims\[1\] is 4294967297"),
    (
        {"strides": [2048, 8, 16]},
        r"strides\[1\] is 8 bytes; it must be a multiple of 16 below 2\^40",
    ),
    ({"strides": [-2048, 256, 256]}, r"strides\[0\] is -2048"),
    ({"strides": [2048, 256, 2**40]}, r"strides\[2\] is 1099511627776"),
    # Expanded tensors, and dimensions of one with the stride that torch gave them.
    ({"strides": [2048, 0, 2_048_000]}, r"strides\[1\] is 0 bytes, less than a row of 256"),
    (
        {"dims": [128, 1000, 8, 1], "strides": [2048, 256, 16]},
        r"strides\[2\] is 16 bytes, less than",
    ),
    ({"strides": [240, 256, 2_048_000]}, r"strides\[0\] is 240 bytes, less than a row of 256"),
    ({"box": [64, 128, 1]}, "the box has rank 3, the tensor 4 dimensions"),
    ({"box": [64] * 6}, "the box has rank 6"),
    ({"box": [64, 0, 1, 1]}, r"box\[1\] is 0; supported are 1 to 256"),
    ({"box": [64, 257, 1, 1]}, r"box\[1\] is 257"),
    ({"box": [12, 128, 1, 1]}, r"box\[0\] is 12, 24 bytes; it must be a multiple of 16 bytes"),
    (
        {"box": [128, 128, 1, 1]},
        r"box\[0\] is 128, 256 bytes; a swizzle of 128 bytes supports no wider",
    ),
    (
        {"swizzle": Swizzle.B32},
        r"box\[0\] is 64, 128 bytes; a swizzle of 32 bytes supports no wider box",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_tma_cannot_do_is_refused(fake, driver, change, message):
    with pytest.raises(ValueError, match=f"^tensor map: .*{message}"):
        _native.encode_tensor_map(driver, **GOOD | change)
    assert fake.count("cuTensorMapEncodeTiled") == 0


@pytest.mark.parametrize(
    ("element_type", "width"),
    [(ElementType.UINT8, 256), (ElementType.FLOAT16, 128), (ElementType.FLOAT32, 64)],
)
def test_a_box_without_swizzle_may_be_256_bytes(driver, element_type, width):
    change = {"element_type": element_type, "box": [width, 1, 1, 1], "swizzle": Swizzle.NONE}
    change["dims"] = [width, 1000, 8, 2]
    assert len(_native.encode_tensor_map(driver, **GOOD | change)) == 128


def test_the_drivers_refusal_has_its_name(fake, driver):
    fake.fail("cuTensorMapEncodeTiled", 1)
    with pytest.raises(
        _native.DriverError, match="cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE"
    ):
        _native.encode_tensor_map(driver, **GOOD)

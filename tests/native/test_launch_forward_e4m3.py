"""What the host makes of a forward call whose output is e4m3, and what it refuses."""

import struct

import pytest

from fake_driver.cubin import LAYOUT, fake_cubin, tma_boxes
from flash8 import _native

pytest_plugins = ["driver_fixtures"]

SCALES, GIVEN = 0x70000, 0x80000
BF16, SWIZZLE_128B = 9, 3
BOXES = tma_boxes(*((4, (64, rows, 1, 1), BF16, SWIZZLE_128B) for rows in (128, 176, 176)))
#: Rows of 8 heads, 16 elements apart.
STRIDED = (0x40000, 300 * 8 * 144, 8 * 144, 144)


@pytest.fixture
def kernel(driver) -> _native.Kernel:
    return _native.Library(driver, fake_cubin(kBlockN=176, tma=BOXES, out_e4m3=1)).kernel()


def call_with(**changes):
    """Two sequences of 300 queries and 500 keys, 8 heads of 128 and 2 of k and v."""
    call = _native.ForwardParams()
    for name, address, rows, heads in (("q", 0x10000, 300, 8), ("k", 0x20000, 500, 2)):
        setattr(call, name, (address, rows * heads * 128, heads * 128, 128))
    call.v, call.o = (0x30000, *call.k[1:]), STRIDED
    call.heads_q, call.heads_kv, call.head_dim, call.head_dim_v = 8, 2, 128, 128
    call.sequences.batch = call.sequences.batch_k = 2
    call.sequences.max_seqlen_q, call.sequences.max_seqlen_k = 300, 500
    call.scores.softmax_scale = 0.125
    call.scores.window_left = call.scores.window_right = -1
    call.o_type, call.out_scale = _native.ElementType.UINT8, (SCALES, 0, 8)
    for name, value in changes.items():
        setattr(call, name, value)
    return call


@pytest.mark.parametrize("out_scale", [(SCALES, 0, 8), (SCALES, 0, 11), (0, GIVEN, 0)])
def test_scales_are_handed_over(out_scale, fake, kernel):
    call = call_with(out_scale=out_scale)
    assert call.out_scale == out_scale and kernel.info.out_e4m3
    _native.launch_forward(kernel, 0, 0, call)
    offset, size = LAYOUT["ForwardParams"]["fields"]["out_scale"]
    assert struct.unpack_from("<3q", fake.parameter(0), offset) == out_scale and size == 24


BAD = [
    ({"o_type": _native.ElementType.BFLOAT16}, "o_type is 9; this kernel writes e4m3, UINT8"),
    ({"out_scale": (0, 0, 8)}, "out_scale has neither a place for scales and a given one"),
    ({"out_scale": (SCALES, GIVEN, 8)}, "out_scale has both a place for scales and a given one"),
    ({"out_scale": (SCALES, 0, 7)}, "the row stride of out_scale is 7; a row has 8 scales"),
    ({"head_dim_v": 112}, "head_dim_v is 112; this kernel writes e4m3 with a head_dim_v of 128"),
    ({"o": (0x40008, *STRIDED[1:])}, "o is at address .*; it must be a multiple of 16"),
    ({"o": (*STRIDED[:3], 136)}, "the head stride of o is 136 elements; it must be a multiple of"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_the_kernel_cannot_write_is_refused(fake, kernel, change, message):
    _native.launch_forward(kernel, 0, 0, call_with())
    with pytest.raises(ValueError, match=f"forward: {message}"):
        _native.launch_forward(kernel, 0, 0, call_with(**change))
    assert len(fake.launches) == 1


@pytest.mark.parametrize("out_scale", [(SCALES, 0, 8), (0, GIVEN, 0)])
def test_a_kernel_of_16_bits_takes_no_scales(fake, driver, out_scale):
    wide = _native.Library(driver, fake_cubin(kBlockN=176, tma=BOXES)).kernel()
    assert not wide.info.out_e4m3
    with pytest.raises(ValueError, match="out_scale is given; this kernel writes o of 16 bits"):
        _native.launch_forward(wide, 0, 0, call_with(out_scale=out_scale))
    assert not fake.launches

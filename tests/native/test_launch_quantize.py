"""What the host makes of a quantizer call: the grid, and what it refuses."""

import pytest

from fake_driver.cubin import LAYOUT, fake_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]

CAST, AMAX, MEAN, MEAN_FINISH = range(6, 10)
BYTES = LAYOUT["QuantizeParams"]["size"]


def load(driver, kind=CAST) -> _native.Kernel:
    image = fake_cubin(
        kind=kind, entry="quantize", params_bytes=BYTES, threads=256, shared_bytes=0, kBlockM=128
    )
    return _native.Library(driver, image).kernel()


def dense_call(batch=2, seqlen=300, heads=8, head_dim=128) -> _native.QuantizeParams:
    call = _native.QuantizeParams()
    call.x = (0x10000, seqlen * heads * head_dim, heads * head_dim, head_dim)
    call.out = (0x20000, seqlen * heads * head_dim, heads * head_dim, head_dim)
    call.descale = (0x30000, heads * 3, 3, 1)
    call.batch, call.seqlen, call.heads, call.head_dim = batch, seqlen, heads, head_dim
    return call


def packed_call(batch=3, total=700) -> _native.QuantizeParams:
    call = dense_call(batch=batch, seqlen=0)
    call.cu_seqlens, call.total = 0x40000, total
    return call


@pytest.mark.parametrize(
    ("call", "tiles"),
    [
        (dense_call(), 2 * 3 * 8),
        (dense_call(seqlen=256), 2 * 2 * 8),
        (dense_call(seqlen=0), 2 * 1 * 8),  # an empty sequence still has a descale
        (packed_call(), (700 // 128 + 3) * 8),
        (packed_call(total=0), 3 * 8),
    ],
)
def test_a_tile_per_block_and_head(fake, driver, call, tiles):
    _native.launch_quantize(load(driver), 0, 99, call)
    (launch,) = fake.launches
    expected = f"quantize device=0 grid={tiles},1,1 block=256,1,1 shared=0 stream=99 "
    assert launch.startswith(expected)


def test_the_end_of_the_mean_has_a_cta_per_head(fake, driver):
    call = dense_call()
    call.mean, call.mean_partial = (0x50000, 1024, 128), 0x60000
    _native.launch_quantize(load(driver, MEAN_FINISH), 0, 0, call)
    assert "grid=16,1,1" in fake.launches[0]


def test_no_sequences_no_launch(fake, driver):
    _native.launch_quantize(load(driver), 0, 0, dense_call(batch=0))
    assert fake.launches == []


def test_fields_keep_what_they_are_given():
    call = dense_call()
    call.hadamard_signs = [2**32 - 1, 0, 5, 0, 0, 0, 0, 7]
    call.amax = (0x70000, 3, 2, 1)
    copy = call.copy()
    assert copy.hadamard_signs == [2**32 - 1, 0, 5, 0, 0, 0, 0, 7]
    assert (copy.amax, copy.x) == ((0x70000, 3, 2, 1), call.x)


BAD = [
    (CAST, {"heads": 0}, "heads is 0; supported are 1 to"),
    (CAST, {"batch": -1}, "batch is -1; supported are 0 to"),
    (CAST, {"seqlen": -5}, "seqlen is -5"),
    (CAST, {"total": -1}, "total is -1"),
    (CAST, {"total": 2**31}, "total is 2147483648"),
    (CAST, {"head_dim": 40}, "head_dim is 40; this kernel supports the multiples of 16 up to 128"),
    (CAST, {"head_dim": 144}, "head_dim is 144"),
    (CAST, {"batch": 2**30}, r"there are more than 2\^31 - 1 tiles"),
    (CAST, {"x": (0x10008, 0, 1024, 128)}, "x is at address 65544"),
    (CAST, {"x": (0, 0, 1024, 128)}, "x is at address 0"),
    (CAST, {"x": (0x10000, 0, 1020, 128)}, "a stride of x is 1020 elements; .* multiple of 8"),
    (CAST, {"out": (0x10000, 0, 1024, 8)}, "a stride of out is 8 elements; .* multiple of 16"),
    (CAST, {"descale": (0, 0, 0, 0)}, "descale is null"),
    (CAST, {"scale_source": 1}, "amax is null"),
    (AMAX, {}, "amax is null"),
    (MEAN, {}, "mean_partial is null"),
    (MEAN_FINISH, {"mean_partial": 0x60000}, "mean is null"),
    (CAST, {"out": (0x20008, 0, 0, 0)}, "out is at address 131080"),
    (CAST, {"hadamard_block": 8}, "hadamard_block is 8; it must be 0 or a power of two from 16"),
    (CAST, {"hadamard_block": 48}, "hadamard_block is 48"),
    (CAST, {"hadamard_block": 64, "head_dim": 96}, "hadamard_block is 64; .* head_dim, 96"),
    (CAST, {"rope_cos": 0x80000}, "rope_sin is null or rope_rows is 0"),
    (
        CAST,
        {"rope_cos": 0x80000, "rope_sin": 0x90000, "rope_rows": 9, "rotary_dim": 48},
        "rotary_dim is 48; it must be a multiple of 32 up to head_dim, 128",
    ),
    (
        CAST,
        {"rope_cos": 1, "rope_sin": 1, "rope_rows": 9, "rotary_dim": 144, "interleaved": 1},
        "rotary_dim is 144; it must be a multiple of 16",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD)
def test_what_the_kernel_cannot_take_is_refused(fake, driver, kind, changes, message):
    call = dense_call()
    for name, value in changes.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        _native.launch_quantize(load(driver, kind), 0, 0, call)
    assert fake.launches == []


def test_only_a_quantizer_kernel_is_launched(driver):
    with pytest.raises(ValueError, match="forward is not a quantizer kernel"):
        _native.launch_quantize(_native.Library(driver, fake_cubin()).kernel(), 0, 0, dense_call())
    plain = _native.Library(driver, fake_cubin()).kernel("plain")
    with pytest.raises(ValueError, match="plain exports no kernel_info"):
        _native.launch_quantize(plain, 0, 0, dense_call())

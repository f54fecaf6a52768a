"""What the host makes of a matrix product: the grid, the tensor maps, and what it refuses."""

import struct

import pytest

from fake_driver.cubin import LAYOUT, fake_cubin, gemm_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]
FLOAT32, E4M3 = _native.ElementType.FLOAT32, _native.ElementType.UINT8
SMALL_M = "gemm_small_m_block_16x64"


def load(driver, variant="gemm_block_128x128") -> _native.Kernel:
    return _native.Library(driver, gemm_cubin(variant)).kernel()


def product(m=300, n=520, k=144) -> _native.GemmParams:
    call = _native.GemmParams()
    call.m, call.n, call.k = m, n, k
    call.a, call.b, call.out = 0x10000, 0x20000, 0x30000
    call.a_stride, call.b_stride, call.out_stride = k, k, n
    call.out_type = _native.ElementType.BFLOAT16
    call.scale_a, call.scale_b = (0x40000, 1, 300), (0x50000, 2, 5)
    return call


def launched(fake, name: str) -> int:
    offset, size = LAYOUT["GemmParams"]["fields"][name]
    assert size == 4
    return struct.unpack_from("<i", fake.parameter(0), offset)[0]


@pytest.mark.parametrize(
    ("sizes", "variant", "grid", "blocks"),
    [
        ((300, 520), "gemm_block_128x128", 15, (3, 5)),
        ((300, 520), "gemm_outer_256x128", 10, (2, 5)),
        ((300, 520), "gemm_block_128x160", 12, (3, 4)),
        ((300, 520), "gemm_outer_fast_128x256", 9, (3, 3)),
        ((1, 1), "gemm_block_128x128", 1, (1, 1)),
        ((4096, 4096), "gemm_block_128x128", 132, (32, 32)),
    ],
)
def test_a_cta_for_a_tile_as_far_as_there_are_multiprocessors(
    fake, driver, sizes, variant, grid, blocks
):
    _native.launch_gemm(load(driver, variant), 0, 99, product(*sizes))
    (launch,) = fake.launches
    assert launch.startswith(f"gemm device=0 grid={grid},1,1 block=384,1,1 ")
    assert " stream=99 " in launch
    assert (launched(fake, "m_blocks"), launched(fake, "n_blocks")) == blocks
    assert 1 <= launched(fake, "band") <= blocks[0]


@pytest.mark.parametrize(
    ("changes", "vectors"),
    [
        ({}, 1),
        ({"n": 519}, 0),
        ({"n": 516}, 0),
        ({"n": 516, "out_type": FLOAT32}, 1),
        ({"out": 0x30002}, 0),
        ({"out_stride": 522}, 0),
        ({"out_stride": 521, "m": 1}, 1),
        ({"n": 512, "out_stride": 512, "out_type": E4M3}, 1),
        ({"out_type": E4M3}, 0),
    ],
)
def test_rows_are_stored_by_16_bytes_where_they_can_be(fake, driver, changes, vectors):
    call = product()
    for name, value in changes.items():
        setattr(call, name, value)
    _native.launch_gemm(load(driver), 0, 0, call)
    assert launched(fake, "vector_stores") == vectors


@pytest.mark.parametrize("sizes", [(0, 520), (300, 0)])
def test_no_element_no_launch(fake, driver, sizes):
    _native.launch_gemm(load(driver), 0, 0, product(*sizes))
    assert fake.launches == []


BAD = [
    ({"m": -1}, "m is -1; supported are 0 to"),
    ({"n": 2**31 - 1}, "n is 2147483647; supported are 0 to"),
    ({"k": 0}, "k is 0; it must be a positive multiple of 16"),
    ({"k": 24}, "k is 24; it must be a positive multiple of 16"),
    ({"m": 2**30, "n": 2**30, "out_stride": 2**30}, "out has 8388608 by 8388608 tiles"),
    ({"a": 0x10008}, "address is 65544; it must be a multiple of 16"),
    ({"b": 0}, "address is 0; it must be a multiple of 16 and not null"),
    ({"a_stride": 152}, r"strides\[0\] is 152 bytes; it must be a multiple of 16"),
    ({"b_stride": 128}, r"strides\[0\] is 128 bytes, less than a row of 144"),
    ({"out": 0x30001}, "out is at address 196609; it must be a multiple of 2"),
    ({"out_stride": 519}, "out_stride is 519 elements, less than a row of 520"),
    ({"bias": 0x60000, "bias_type": E4M3}, "bias_type is 0; supported are"),
    ({"scale_result": 0x60000}, "scale_result is given; it goes with an e4m3 out"),
    ({"scale_result": 0x60002, "out_type": E4M3}, "scale_result is at address 393218"),
    ({"bias": 0x60001}, "bias is at address 393217; it must be a multiple of"),
    ({"scale_a": (0, 1, 1)}, "scale_a is at address 0; it must be a multiple of 4 and not null"),
    ({"scale_b": (0x50000, -1, 1)}, "the strides of scale_b are -1 and 1"),
    ({"scale_a_row_shift": 5}, "scale_a_row_shift is 5; it must be 0 or 7"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_the_kernel_cannot_take_is_refused(fake, driver, changes, message):
    call = product()
    call.bias_type = FLOAT32
    for name, value in changes.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        _native.launch_gemm(load(driver), 0, 0, call)
    assert fake.launches == []


def test_rows_share_no_scales_where_a_scale_is_a_rows(fake, driver):
    call = product()
    call.scale_a_row_shift = 7
    with pytest.raises(ValueError, match="this kernel has a scale per row"):
        _native.launch_gemm(load(driver, "gemm_outer_128x128"), 0, 0, call)
    assert fake.launches == []


def test_a_of_16_bits_has_no_scales(fake, driver):
    kernel = load(driver, "gemm_small_m_block_bf16_16x64")
    call = product(9)
    with pytest.raises(ValueError, match="scale_a is given; this kernel makes the scales of a"):
        _native.launch_gemm(kernel, 0, 0, call)
    call.scale_a = (0, 0, 0)
    _native.launch_gemm(kernel, 0, 0, call)
    assert len(fake.launches) == 1 and launched(fake, "n_blocks") == 9


def test_only_a_gemm_kernel_is_launched(driver):
    with pytest.raises(ValueError, match="is not a GEMM kernel"):
        _native.launch_gemm(_native.Library(driver, fake_cubin()).kernel(), 0, 0, product())


@pytest.mark.parametrize(
    ("sizes", "grid", "blocks"),
    [((300, 520), 20, (2, 5)), ((1, 1), 2, (1, 1)), ((4096, 4096), 132, (16, 32))],
)
def test_ctas_that_share_b_are_a_cluster(fake, driver, sizes, grid, blocks):
    """They have neighbouring blocks of rows, the last of which may lie beyond out."""
    _native.launch_gemm(load(driver, "gemm_block_cluster_128x128"), 0, 0, product(*sizes))
    (launch,) = fake.launches
    assert f" grid={grid},1,1 " in launch and " cluster=2,1,1 " in launch
    assert (launched(fake, "m_blocks"), launched(fake, "n_blocks")) == blocks
    assert 1 <= launched(fake, "band") <= blocks[0]


@pytest.mark.parametrize(("splits", "ctas"), [(0, 9), (1, 9), (2, 18), (4, 36), (8, 72)])
def test_ctas_that_share_k_are_a_cluster(fake, driver, splits, ctas):
    call = product(9)
    call.splits = splits
    _native.launch_gemm(load(driver, SMALL_M), 0, 0, call)
    (launch,) = fake.launches
    assert f" grid={ctas},1,1 " in launch
    assert (f" cluster={splits},1,1 " in launch) == (splits > 1)
    assert launched(fake, "splits") == max(1, splits)


def test_there_is_a_cluster_for_every_tile(fake, driver):
    """However few multiprocessors there are: a cluster has no second tile."""
    call = product(9, 64 * 200)
    call.splits = 8
    _native.launch_gemm(load(driver, SMALL_M), 0, 0, call)
    assert " grid=1600,1,1 " in fake.launches[0]


@pytest.mark.parametrize(
    ("splits", "variant", "message"),
    [
        (3, SMALL_M, "splits is 3; supported are 1, 2, 4 and 8"),
        (-1, SMALL_M, "splits is -1; supported are 1, 2, 4 and 8"),
        (16, SMALL_M, "splits is 16; supported are 1, 2, 4 and 8"),
        (2, "gemm_block_128x128", "splits is 2; this kernel has at most 1"),
        (2, "gemm_small_m_block_16x128", "splits is 2; this kernel has at most 1"),
    ],
)
def test_splits_that_a_kernel_has_not(fake, driver, splits, variant, message):
    call = product(9)
    call.splits = splits
    with pytest.raises(ValueError, match=message):
        _native.launch_gemm(load(driver, variant), 0, 0, call)
    assert fake.launches == []


def test_too_many_ctas_are_refused(fake, driver):
    call = product(9, 2**30 * 7 // 4)
    call.b_stride = call.k
    call.out_stride = call.n
    call.out_type = E4M3
    _native.launch_gemm(load(driver, SMALL_M), 0, 0, call)
    call.m, call.splits = 2**10, 8
    with pytest.raises(ValueError, match=r"64 by 29360128 tiles; .* over the CTAs of a cluster, 8"):
        _native.launch_gemm(load(driver, SMALL_M), 0, 0, call)

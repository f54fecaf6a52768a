"""What the host makes of a grouped product: CTAs for the most tiles, maps, and what it refuses."""

import struct

import pytest

from fake_driver.cubin import LAYOUT, gemm_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]
BLOCK = "gemm_grouped_block_128x128"
ALONG_K = "gemm_grouped_k_block_128x128"


def load(driver, variant=BLOCK) -> _native.Kernel:
    return _native.Library(driver, gemm_cubin(variant)).kernel()


def product(m=300, n=520, k=144, groups=4, rows_per_group=0) -> _native.GemmParams:
    call = _native.GemmParams()
    call.m, call.n, call.k = m, n, k
    call.a, call.b, call.out = 0x10000, 0x20000, 0x30000
    call.a_stride, call.b_stride, call.out_stride = k, k, n
    call.b_group_stride = n * k
    call.out_type = _native.ElementType.BFLOAT16
    call.scale_a, call.scale_b = (0x40000, 1, 300), (0x50000, 2, 5)
    call.scale_a_group_stride, call.scale_b_group_stride = -7, 10
    call.group_rows, call.groups, call.rows_per_group = 0x60000, groups, rows_per_group
    return call


def launched(fake, name: str) -> int:
    offset, size = LAYOUT["GemmParams"]["fields"][name]
    form = {4: "<i", 8: "<q"}[size]
    return struct.unpack_from(form, fake.parameter(0), offset)[0]


@pytest.mark.parametrize(
    ("options", "m_blocks", "grid"),
    [
        ({}, 6, 30),  # 3 full blocks, and of 3 groups a part of one more
        ({"m": 3}, 3, 15),  # no more than there are rows
        ({"groups": 1}, 3, 15),
        ({"m": 512, "rows_per_group": 128}, 4, 20),
        ({"m": 516, "rows_per_group": 129}, 8, 40),
        ({"groups": 100}, 102, 132),
    ],
)
def test_a_cta_for_every_tile_that_there_may_be(fake, driver, options, m_blocks, grid):
    _native.launch_gemm(load(driver), 0, 99, product(**options))
    (launch,) = fake.launches
    assert launch.startswith(f"gemm device=0 grid={grid},1,1 block=384,1,1 ")
    assert (launched(fake, "m_blocks"), launched(fake, "n_blocks")) == (m_blocks, 5)
    given = product(**options)
    for name in ("groups", "rows_per_group", "group_rows", "b_group_stride"):
        assert launched(fake, name) == getattr(given, name)
    assert launched(fake, "scale_a_group_stride") == -7
    assert launched(fake, "scale_b_group_stride") == 10


@pytest.mark.parametrize("sizes", [(0, 520), (300, 0)])
def test_no_element_no_launch(fake, driver, sizes):
    _native.launch_gemm(load(driver), 0, 0, product(*sizes))
    assert fake.launches == []


BAD = [
    ({"groups": 0}, "groups is 0; this kernel takes 1 or more"),
    ({"groups": -1}, "groups is -1; this kernel takes"),
    ({"groups": 2**31 - 1}, "groups is 2147483647; supported are 1 to"),
    ({"group_rows": 0}, "group_rows is at address 0; it must be a multiple of 4 and not null"),
    ({"rows_per_group": 70}, "rows_per_group is 70; it must be 0, or those of 4 groups be m = 300"),
    ({"rows_per_group": -75}, "rows_per_group is -75"),
    ({"scale_a_row_shift": 7}, "scale_a_row_shift is 7; rows of groups share no scales"),
    ({"bias": 0x70000, "bias_type": _native.ElementType.FLOAT32}, "bias is given; products of"),
    ({"out_type": _native.ElementType.UINT8}, "out_type is 0; supported with groups are FLOAT16"),
    ({"b_group_stride": 152}, r"strides\[3\] is 152 bytes; it must be a multiple of 16"),
    ({"n": 2**24, "out_stride": 2**24, "groups": 2**20, "m": 2**20}, "out has .* tiles; supported"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_the_kernel_cannot_take_is_refused(fake, driver, changes, message):
    call = product()
    for name, value in changes.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        _native.launch_gemm(load(driver), 0, 0, call)
    assert fake.launches == []


@pytest.mark.parametrize(
    ("options", "grid"),
    [({}, 60), ({"m": 3}, 20), ({"groups": 1}, 15), ({"groups": 100}, 132)],
)
def test_along_k_a_cta_for_every_tile_of_every_group(fake, driver, options, grid):
    _native.launch_gemm(load(driver, ALONG_K), 0, 99, product(**options))
    (launch,) = fake.launches
    assert launch.startswith(f"gemm device=0 grid={grid},1,1 block=384,1,1 ")
    m_blocks = -(-options.get("m", 300) // 128)
    assert (launched(fake, "m_blocks"), launched(fake, "n_blocks")) == (m_blocks, 5)
    assert launched(fake, "groups") == options.get("groups", 4)


def test_along_k_one_row_of_many_groups_is_stored_as_rows(fake, driver):
    """By 16 bytes only where the next group's row is aligned, too."""
    for stride, vector_stores in ((520, 1), (521, 0)):
        call = product(m=1)
        call.out_stride = stride
        _native.launch_gemm(load(driver, ALONG_K), 0, 0, call)
        offset, _ = LAYOUT["GemmParams"]["fields"]["vector_stores"]
        (found,) = struct.unpack_from("<i", fake.parameter(len(fake.launches) - 1), offset)
        assert found == vector_stores


BAD_ALONG_K = [
    ({"groups": 0}, "groups is 0; this kernel takes 1 or more"),
    ({"rows_per_group": 75}, "rows_per_group is 75; it must be 0, since this kernel's groups lie"),
    ({"groups": 2**20, "m": 2**20}, "out has 1099511627776 rows; supported are 0 to"),
    ({"m": 1, "out_stride": 519}, "out_stride is 519 elements, less than a row of 520"),
    ({"n": 2**24, "out_stride": 2**24, "groups": 2**14}, "out has .* tiles; supported"),
    ({"out_type": _native.ElementType.UINT8}, "out_type is 0; supported with groups are FLOAT16"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ALONG_K)
def test_what_the_kernel_along_k_cannot_take_is_refused(fake, driver, changes, message):
    call = product()
    for name, value in changes.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        _native.launch_gemm(load(driver, ALONG_K), 0, 0, call)
    assert fake.launches == []


def test_a_kernel_of_one_matrix_takes_no_groups(fake, driver):
    with pytest.raises(ValueError, match="groups is 4; this kernel knows no groups"):
        _native.launch_gemm(load(driver, "gemm_block_128x128"), 0, 0, product())
    assert fake.launches == []

"""What the host makes of an operand of a product: the grid, vector access, and what it refuses."""

import struct

import pytest

from fake_driver.cubin import LAYOUT, quantize_cubin, quantize_matrix_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]


def load(driver, variant="quantize_matrix_bf16") -> _native.Kernel:
    return _native.Library(driver, quantize_matrix_cubin(variant)).kernel()


def operand(rows=33, columns=200, **changes) -> _native.QuantizeMatrixParams:
    call = _native.QuantizeMatrixParams()
    call.rows, call.columns, call.row_threads = rows, columns, 8
    call.x, call.out, call.scale = 0x10000, 0x20000, 0x30000
    call.x_stride, call.out_stride, call.scale_stride = 200, 208, 2
    for name, value in changes.items():
        setattr(call, name, value)
    return call


@pytest.mark.parametrize(("rows", "threads", "grid"), [(33, 8, 2), (32, 8, 1), (7, 256, 7)])
def test_a_cta_has_as_many_rows_as_fit(fake, driver, rows, threads, grid):
    _native.launch_quantize_matrix(load(driver), 0, 99, operand(rows, row_threads=threads))
    (launch,) = fake.launches
    assert launch.startswith(f"quantize_matrix device=0 grid={grid},1,1 block=256,1,1 ")
    assert " stream=99 " in launch


@pytest.mark.parametrize(
    ("changes", "vectors"),
    [
        ({}, 1),
        ({"columns": 196}, 0),
        ({"x": 0x10002}, 0),
        ({"x_stride": 204}, 0),
        ({"x_stride": 204, "rows": 1}, 1),
        ({"other": 0x40000, "other_stride": 200}, 1),
        ({"other": 0x40000, "other_stride": 203}, 0),
        ({"other": 0x40008, "other_stride": 200}, 0),
    ],
)
def test_rows_are_read_by_16_bytes_where_they_can_be(fake, driver, changes, vectors):
    _native.launch_quantize_matrix(load(driver), 0, 0, operand(**changes))
    offset, size = LAYOUT["QuantizeMatrixParams"]["fields"]["vector_access"]
    assert size == 4
    assert struct.unpack_from("<i", fake.parameter(0), offset)[0] == vectors


@pytest.mark.parametrize("sizes", [(0, 200), (33, 0)])
def test_no_element_no_launch(fake, driver, sizes):
    _native.launch_quantize_matrix(load(driver), 0, 0, operand(*sizes))
    assert fake.launches == []


BAD = [
    ({"rows": -1}, "rows is -1; supported are 0 to"),
    ({"columns": 2**31 - 1}, "columns is 2147483647; supported are 0 to"),
    ({"row_threads": 4}, "row_threads is 4; it must be a power of two from 8 to 256"),
    ({"row_threads": 24}, "row_threads is 24; it must be a power of two"),
    ({"row_threads": 512}, "row_threads is 512; it must be"),
    ({"x": 0}, "x is at address 0; it must be a multiple of 2 and not null"),
    ({"out": 0x20008}, "out is at address 131080; it must be a multiple of 16"),
    ({"scale": 0x30002}, "scale is at address 196610; it must be a multiple of 4"),
    ({"x_stride": -8}, "x_stride is -8; it must not be negative"),
    ({"out_stride": 200}, "out_stride is 200, less than a row of 208"),
    ({"out_stride": 216}, "out_stride is 216; it must be a multiple of 16"),
    ({"scale_stride": 1}, "scale_stride is 1, less than a row of 2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_the_kernel_cannot_take_is_refused(fake, driver, changes, message):
    with pytest.raises(ValueError, match=message):
        _native.launch_quantize_matrix(load(driver), 0, 0, operand(**changes))
    assert fake.launches == []


def test_what_a_prologue_needs(fake, driver):
    silu, norm = (load(driver, f"quantize_matrix_bf16_{name}") for name in ("silu_mul", "rms_norm"))
    for kernel, changes, message in (
        (silu, {}, "other is at address 0"),
        (norm, {}, "norm_weight is at address 0"),
        (norm, {"norm_weight": 0x50000, "other": 0x40000}, "the residual, and sum is null"),
        (norm, {"norm_weight": 0x50000, "other": 0x40000, "sum": 0x60000}, "sum_stride is 0, less"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.launch_quantize_matrix(kernel, 0, 0, operand(**changes))
    other = _native.Library(driver, quantize_cubin("quantize_cast_bf16_d64")).kernel()
    with pytest.raises(ValueError, match="makes no operands of products"):
        _native.launch_quantize_matrix(other, 0, 0, operand())
    assert fake.launches == []

"""What the host makes of a QKV projection: blocks of tokens by heads, maps, and what it refuses."""

import struct

import pytest

from fake_driver.cubin import LAYOUT, gemm_cubin, qkv_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]


def load(driver, variant="qkv_projection_block") -> _native.Kernel:
    return _native.Library(driver, qkv_cubin(variant)).kernel()


def projection(batch=2, seqlen=150, heads_q=4, heads_kv=2, total=None) -> _native.QkvParams:
    """With `total`, packed."""
    call = _native.QkvParams()
    heads = heads_q + 2 * heads_kv
    gemm = call.gemm
    gemm.m, gemm.n, gemm.k = batch * seqlen if total is None else total, heads * 128, 144
    gemm.a, gemm.b, gemm.a_stride, gemm.b_stride = 0x10000, 0x20000, 144, 144
    gemm.scale_a, gemm.scale_b = (0x40000, 1, 300), (0x50000, 2, 5)
    call.q, call.k = (0x60000, 0, 128 * heads_q, 128), (0x70000, 0, 128 * heads_kv, 128)
    call.v = (0x80000, 2**17, 256, 2**15)
    call.q_descale = call.k_descale = call.v_descale = (0x90000, 8, 2, 1)
    call.heads_q, call.heads_kv, call.batch = heads_q, heads_kv, batch
    call.seqlen = seqlen if total is None else 0
    call.cu_seqlens = 0 if total is None else 0xA0000
    return call


def launched(fake, name: str) -> int:
    offset, size = LAYOUT["GemmParams"]["fields"][name]
    assert LAYOUT["QkvParams"]["fields"]["gemm"][0] == 0 and size == 4
    return struct.unpack_from("<i", fake.parameter(0), offset)[0]


@pytest.mark.parametrize(
    ("options", "blocks", "grid"),
    [
        ({}, (4, 8), 32),
        ({"batch": 1, "seqlen": 1, "heads_q": 1, "heads_kv": 1}, (1, 3), 3),
        ({"batch": 3, "seqlen": 128}, (3, 8), 24),
        ({"batch": 5, "total": 300}, (7, 8), 56),
        ({"batch": 1, "total": 3}, (1, 8), 8),
        ({"batch": 100, "seqlen": 4096}, (3200, 8), 132),
    ],
)
def test_a_cta_for_a_block_of_a_head(fake, driver, options, blocks, grid):
    _native.launch_qkv(load(driver), 0, 99, projection(**options))
    (launch,) = fake.launches
    assert launch.startswith(f"qkv_projection device=0 grid={grid},1,1 block=384,1,1 ")
    assert " stream=99 " in launch
    assert (launched(fake, "m_blocks"), launched(fake, "n_blocks")) == blocks
    assert 1 <= launched(fake, "band") <= blocks[0]


@pytest.mark.parametrize("options", [{"batch": 0}, {"seqlen": 0}, {"batch": 0, "total": 7}])
def test_no_token_no_launch(fake, driver, options):
    _native.launch_qkv(load(driver), 0, 0, projection(**options))
    assert fake.launches == []


ROPE = {"rope_cos": 0xB0000, "rope_sin": 0xC0000, "rope_rows": 5, "rotary_dim": 128}
BAD = [
    ({"batch": -1}, "batch is -1; supported are 0 to"),
    ({"seqlen": -1}, "seqlen is -1; supported are 0 to"),
    ({"heads_q": 0}, "heads_q is 0; supported are 1 to"),
    ({"heads_kv": -3}, "heads_kv is -3; supported are 1 to"),
    ({"heads_q": 5}, "n is 1024; the heads have 1152 columns"),
    ({"seqlen": 151}, "m is 300; there are 302 tokens"),
    ({"q": (0x60008, 0, 512, 128)}, "q is at address .*; it must be a multiple of 16"),
    ({"k": (0, 0, 256, 128)}, "k is at address 0; it must be a multiple of 16 and not null"),
    ({"v": (0x80000, 2**17, 250, 2**15)}, "a stride of v is 250 elements; it must be a multiple"),
    ({"v": (0x80000, 2**17, -256, 2**15)}, "a stride of v is -256 elements"),
    ({"k_descale": (0, 8, 2, 1)}, "a descale is at address 0; it must be a multiple of 4"),
    ({"q_norm": 0x60004}, "the weight of a norm is at address .*; it must be a multiple of 8"),
    ({**ROPE, "rope_sin": 0}, "rope_sin is at address 0"),
    ({**ROPE, "rope_cos": 0xB0004}, "rope_cos is at address .*; it must be a multiple of 8"),
    ({**ROPE, "rope_rows": 0}, "rope_rows is 0; the tables need a row"),
    ({**ROPE, "rotary_dim": 64}, "rotary_dim is 64; supported are all 128 channels"),
    ({**ROPE, "rotary_dim": 24, "interleaved": 1}, "rotary_dim is 24; supported are all"),
    ({**ROPE, "rotary_dim": 144, "interleaved": 1}, "rotary_dim is 144; supported are all"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_the_kernel_cannot_take_is_refused(fake, driver, changes, message):
    call = projection()
    for name, value in changes.items():
        setattr(call, name, value)
    with pytest.raises(ValueError, match=message):
        _native.launch_qkv(load(driver), 0, 0, call)
    assert fake.launches == []


BAD_PRODUCTS = [
    ({"k": 24}, "k is 24; it must be a positive multiple of 16"),
    ({"scale_b": (0, 2, 5)}, "scale_b is at address 0"),
    ({"scale_a_row_shift": 3}, "scale_a_row_shift is 3; it must be 0 or 7"),
    ({"bias": 0x30001, "bias_type": _native.ElementType.FLOAT32}, "bias is at address"),
    ({"bias": 0x30000, "bias_type": _native.ElementType.UINT8}, "bias_type is 0"),
    ({"groups": 2}, "groups is 2; there is one weight"),
    ({"a_stride": 152}, r"strides\[0\] is 152 bytes; it must be a multiple of 16"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_PRODUCTS)
def test_products_that_the_kernel_cannot_take_are_refused(fake, driver, changes, message):
    call = projection()
    for name, value in changes.items():
        setattr(call.gemm, name, value)
    with pytest.raises(ValueError, match=message):
        _native.launch_qkv(load(driver), 0, 0, call)
    assert fake.launches == []


def test_interleaved_pairs_of_the_first_channels(fake, driver):
    call = projection()
    for name, value in {**ROPE, "rotary_dim": 48, "interleaved": 1}.items():
        setattr(call, name, value)
    _native.launch_qkv(load(driver, "qkv_projection_outer"), 0, 0, call)
    assert len(fake.launches) == 1


def test_another_kernel_is_refused(fake, driver):
    other = _native.Library(driver, gemm_cubin()).kernel()
    with pytest.raises(ValueError, match="is no QKV projection"):
        _native.launch_qkv(other, 0, 0, projection())

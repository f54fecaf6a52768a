"""What the host makes of an append: the grid, and what it refuses."""

import pytest

from fake_driver.cubin import append_cubin, fake_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]


def load(driver) -> _native.Kernel:
    return _native.Library(driver, append_cubin()).kernel()


def describe(rows: _native.AppendedRows, heads: int, head_dim: int, tokens: int, seqlen: int):
    rows.x = (0x10000, seqlen * heads * head_dim, heads * head_dim, head_dim)
    rows.out = (0x20000, 512 * heads * head_dim, heads * head_dim, head_dim)
    rows.heads, rows.head_dim, rows.tokens, rows.seqlen = heads, head_dim, tokens, seqlen


def dense_call(batch=3, seqlen=7) -> _native.AppendParams:
    call = _native.AppendParams()
    for rows, heads, head_dim in ((call.q, 8, 128), (call.k, 2, 128), (call.v, 2, 64)):
        describe(rows, heads, head_dim, batch * seqlen, seqlen)
    call.q.rotates = call.k.rotates = 1
    rotary = call.rotary
    rotary.cos, rotary.sin, rotary.cos_stride, rotary.sin_stride = 0x30000, 0x40000, 32, 32
    rotary.positions, rotary.rotary_dim = 100, 64
    call.place.cache_seqlens, call.place.num_slots, call.place.slot_tokens = 0x50000, 3, 512
    call.batch = batch
    return call


def without_queries(call: _native.AppendParams) -> _native.AppendParams:
    call.q.heads = 0
    return call


def packed_call(total: int) -> _native.AppendParams:
    call = dense_call()
    for rows in (call.q, call.k, call.v):
        rows.tokens, rows.seqlen, rows.cu_seqlens = total, 0, 0x60000
    return call


@pytest.mark.parametrize(
    ("call", "grid"),
    [
        (dense_call(), "2,12,1"),  # 21 tokens of 16 groups, 8 + 2 + 2 heads
        (without_queries(dense_call()), "2,4,1"),
        (dense_call(seqlen=16), "3,12,1"),
        (dense_call(seqlen=0), "1,12,1"),  # lengths are written
        (packed_call(17), "2,12,1"),
    ],
)
def test_eight_channels_a_thread_and_a_row_of_ctas_a_head(fake, driver, call, grid):
    _native.launch_append(load(driver), 0, 99, call)
    (launch,) = fake.launches
    assert launch.startswith(f"append device=0 grid={grid} block=256,1,1 shared=0 stream=99 ")


def test_no_sequences_no_launch(fake, driver):
    _native.launch_append(load(driver), 0, 0, dense_call(batch=0))
    assert fake.launches == []


BAD = [
    ({"batch": -1}, "batch is -1"),
    ({"q.heads": -1}, "q has -1 heads"),
    (
        {"q.heads": 0, "k.heads": 0, "v.heads": 0},
        "q, k and v have 0 heads; supported are 1 to 65535",
    ),
    ({"q.heads": 65536}, "q, k and v have 65540 heads"),
    ({"k.head_dim": 68}, "head_dim of k is 68; it must be a multiple of 8"),
    ({"v.tokens": -1}, "v has -1 tokens"),
    ({"v.seqlen": 0}, "v has 21 tokens in dense sequences of none"),
    (
        {"q.tokens": 2**31 - 1},
        "q has 2147483647 tokens; supported are up to 134217663 with head_dim",
    ),
    ({"k.x": (0x10008, 0, 256, 128)}, "x of k is at address 65544"),
    ({"v.out": (0, 0, 128, 64)}, "out of v is at address 0"),
    ({"v.out": (0x20000, 0, 132, 64)}, "a stride of out of v is 132 elements; .* multiple of 8"),
    ({"k.mean": (0x10004, 0, 128)}, "mean of k is at address 65540"),
    ({"rotary.sin": 0}, "rotary.cos or rotary.sin is null"),
    ({"rotary.positions": 0}, "rotary.positions is 0; rows that rotate need a table"),
    ({"rotary.cos": 0x30008}, "cos of rotary is at address"),
    ({"rotary.sin_stride": 12}, "a stride of rotary is 12 elements"),
    ({"rotary.rotary_dim": 24}, "rotary.rotary_dim is 24; it must be a multiple of 16"),
    ({"rotary.rotary_dim": 144}, "rotary.rotary_dim is 144, more than head_dim of q, 128"),
    ({"place.cache_seqlens": 0}, "place.cache_seqlens is null"),
    ({"place.num_slots": 0}, "the cache has 0 slots of 512 tokens"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_the_kernel_cannot_take_is_refused(fake, driver, changes, message):
    call = dense_call()
    for name, value in changes.items():
        outer, _, inner = name.rpartition(".")
        setattr(getattr(call, outer) if outer else call, inner, value)
    with pytest.raises(ValueError, match=message):
        _native.launch_append(load(driver), 0, 0, call)
    assert fake.launches == []


def test_only_an_appending_kernel_is_launched(driver):
    with pytest.raises(ValueError, match="is not an appending kernel"):
        _native.launch_append(_native.Library(driver, fake_cubin()).kernel(), 0, 0, dense_call())

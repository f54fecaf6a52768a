"""What the host makes of a forward call: parameters, tensor maps, grid, and what it refuses."""

import math
import struct

import pytest

from fake_driver.cubin import LAYOUT, fake_cubin, tma_boxes
from flash8 import _native

pytest_plugins = ["driver_fixtures"]

BF16, SWIZZLE_128B, PANEL = 9, 3, 64
ADDRESS = {"q": 0x10000, "k": 0x20000, "v": 0x30000, "o": 0x40000}
STRUCTS = {
    **dict.fromkeys(("q", "k", "v", "o"), "TensorRef"),
    "lse": "RowRef",
    "sequences": "SequenceParams",
    "scores": "ScoreParams",
    "scheduler": "SchedulerParams",
}


def box(rows: int) -> tuple[int, tuple[int, ...], int, int]:
    return 4, (PANEL, rows, 1, 1), BF16, SWIZZLE_128B


@pytest.fixture
def kernel(driver) -> _native.Kernel:
    tma = tma_boxes(box(128), box(176), box(176))
    return _native.Library(driver, fake_cubin(kBlockN=176, tma=tma)).kernel()


def dense_call(
    batch=2, seqlen_q=300, seqlen_k=500, heads_q=8, heads_kv=2, head_dim=128, head_dim_v=128
):
    """A contiguous (batch, seqlen, heads, head_dim) call."""
    call = _native.ForwardParams()
    for name, rows, heads, width in (
        ("q", seqlen_q, heads_q, head_dim),
        ("k", seqlen_k, heads_kv, head_dim),
        ("v", seqlen_k, heads_kv, head_dim_v),
        ("o", seqlen_q, heads_q, head_dim_v),
    ):
        setattr(call, name, (ADDRESS[name], rows * heads * width, heads * width, width))
    call.lse = (0x50000, heads_q * seqlen_q, seqlen_q)
    call.heads_q, call.heads_kv = heads_q, heads_kv
    call.head_dim, call.head_dim_v = head_dim, head_dim_v
    call.sequences.batch = call.sequences.batch_k = batch
    call.sequences.max_seqlen_q, call.sequences.max_seqlen_k = seqlen_q, seqlen_k
    call.scores.softmax_scale = 0.125
    call.scores.window_left = call.scores.window_right = -1
    return call


def packed_call(total_q=700, total_k=900):
    call = dense_call(seqlen_q=300, seqlen_k=400)
    call.sequences.cu_seqlens_q, call.sequences.cu_seqlens_k = 0x60000, 0x61000
    call.sequences.total_q, call.sequences.total_k = total_q, total_k
    return call


class Launched:
    """The parameters of the last launch, by field."""

    def __init__(self, fake):
        self._bytes = fake.parameter(-1 + len(fake.launches))

    def field(self, path: str, code: str):
        outer, _, inner = path.partition(".")
        offset, _ = LAYOUT["ForwardParams"]["fields"][outer]
        if inner:
            offset += LAYOUT[STRUCTS[outer]]["fields"][inner][0]
        return struct.unpack_from(f"<{code}", self._bytes, offset)[0]

    def map(self, name: str) -> dict[str, int]:
        """What the fake driver was asked to encode, as it packs it."""
        offset, _ = LAYOUT["ForwardParams"]["fields"][f"tma_{name}"]
        words = struct.unpack_from("<9Q", self._bytes, offset)
        names = (
            "type",
            "rank",
            "address",
            "swizzle",
            "modes",
            "batch",
            "batch_stride",
            "box_batch",
        )
        rank = words[1]
        strides = struct.unpack_from(f"<{rank - 1}Q", self._bytes, offset + 72)
        return {**dict(zip(names, words, strict=False)), "strides": strides}


def test_a_dense_call(fake, kernel):
    _native.launch_forward(kernel, 0, 99, dense_call())
    tiles = 3 * 8 * 2
    assert fake.launches == [
        f"forward device=0 grid={tiles},1,1 block=384,1,1 shared=200000 stream=99 first=9"
    ]
    launched = Launched(fake)
    assert launched.field("q.ptr", "q") == ADDRESS["q"]
    assert launched.field("o.row_stride", "q") == 8 * 128
    assert launched.field("lse.head_stride", "q") == 300
    assert launched.field("scores.softmax_scale_log2", "f") == pytest.approx(
        0.125 * math.log2(math.e)
    )
    assert launched.field("scheduler.max_m_blocks", "i") == 3
    assert launched.field("scheduler.num_ctas", "i") == tiles
    for name, stride in (("q", 300 * 8 * 128), ("k", 500 * 2 * 128), ("v", 500 * 2 * 128)):
        described = launched.map(name)
        assert described["address"] == ADDRESS[name]
        assert (described["type"], described["rank"], described["swizzle"]) == (
            BF16,
            4,
            SWIZZLE_128B,
        )
        assert (described["batch"], described["batch_stride"]) == (2, 2 * stride)


def test_a_long_call_fills_the_device_and_no_more(fake, kernel):
    _native.launch_forward(kernel, 0, 0, dense_call(seqlen_q=100_000))
    _native.launch_forward(kernel, 0, 0, dense_call(seqlen_q=100_000), sm_margin=12)
    _native.launch_forward(kernel, 0, 0, dense_call(seqlen_q=100_000), sm_margin=500)
    assert [line.split()[2] for line in fake.launches] == [
        "grid=132,1,1",
        "grid=120,1,1",
        "grid=1,1,1",
    ]


def test_a_packed_call_has_one_batch_of_all_rows(fake, kernel):
    _native.launch_forward(kernel, 0, 0, packed_call())
    assert [Launched(fake).map(name)["batch"] for name in "qkv"] == [1, 1, 1]


def test_the_cache_may_have_a_larger_batch(fake, kernel):
    call = dense_call()
    call.sequences.batch_k = 7
    call.sequences.kv_batch_idx = 0x62000
    _native.launch_forward(kernel, 0, 0, call)
    assert [Launched(fake).map(name)["batch"] for name in "qkv"] == [2, 7, 7]


def test_the_stride_of_a_single_batch_is_ignored(fake, kernel):
    call = dense_call(batch=1)
    call.k = (ADDRESS["k"], 7, 256, 128)
    _native.launch_forward(kernel, 0, 0, call)
    assert Launched(fake).map("k")["batch_stride"] % 16 == 0


ROW, ANY = 2 * 128, 2**62
#: Sizes of a call, strides of its tensors in elements, and those in bytes that TMA gets: a
#: dimension of one has that of the dimension inside of it.
SINGLE = {
    "a batch": ({"batch": 1}, (ANY, 1024, 128), (8 * ROW, ROW, ROW)),
    "a row": ({"seqlen_q": 1, "seqlen_k": 1}, (1024, 7, 128), (ROW, ROW, 8 * ROW)),
    "a head": ({"heads_q": 1, "heads_kv": 1}, (2048, 128, 0), (ROW, ROW, 16 * ROW)),
    "all of them": (
        {"batch": 1, "seqlen_q": 1, "seqlen_k": 1, "heads_q": 1, "heads_kv": 1},
        (1, 0, ANY),
        (ROW, ROW, ROW),
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_dimensions_of_one_get_a_stride_that_the_driver_takes(name, fake, kernel):
    """torch may give them any; the fake driver refuses what cuda.h does not describe."""
    sizes, given, wanted = SINGLE[name]
    call = dense_call(**{"heads_q": 8, "heads_kv": 8, **sizes})
    for tensor in "qkv":
        setattr(call, tensor, (ADDRESS[tensor], *given))
    call.o = (ADDRESS["o"], 2048, 1024, 128)
    _native.launch_forward(kernel, 0, 0, call)
    assert [Launched(fake).map(tensor)["strides"] for tensor in "qkv"] == [wanted] * 3


def test_a_folded_single_head_too(fake, folding):
    call = dense_call(heads_q=1, heads_kv=1, batch=1)
    call.q = (ADDRESS["q"], 3, 128, 5)
    _native.launch_forward(folding, 0, 0, call)
    assert Launched(fake).map("q")["strides"] == (ROW, ROW, ROW, ROW)


EXPANDED = {"by batch": (0, 256, 128), "by row": (128_000, 0, 128), "by head": (128_000, 256, 0)}


@pytest.mark.parametrize("name", EXPANDED)
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_an_expanded_tensor_has_no_map(name, tensor, fake, kernel):
    call = dense_call()
    setattr(call, tensor, (ADDRESS[tensor], *EXPANDED[name]))
    with pytest.raises(ValueError, match=r"strides\[.\] is 0 bytes, less than a row of 256"):
        _native.launch_forward(kernel, 0, 0, call)


@pytest.mark.parametrize("stride", [2**39, 2**61, 2**63 - 8, -8])
def test_a_stride_beyond_tma_is_refused_without_overflow(stride, kernel, folding):
    for served in (kernel, folding):
        call = dense_call()
        call.q = (ADDRESS["q"], 2048, 1024, stride)
        with pytest.raises(ValueError, match=r"a stride is .* elements of 2 bytes"):
            _native.launch_forward(served, 0, 0, call)


def test_without_keys_the_kernel_still_runs(fake, kernel):
    call = dense_call(seqlen_k=0)
    call.k = call.v = (0, 0, 256, 128)
    _native.launch_forward(kernel, 0, 0, call)
    assert Launched(fake).map("k")["address"] == ADDRESS["o"]


def test_without_a_row_nothing_is_launched(fake, kernel):
    for call in (dense_call(seqlen_q=0), dense_call(batch=0)):
        _native.launch_forward(kernel, 0, 0, call)
    assert fake.launches == []


@pytest.fixture
def folding(driver) -> _native.Kernel:
    """A kernel that folds query heads into rows."""
    q = (5, (PANEL, 1, 128, 1, 1), BF16, SWIZZLE_128B)
    return _native.Library(
        driver, fake_cubin(pack_gqa=1, tma=tma_boxes(q, box(128), box(128)))
    ).kernel()


def test_folded_heads_are_rows(fake, folding):
    _native.launch_forward(folding, 0, 0, dense_call())  # 300 rows of 8 heads, 4 a KV head
    launched = Launched(fake)
    assert launched.field("scheduler.max_m_blocks", "i") == 10
    assert launched.field("scheduler.num_ctas", "i") == 10 * 2 * 2
    assert launched.map("q")["rank"] == 5


def test_folded_heads_must_divide_a_tile(folding):
    with pytest.raises(ValueError, match="heads_q is 6, 6 times heads_kv; this kernel folds heads"):
        _native.launch_forward(folding, 0, 0, dense_call(heads_q=6, heads_kv=1))


def change_sequences(call, **values):
    for name, value in values.items():
        setattr(call.sequences, name, value)


BAD = [
    (lambda c: setattr(c, "heads_kv", 0), "heads_kv is 0; it must be positive"),
    (lambda c: setattr(c, "heads_kv", 3), "heads_q is 8; it must be a multiple of heads_kv, 3"),
    (lambda c: setattr(c, "heads_q", 0), "heads_q is 0"),
    (lambda c: setattr(c, "head_dim", 136), "head_dim is 136; this kernel supports 1 to 128"),
    (lambda c: setattr(c, "head_dim", 0), "head_dim is 0"),
    (lambda c: setattr(c, "head_dim_v", 256), "head_dim_v is 256; this kernel supports 1 to 128"),
    (
        lambda c: setattr(c, "head_dim_v", 100),
        "head_dim_v is 100 elements; it must be a multiple of 16",
    ),
    (lambda c: setattr(c, "o", (0x40008, 0, 0, 0)), "o is at address 262152"),
    (lambda c: setattr(c, "o", (0, 0, 0, 0)), "o is at address 0"),
    (lambda c: setattr(c, "o", (0x40000, 0, 1028, 128)), "the row stride of o is 1028 elements"),
    (lambda c: setattr(c, "q", (0x10008, 2048, 1024, 128)), "address is 65544"),
    (lambda c: setattr(c, "k", (0x20000, 2048, 100, 128)), r"strides\[0\] is 200 bytes"),
    (lambda c: setattr(c, "v", (0, 2048, 1024, 128)), "address is 0"),
    (lambda c: change_sequences(c, batch=-1), "batch is -1; supported are 0 to"),
    (lambda c: change_sequences(c, max_seqlen_q=-5), "max_seqlen_q is -5"),
    (lambda c: change_sequences(c, total_k=2**31), "total_k is 2147483648"),
    (lambda c: change_sequences(c, batch=2**30), r"there are more than 2\^31 - 2\^20 tiles"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_the_kernel_cannot_take_is_refused(fake, kernel, change, message):
    call = dense_call()
    change(call)
    with pytest.raises(ValueError, match=message):
        _native.launch_forward(kernel, 0, 0, call)
    assert fake.launches == []


def test_a_negative_margin_is_refused(kernel):
    with pytest.raises(ValueError, match="sm_margin is -1"):
        _native.launch_forward(kernel, 0, 0, dense_call(), sm_margin=-1)


def test_only_a_forward_kernel_is_launched(driver):
    combine = _native.Library(driver, fake_cubin(kind=2)).kernel()
    with pytest.raises(ValueError, match="forward is not a forward kernel"):
        _native.launch_forward(combine, 0, 0, dense_call())
    plain = _native.Library(driver, fake_cubin()).kernel("plain")
    with pytest.raises(ValueError, match="plain exports no kernel_info"):
        _native.launch_forward(plain, 0, 0, dense_call())

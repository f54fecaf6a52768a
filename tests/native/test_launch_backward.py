"""What the host makes of a backward call: parameters, tensor maps, grids, and what it refuses."""

import math
import struct

import pytest

from fake_driver.cubin import LAYOUT, backward_cubin, fake_cubin
from flash8 import _native

pytest_plugins = ["driver_fixtures"]

BLOCK_M = 64
STEPS = {
    "preprocess": "backward_preprocess_bf16_d128",
    "backward": "backward_bf16_d128",
    "postprocess": "backward_postprocess_bf16_d128",
}
TENSORS = ("q", "k", "v", "o", "dout", "dq", "dk", "dv")
ADDRESS = {name: 0x10000 * (1 + i) for i, name in enumerate(TENSORS)}
WORKSPACE = {
    "row_stats": 0x100000,
    "dq_accum": 0x110000,
    "dq_semaphore": 0x120000,
    "dsinks_partial": 0x130000,
    "dkv_partial": 0x140000,
}
STRUCTS = {"sequences": "SequenceParams", "scores": "ScoreParams", "scheduler": "SchedulerParams"}


class Kernels:
    """Preprocess, kernel and postprocess, in the order of their launches."""

    def __init__(self, driver, **changed):
        self.all = [
            _native.Library(driver, changed.get(step) or backward_cubin(name)).kernel()
            for step, name in STEPS.items()
        ]
        self.kernel = self.all[1]

    def launch(self, call, stream=0):
        _native.launch_backward(*self.all, 0, stream, call)


@pytest.fixture
def kernels(driver) -> Kernels:
    return Kernels(driver)


def dense_call(
    batch=2, seqlen_q=300, seqlen_k=500, heads_q=8, heads_kv=2, head_dim=128, head_dim_v=128
):
    """A contiguous (batch, seqlen, heads, head_dim) call."""
    call = _native.BackwardParams()
    for names, rows, heads, width in (
        (("q", "dq"), seqlen_q, heads_q, head_dim),
        (("k", "dk"), seqlen_k, heads_kv, head_dim),
        (("v", "dv"), seqlen_k, heads_kv, head_dim_v),
        (("o", "dout"), seqlen_q, heads_q, head_dim_v),
    ):
        for name in names:
            setattr(call, name, (ADDRESS[name], rows * heads * width, heads * width, width))
    call.lse = (0x200000, heads_q * seqlen_q, seqlen_q)
    for name in ("row_stats", "dq_accum", "dq_semaphore"):
        setattr(call, name, WORKSPACE[name])
    call.heads_q, call.heads_kv = heads_q, heads_kv
    call.head_dim, call.head_dim_v = head_dim, head_dim_v
    call.sequences.batch = call.sequences.batch_k = batch
    call.sequences.max_seqlen_q, call.sequences.max_seqlen_k = seqlen_q, seqlen_k
    call.scores.softmax_scale = 0.125
    call.scores.window_left = call.scores.window_right = -1
    return call


def packed_call(total_q=700, total_k=900, batch=2):
    call = dense_call(batch=batch, seqlen_q=300, seqlen_k=400)
    call.sequences.cu_seqlens_q, call.sequences.cu_seqlens_k = 0x210000, 0x211000
    call.sequences.total_q, call.sequences.total_k = total_q, total_k
    return call


def with_sinks(call):
    call.scores.sinks, call.dsinks = 0x220000, 0x230000
    call.dsinks_partial = WORKSPACE["dsinks_partial"]
    return call


def with_splits(call, splits=3):
    call.head_splits, call.dkv_partial = splits, WORKSPACE["dkv_partial"]
    return call


def field(fake, path: str, code: str, launch=-1):
    """Of the parameters of a launch."""
    data = fake.parameter(launch + len(fake.launches))
    outer, _, inner = path.partition(".")
    offset, _ = LAYOUT["BackwardParams"]["fields"][outer]
    if inner:
        offset += LAYOUT[STRUCTS[outer]]["fields"][inner][0]
    return struct.unpack_from(f"<{code}", data, offset)[0]


def ctas(fake) -> list[tuple[str, int]]:
    """Kernel and CTAs of every launch."""
    lines = [line.split() for line in fake.launches]
    return [(line[0], int(line[2].removeprefix("grid=").split(",")[0])) for line in lines]


def test_a_dense_call_is_three_launches(fake, kernels):
    kernels.launch(dense_call(), 99)
    by_queries, by_keys = 2 * 5 * 8, 2 * 4 * 2
    assert fake.launches == [
        f"preprocess device=0 grid={by_queries},1,1 block=256,1,1 shared=0 stream=99 first=9",
        f"backward device=0 grid={by_keys},1,1 block=384,1,1 shared=200000 stream=99 first=9",
        f"postprocess device=0 grid={by_queries},1,1 block=256,1,1 shared=0 stream=99 first=9",
    ]
    assert len({fake.parameter(i) for i in range(3)}) == 1
    for name in TENSORS:
        assert field(fake, name, "q") == ADDRESS[name]
    for name in ("row_stats", "dq_accum", "dq_semaphore"):
        assert field(fake, name, "q") == WORKSPACE[name]
    log2 = field(fake, "scores.softmax_scale_log2", "f")
    assert log2 == pytest.approx(0.125 * math.log2(math.e))
    assert field(fake, "query_blocks", "q") == 2 * 5
    assert field(fake, "max_n_blocks", "i") == 4
    assert field(fake, "scheduler.max_m_blocks", "i") == 5
    assert field(fake, "scheduler.heads_per_section", "i") == 1
    assert field(fake, "head_splits", "i") == 1
    for name in ("scheduler.tile_count", "k_mean", "dsinks", "dlse", "dkv_partial"):
        assert field(fake, name, "q") == 0
    assert field(fake, "zero", "i") == 0


def test_maps_have_the_kernels_own_boxes(fake, kernels):
    kernels.launch(dense_call())
    bf16, swizzle = 9, 3
    for at, (name, rows, heads) in enumerate(
        (("q", 300, 8), ("k", 500, 2), ("v", 500, 2), ("dout", 300, 8))
    ):
        words = struct.unpack_from("<7Q", fake.parameter(0), 128 * at)
        assert words[:4] == (bf16, 4, ADDRESS[name], swizzle)
        assert words[5:] == (2, 2 * rows * heads * 128)


def test_packed_blocks_are_a_bound(fake, kernels):
    kernels.launch(packed_call())
    by_queries, by_keys = 700 // 64 + 2, 900 // 128 + 2
    assert ctas(fake) == [
        ("preprocess", 8 * by_queries),
        ("backward", 2 * by_keys),
        ("postprocess", 8 * by_queries),
    ]
    assert field(fake, "query_blocks", "q") == by_queries


def test_a_section_is_no_larger_than_the_heads(fake, kernels):
    for given, wanted in ((0, 1), (3, 3), (2**30, 2 * 2)):
        call = dense_call()
        call.scheduler.heads_per_section = given
        kernels.launch(call)
        assert field(fake, "scheduler.heads_per_section", "i") == wanted


def test_split_heads_take_more_ctas(fake, kernels):
    call = with_splits(dense_call())
    call.scheduler.heads_per_section = 2**30
    kernels.launch(call)
    by_queries, by_keys = 2 * 5 * 8, 2 * 4 * 2
    assert ctas(fake) == [
        ("preprocess", by_queries),
        ("backward", 3 * by_keys),
        ("postprocess", by_queries + by_keys),
    ]
    assert field(fake, "head_splits", "i") == 3
    assert field(fake, "key_blocks", "q") == 2 * 4
    assert field(fake, "dkv_partial", "q") == WORKSPACE["dkv_partial"]
    assert field(fake, "scheduler.heads_per_section", "i") == 2 * 2 * 3
    kernels.launch(with_splits(packed_call(), 4))
    blocks = 900 // 128 + 2
    assert ctas(fake)[4:] == [
        ("backward", 2 * 4 * blocks),
        ("postprocess", 8 * (700 // 64 + 2) + 2 * blocks),
    ]


def test_a_mean_of_keys_travels_along(fake, kernels):
    call = dense_call()
    call.k_mean = (0x240000, 256, 128)
    kernels.launch(call)
    assert field(fake, "k_mean", "q") == 0x240000


# ------------------------------------------------------------------------------ nothing to do


def test_without_a_row_nothing_is_launched(fake, kernels):
    for call in (dense_call(seqlen_q=0, seqlen_k=0), dense_call(batch=0)):
        kernels.launch(call)
    assert fake.launches == []


def test_without_queries_keys_are_still_written(fake, kernels):
    call = dense_call(seqlen_q=0)
    call.q = call.o = call.dout = call.dq = (0, 0, 1024, 128)
    call.lse = (0, 0, 0)
    call.row_stats = call.dq_accum = call.dq_semaphore = 0
    kernels.launch(call)
    assert ctas(fake) == [("preprocess", 8), ("backward", 16), ("postprocess", 8)]


def test_without_keys_queries_are_still_written(fake, kernels):
    call = dense_call(seqlen_k=0)
    call.k = call.v = call.dk = call.dv = (0, 0, 256, 128)
    kernels.launch(call)
    assert ctas(fake) == [("preprocess", 80), ("postprocess", 80)]
    for at in (1, 2):  # maps of nothing stand for a row of dQ
        assert struct.unpack_from("<7Q", fake.parameter(0), 128 * at)[2] == ADDRESS["dq"]


# -------------------------------------------------------------------------------- workspace


def test_the_workspace_is_linear_in_rows(kernels):
    def sizes(call):
        return _native.backward_workspace(kernels.kernel, call)

    blocks = 8 * 2 * 5
    assert sizes(dense_call()) == {
        "row_stats": 4 * blocks * 2 * BLOCK_M,
        "dq_accum": 4 * blocks * BLOCK_M * 128,
        "dq_semaphore": 4 * blocks,
    }
    assert sizes(with_sinks(dense_call()))["dsinks_partial"] == 4 * blocks
    words = 2 * 2 * 4 * 3 * 128 * (128 + 128)
    assert sizes(with_splits(dense_call()))["dkv_partial"] == 4 * words
    assert "dkv_partial" not in sizes(with_splits(dense_call(), 1))
    packed = 8 * (700 // 64 + 2)
    assert sizes(packed_call())["dq_accum"] == 4 * packed * BLOCK_M * 128
    assert sizes(dense_call(seqlen_q=0)) == dict.fromkeys(list(WORKSPACE)[:3], 0)


def test_the_workspace_of_a_billion_tokens_is_no_32_bit_number(fake, kernels):
    call = packed_call(total_q=2**30, total_k=2**29)
    bytes_of = _native.backward_workspace(kernels.kernel, call)
    assert bytes_of["dq_accum"] == 4 * 128 * 8 * (2**30 + 2 * 64)
    kernels.launch(call)
    assert field(fake, "query_blocks", "q") == 2**24 + 2


def fp8_call(**sizes):
    """With a workspace for what an FP8 forward leaves."""
    call = dense_call(**sizes)
    call.q16, call.key_mean, call.heads_per_q_descale = 0x140000, 0x150000, 1
    return call


@pytest.fixture
def fp8_kernels(driver) -> Kernels:
    return Kernels(driver, **{step: backward_cubin(f"{name}_fp8") for step, name in STEPS.items()})


def test_an_fp8_forward_leaves_8_bit_maps_and_more_workspace(fake, fp8_kernels):
    call = fp8_call()
    call.q_descale, call.v_mean = (0x250000, 8, 1, 0), (0x260000, 256, 128)
    fp8_kernels.launch(call)
    assert field(fake, "q_descale", "q") == 0x250000
    assert field(fake, "v_mean", "q") == 0x260000
    types = [struct.unpack_from("<I", fake.parameter(0), 128 * at)[0] for at in range(4)]
    assert types == [0, 0, 0, 9]  # uint8, and bfloat16 for dO
    blocks = 8 * 2 * 5
    assert _native.backward_workspace(fp8_kernels.kernel, call) == {
        "row_stats": 4 * blocks * (3 * BLOCK_M + 4),
        "dq_accum": 4 * blocks * BLOCK_M * 128,
        "dq_semaphore": 4 * blocks,
        "q16": 2 * blocks * BLOCK_M * 128,
        "key_mean": 4 * 2 * 2 * 128,
    }


def test_fp8_calls_that_are_refused(fake, fp8_kernels, kernels):
    def refused(message, given=fp8_kernels, **changed):
        call = fp8_call()
        for name, value in changed.items():
            setattr(call, name, value)
        with pytest.raises(ValueError, match=message):
            given.launch(call)

    refused("head_dim is 120 elements of 8 bits; it must be a multiple of 16", head_dim=120)
    refused("heads_per_q_descale is 3; supported are 1 and 4", heads_per_q_descale=3)
    refused("q16 is at address 0; it must be a multiple of 128", q16=0)
    refused("key_mean is at address 64", key_mean=64)
    refused("q must have an address and strides", q=(ADDRESS["q"] + 8, 307200, 1024, 128))
    refused("this kernel is for 16-bit inputs", kernels, q_descale=(0x250000, 8, 1, 0))
    call = fp8_call()
    call.k_mean, call.scores.softcap = (0x240000, 256, 128), 1.0
    with pytest.raises(ValueError, match="k_mean is given with softcap"):
        fp8_kernels.launch(call)
    mixed = [fp8_kernels.all[0], *kernels.all[1:]]
    with pytest.raises(ValueError, match="is compiled for a scale_block of 128"):
        _native.launch_backward(*mixed, 0, 0, fp8_call())
    assert fake.launches == []


def test_a_missing_or_crooked_workspace_is_refused(fake, kernels):
    for name in WORKSPACE:
        for address in (0, WORKSPACE[name] + 64):
            call = with_splits(with_sinks(dense_call()))
            setattr(call, name, address)
            with pytest.raises(ValueError, match=rf"{name} is at address {address}; .* of 128"):
                kernels.launch(call)
    assert fake.launches == []


def test_sinks_need_a_place_for_their_gradient(fake, kernels):
    kernels.launch(with_sinks(dense_call()))
    assert field(fake, "dsinks_partial", "q") == WORKSPACE["dsinks_partial"]
    call = with_sinks(dense_call())
    call.scores.sinks = 0
    with pytest.raises(ValueError, match="dsinks is given without sinks"):
        kernels.launch(call)
    call = with_sinks(dense_call())
    call.dsinks = 0
    with pytest.raises(ValueError, match="dsinks_partial is given without dsinks"):
        kernels.launch(call)


# --------------------------------------------------------------------------- what is refused


def change_sequences(call, **values):
    for name, value in values.items():
        setattr(call.sequences, name, value)


BAD = [
    (lambda c: setattr(c, "heads_kv", 0), "heads_kv is 0; it must be positive"),
    (lambda c: setattr(c, "heads_q", 7), "heads_q is 7; it must be a multiple of heads_kv, 2"),
    (lambda c: setattr(c, "head_dim", 136), "head_dim is 136; this kernel supports 1 to 128"),
    (lambda c: setattr(c, "head_splits", 5), "head_splits is 5; supported are 0 to 4, the query"),
    (lambda c: setattr(c, "head_splits", -1), "head_splits is -1; supported are 0 to 4"),
    (lambda c: setattr(c, "head_dim_v", 0), "head_dim_v is 0; this kernel supports 1 to 128"),
    (
        lambda c: setattr(c, "head_dim", 100),
        "head_dim is 100 elements; it must be",
    ),
    (lambda c: setattr(c, "dout", (0x50008, 0, 0, 0)), "dout is at address 327688"),
    (lambda c: setattr(c, "o", (0, 0, 0, 0)), "o is at address 0"),
    (lambda c: setattr(c, "dq", (0x60000, 0, 1028, 128)), "the row stride of dq is 1028 elements"),
    (lambda c: setattr(c, "dk", (0x70000, 4, 256, 128)), "the batch stride of dk is 4 elements"),
    (lambda c: setattr(c, "dv", (0x80000, 0, 256, 127)), "the head stride of dv is 127 elements"),
    (lambda c: setattr(c, "lse", (0, 0, 0)), "lse is null"),
    (lambda c: setattr(c, "q", (0x10008, 2048, 1024, 128)), "address is 65544"),
    (lambda c: setattr(c, "k", (0x20000, 2048, 100, 128)), r"strides\[0\] is 200 bytes"),
    (lambda c: setattr(c, "v", (0x30000, 128_000, 0, 128)), r"strides\[0\] is 0 bytes, less than"),
    (lambda c: setattr(c, "k", (0x20000, 2**61, 256, 128)), "a stride is .* elements of 2 bytes"),
    (lambda c: change_sequences(c, batch=-1), "batch is -1; supported are 0 to"),
    (lambda c: change_sequences(c, max_seqlen_k=-5), "max_seqlen_k is -5"),
    (lambda c: change_sequences(c, total_q=2**31), "total_q is 2147483648"),
    (lambda c: change_sequences(c, batch_k=3), "batch_k is 3; it must be batch, 2"),
    (lambda c: change_sequences(c, leftpad_k=0x1000), "leftpad_k is given"),
    (lambda c: change_sequences(c, kv_batch_idx=0x1000), "kv_batch_idx is given"),
    (lambda c: change_sequences(c, max_seqlen_q=2**31 - 1), r"q has 2147483647 rows and k has 500"),
    (
        lambda c: change_sequences(c, batch=2**27, batch_k=2**27),
        r"more than 2\^31 - 2\^20 tiles of queries",
    ),
    (
        lambda c: change_sequences(c, batch=2**28, batch_k=2**28, max_seqlen_q=0),
        r"more than 2\^31 - 2\^20 tiles of keys",
    ),
    (
        lambda c: (
            change_sequences(c, batch=2**27, batch_k=2**27, max_seqlen_q=0),
            with_splits(c, 2),
        ),
        r"more than 2\^31 - 2\^20 tiles of keys",
    ),
    (
        lambda c: (
            change_sequences(c, batch=2**26, batch_k=2**26, max_seqlen_q=150),
            with_splits(c, 2),
        ),
        r"more than 2\^31 - 2\^20 tiles of queries and keys",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_the_kernels_cannot_take_is_refused(fake, kernels, change, message):
    call = dense_call()
    change(call)
    with pytest.raises(ValueError, match=message):
        kernels.launch(call)
    assert fake.launches == []


def test_only_kernels_of_the_backward_are_launched(driver, fake):
    wrong = {
        "preprocess": (fake_cubin(), "forward is not a preprocess kernel"),
        "backward": (backward_cubin(STEPS["preprocess"]), "preprocess is not a backward kernel"),
        "postprocess": (
            backward_cubin(STEPS["preprocess"]),
            "preprocess is not a postprocess kernel",
        ),
    }
    for step, (image, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            Kernels(driver, **{step: image}).launch(dense_call())
    assert fake.launches == []


@pytest.mark.parametrize("step", ["preprocess", "postprocess"])
@pytest.mark.parametrize("name", ["kBlockM", "kBlockN", "kHeadDim", "kHeadDimV"])
def test_kernels_of_other_tiles_do_not_go_together(step, name, driver):
    kernels = Kernels(driver, **{step: backward_cubin(STEPS[step], **{name: 32})})
    with pytest.raises(ValueError, match=f"{step} is compiled for a {name} of 32, .* for "):
        kernels.launch(dense_call())

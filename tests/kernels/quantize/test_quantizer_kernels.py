"""The quantizer kernels on the simulated device against the portable quantizer, bit by bit.

Everything but a computed mean is specified exactly, rotary embedding and rotation included; a mean
is a sum in another order, so data behind it may differ by one step of e4m3. Launches have guarded
and poisoned outputs, adversarial schedules, and read nothing but what they are given.
"""

import math

import pytest
import torch
from torch import Tensor

import flash8
from cases import cumulative, int32
from flash8 import fp8
from flash8.backends.hopper import quantize as quantizer
from flash8.call.request import Request
from flash8.tensors.float8 import E4M3, E5M2
from flash8.tensors.rotary import Rope
from quantizer_cases import assert_equal, draw, ragged, raw, tables, tensors_of
from quantizer_device import device, kernels, quantizers_only
from simulated_device import missing_compiler

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel"),
]


def on_kernels(monkeypatch, x, granularity, *, seed=0, **options):
    with kernels(monkeypatch, x, *tensors_of(options), seed=seed):
        result = fp8.quantize(x, granularity, **options)
    assert device().report()["kernel"] == "flash8_quantize_cast"
    return result


def check(monkeypatch, x, granularity, *, seeds=(1,), **options) -> None:
    want = fp8.quantize(x, granularity, **options)
    for seed in seeds:
        assert_equal(on_kernels(monkeypatch, x, granularity, seed=seed, **options), want)


STEPS = {
    "plain": lambda d: {},
    "rotation": lambda d: {"hadamard": 3},
    "mean": lambda d: {"smooth_k": draw(2, 3, d, dtype=torch.float32, seed=7)},
    "shared mean, rotated": lambda d: {
        "smooth_v": draw(3, d, dtype=torch.float32, seed=7),
        "hadamard": True,
    },
    "rope": lambda d: {"rope": Rope(*tables(d), int32((5, 70)))},
    "rope by halves": lambda d: {"rope": Rope(*tables(d), None, False)},
    "part of a head": lambda d: {"rope": Rope(*tables(32), int32((0, 9)), False)},
    "everything": lambda d: {
        "rope": Rope(*tables(32), int32((3, 0))),
        "smooth_k": draw(2, 3, d, dtype=torch.float32, seed=7),
        "hadamard": 11,
    },
}


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("steps", STEPS)
def test_blocks(monkeypatch, steps, d):
    check(monkeypatch, draw(2, 150, 3, d), "block", **STEPS[steps](d))


@pytest.mark.parametrize("granularity", ["tensor", "head", "block", "page"])
def test_granularities_and_seeds(monkeypatch, granularity):
    x = draw(2, 300, 2, 64) * torch.rand(2, 300, 2, 1).bfloat16() * 10
    check(monkeypatch, x, granularity, hadamard=True, seeds=range(6))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("given", [False, True], ids=["amax", "amax of a mean's rest"])
def test_part_of_a_head_before_another_pass(monkeypatch, given, d):
    """Lanes that do not turn take part in the exchange of those that do, in every kernel."""
    options = {"smooth_k": draw(2, 3, d, dtype=torch.float32, seed=7)} if given else {}
    rope = Rope(*tables(32), int32((0, 9)), False)
    check(monkeypatch, draw(2, 150, 3, d), "head", rope=rope, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("out", [E4M3, E5M2])
def test_types(monkeypatch, dtype, out):
    options = STEPS["everything"](128)
    check(monkeypatch, draw(2, 129, 3, 128, dtype=dtype), "head", dtype=out, **options)


@pytest.mark.parametrize("d", [16, 80, 160, 192])
def test_head_dims_that_do_not_fill_a_tile(monkeypatch, d):
    check(monkeypatch, draw(1, 40, 2, d), "block", hadamard=True, v_colmajor=True)


@pytest.mark.parametrize("page_size", [16, 64, 128, 256])
def test_pages(monkeypatch, page_size):
    x = draw(3, page_size, 2, 128) * torch.arange(1, 4).view(3, 1, 1, 1)
    check(monkeypatch, x, "page", smooth_k=draw(2, 128, dtype=torch.float32, seed=1), hadamard=2)


LENGTHS = (130, 0, 1, 256, 0, 200)


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
@pytest.mark.parametrize("behind", [0, 37])
@pytest.mark.parametrize("transpose", [False, True])
def test_packed_sequences(monkeypatch, granularity, behind, transpose):
    """With empty sequences, used lengths, and rows that belong to nobody."""
    cu = cumulative(LENGTHS)
    x = draw(int(cu[-1]) + behind, 2, 64)
    x[int(cu[-1]) :] = math.inf
    offsets = int32(range(0, 60, 10))
    rope = Rope(*tables(64), offsets)
    mean = draw(6, 2, 64, dtype=torch.float32, seed=3)
    used = int32((100, 0, 1, 256, 0, 3))
    options = {"cu_seqlens": cu, "rope": rope, "smooth_k": mean, "v_colmajor": transpose}
    check(monkeypatch, x, granularity, **options, seeds=(1, 2))
    x[100:130] = math.nan  # not used
    check(monkeypatch, x, granularity, **options, seqused=used)


@pytest.mark.parametrize("sequences", [33, 65])
def test_one_sequence_more_than_lanes(monkeypatch, sequences):
    """Every sequence has a mean of its own, and with `behind` rows the last one is found by it."""
    cu = cumulative(ragged(sequences))
    x = draw(int(cu[-1]) + 3, 1, 64) * 3.0
    mean = draw(sequences, 1, 64, dtype=torch.float32, seed=3)
    check(monkeypatch, x, "block", cu_seqlens=cu, smooth_k=mean, v_colmajor=True)
    check(monkeypatch, x, "head", cu_seqlens=cu, rope=Rope(*tables(64), int32(range(sequences))))
    want = fp8.quantize(x, "head", cu_seqlens=cu, smooth_k=True)
    found = on_kernels(monkeypatch, x, "head", cu_seqlens=cu, smooth_k=True)
    torch.testing.assert_close(found.mean, want.mean, rtol=2e-6, atol=1e-5)


def test_used_lengths_of_a_dense_tensor(monkeypatch):
    x = draw(3, 200, 2, 64)
    x[0, 70:] = 1e9
    for granularity in ("tensor", "head", "block"):
        for transpose in (False, True):
            used = int32((70, 200, 0))
            check(monkeypatch, x, granularity, seqused=used, v_colmajor=transpose)


SPECIAL = {
    "zeros": [0.0, -0.0],
    "infinite": [1.0, math.inf, -math.inf, 3.0],
    "nan": [2.0, math.nan, -1.0, math.inf],
    "nothing finite": [math.nan, math.inf],
    "tiny": [1e-40, -3e-39, 1e-38],
    "below the least descale": [5e-36, 1e-36, -1e-37],
    "huge": [3e38, -1e38, 1e30, 1e-3],
    "halves": [1.0, 448.0, 17.0, 18.0, 19.0, 0.0009765625, 0.0029296875, -27.0],
}


@pytest.mark.parametrize("values", SPECIAL)
@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_special_values(monkeypatch, granularity, dtype, values):
    given = torch.tensor(SPECIAL[values])
    picks = torch.randint(len(given), (1, 140, 2, 64))
    x = given[picks].to(dtype)
    check(monkeypatch, x, granularity)
    check(monkeypatch, x, granularity, hadamard=True)
    check(monkeypatch, x, granularity, dtype=E5M2, v_colmajor=True)


def test_a_given_descale_and_the_amax_of_this_step(monkeypatch):
    """Delayed scaling: one launch casts by the old scale and gathers the amax for the next."""
    x, descale = draw(2, 200, 2, 128, scale=3.0), torch.tensor(0.003)
    for start in (0.0, 1e6):
        want, have = torch.tensor(start), torch.tensor(start)
        expected = fp8.quantize(x, descale=descale, amax=want, hadamard=True)
        found = on_kernels(monkeypatch, x, "tensor", descale=descale, amax=have, hadamard=True)
        assert_equal(found, expected)
        assert torch.equal(have, want)
    by_head = torch.rand(2, 2) * 0.01
    check(monkeypatch, x, "head", descale=by_head)
    check(monkeypatch, x, "block", descale=torch.rand(2, 2, 2) * 0.01)
    check(monkeypatch, x, "page", descale=torch.rand(2, 2, 1) * 0.01)
    # Near the largest and the smallest that are descales.
    for extreme in (8e37, 2e-38):
        check(monkeypatch, x, "tensor", descale=torch.tensor(extreme))


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many e4m3 values lie between two."""

    def rank(x: Tensor) -> Tensor:
        bits = raw(x).int()
        return torch.where(bits >= 128, 128 - bits, bits)

    return (rank(a) - rank(b)).abs()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hadamard", [None, 4])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_mean_of_its_own(monkeypatch, packed, hadamard, d):
    x = draw(586 if packed else 2, *(() if packed else (300,)), 2, d) + 5.0
    if packed:
        options = {"cu_seqlens": cumulative((300, 0, 1, 285))}
    else:
        x[0, 7, 0, 3], x[1, 299, 1, 5] = math.inf, math.nan
        options = {"seqused": int32((290, 300))}
    options |= {"smooth_k": True, "hadamard": hadamard, "rope": Rope(*tables(d), None, True)}
    want = fp8.quantize(x, "block", **options)
    first = on_kernels(monkeypatch, x, "block", seed=0, **options)
    torch.testing.assert_close(first.mean, want.mean, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(first.descale, want.descale, rtol=1e-5, atol=0.0)
    assert steps_apart(first.data, want.data).max() <= 1
    assert (raw(first.data) != raw(want.data)).float().mean() < 1e-3
    for seed in range(1, 5):
        again = on_kernels(monkeypatch, x, "block", seed=seed, **options)
        assert torch.equal(raw(again.data), raw(first.data))
        assert torch.equal(again.descale, first.descale) and torch.equal(again.mean, first.mean)
    # Given the same mean, every bit is specified again.
    if hadamard is None:
        check(monkeypatch, x, "block", **options | {"smooth_k": first.mean})


def test_strided_and_misaligned_inputs(monkeypatch):
    qkv = draw(2, 100, 3, 2, 64)
    check(monkeypatch, qkv[:, :, 1], "block")
    check(monkeypatch, qkv[:, :, 2].transpose(1, 2)[:, :, :2], "head")
    shifted = draw(2 * 100 * 2 * 64 + 1)[1:].view(2, 100, 2, 64)
    want = fp8.quantize(shifted, "block")
    with device().serving_cpu_tensors(monkeypatch):  # copied, so no bounds are known
        assert_equal(fp8.quantize(shifted, "block"), want)


def test_transposed_data_come_back(monkeypatch):
    for options, shape in (
        ({}, (2, 150, 2, 64)),
        ({"cu_seqlens": cumulative((20, 0, 130))}, (150, 2, 64)),
    ):
        v = draw(*shape)
        plain = fp8.quantize(v, "block", **options)
        transposed = on_kernels(monkeypatch, v, "block", v_colmajor=True, **options)
        assert torch.equal(fp8.dequantize(transposed), fp8.dequantize(plain))


# ------------------------------------------------------------------ which calls, how many launches

LAUNCHES = {
    "block": ({}, "cast"),
    "page": ({}, "cast"),
    "head": ({}, "amax cast"),
    "tensor": ({}, "amax cast"),
    "tensor, given": ({"descale": torch.tensor(1.0)}, "cast"),
    "block, smooth": ({"smooth": True}, "mean mean_finish cast"),
    "head, smooth": ({"smooth": True}, "mean mean_finish amax cast"),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches(case):
    options, names = LAUNCHES[case]
    request = Request(draw(2, 128, 2, 64), case.partition(",")[0], **options)
    assert " ".join(quantizer.jobs(request)) == names
    long_pages = Request(draw(2, 129, 2, 64), "page")
    assert quantizer.jobs(long_pages) == ("amax", "cast")


@pytest.mark.parametrize("transpose", [False, True])
def test_a_block_is_read_once_and_written_once(monkeypatch, transpose):
    x = draw(2, 256, 2, 128)
    scaled = on_kernels(monkeypatch, x, "block", v_colmajor=transpose)
    moved = device().report()["statistics"]["bytes"]
    assert moved["global load"] == x.numel() * 2
    assert moved["global store"] == x.numel() + 4 * scaled.descale.numel()


def test_offsets_are_searched_and_not_all_read(monkeypatch):
    """Of eight times as many sequences every thread reads three offsets more, not all of them."""
    threads, loaded = 128, {}
    for sequences in (512, 4096):
        x = draw(sequences, 1, 64)
        cu_seqlens = int32(range(sequences + 1))
        scaled = on_kernels(monkeypatch, x, "block", cu_seqlens=cu_seqlens)
        bytes_ = device().report()["statistics"]["bytes"]["global load"]
        loaded[sequences] = bytes_ / scaled.descale.numel()
    assert 0 < loaded[4096] - loaded[512] <= 3 * 4 * threads


REFUSED = {
    "fp64": (draw(1, 9, 1, 64, dtype=torch.float64), {}, "no quantizer kernel for torch.float64"),
    "head_dim": (draw(1, 9, 1, 40), {}, "head_dim is 40"),
    "wide": (draw(1, 9, 1, 272), {}, "head_dim is 272"),
    "rotary_dim": (
        draw(1, 9, 1, 64),
        {"rope": Rope(*tables(24))},
        "rotary_dim is 24, which is not a multiple of 16",
    ),
    "halves": (
        draw(1, 9, 1, 64),
        {"rope": Rope(*tables(48), None, False)},
        "rotary_dim is 48, which is not a multiple of 32",
    ),
    "empty": (draw(2, 0, 1, 64), {}, "nothing to quantize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_kernel_is_served_all_the_same(monkeypatch, case):
    x, options, reason = REFUSED[case]
    assert reason in quantizer.refusal(Request(x, "block", **options))
    want = fp8.quantize(x, "block", **options)
    with device().serving_cpu_tensors(monkeypatch):
        assert_equal(fp8.quantize(x, "block", **options), want)


# --------------------------------------------------------------------------------- as torch sees it


def test_fake_tensors_agree(monkeypatch):
    x = draw(2, 150, 2, 64)
    mean = draw(2, 64, dtype=torch.float32)
    cu = cumulative((50, 100))
    nothing = (None,) * 3
    with device().serving_cpu_tensors(monkeypatch):
        for arguments in (
            (x, "block", E4M3, None, False, None, *nothing, True, None, None, None, None, True),
            (x, "head", E4M3, 3, True, None, *nothing, True, None, None, None, None, False),
            (x[0], "block", E4M3, 3, False, mean, *nothing, True, cu, None, None, None, True),
            (x, "tensor", E5M2, None, False, None, *nothing, True, None, None, mean[0, 0], None, 0),
        ):
            torch.library.opcheck(
                torch.ops.flash8.quantize.default, arguments, test_utils="test_faketensor"
            )


@pytest.mark.parametrize("delayed", [False, True])
def test_fp8_attention_on_kernels_eager_and_compiled(monkeypatch, delayed):
    q, k, v = (draw(2, 140, h, 64, seed=s) for s, h in enumerate((4, 2, 2)))

    def attend(recipe):
        return flash8.fp8_attention(q, k, v, recipe, causal=True)

    def recipe():
        return fp8.DelayedScaling() if delayed else fp8.BlockScaling(hadamard=True)

    kinds = [recipe() for _ in range(3)]
    want = attend(kinds[0])
    with quantizers_only(monkeypatch):
        assert torch.equal(attend(kinds[1]), want)
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(kinds[2]), want)
    if delayed:
        assert (kinds[0].amax[:3] > 0).all()
        for other in kinds[1:]:
            assert torch.equal(other.amax, kinds[0].amax)

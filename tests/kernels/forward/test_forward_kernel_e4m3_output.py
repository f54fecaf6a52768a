"""Forward kernels with an e4m3 output, on the simulated device: its bits, and every row of it."""

import math
from dataclasses import replace

import pytest
import torch

import fp8_forward_cases as fp8_cases
from defaults import by_default
from e4m3_output_cases import (
    BF16,
    EPILOGUE,
    FP8,
    IN_FP32,
    LARGEST_OF_TWO_LANES,
    ROW,
    E4m3Kernel,
    as_bits,
    changed,
    check,
    check_scales,
    compare,
    in_fp32,
    kernel,
    launch,
    quantized,
    spread,
    wide,
)
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import device, draw, int32, masks, packed, real, sequences
from forward_cases import launch as launch_wide
from forward_launch import Call, Schedule
from fp8_forward_cases import changed_ptx
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

OTHERS = (
    replace(FP8, pack_gqa=True),
    replace(FP8, mask="none"),
    replace(FP8, scales="block"),
    replace(FP8, mask="local", softcap=True),
    replace(FP8, head_dim=256, head_dim_v=256),
    replace(FP8, v_colmajor=True),
    replace(BF16, pack_gqa=True),
    replace(BF16, cache="e4m3"),
    replace(BF16, head_dim=256, head_dim_v=256),
    ForwardVariant("fp16", 192, 128, mask="local", out="e4m3"),
    ForwardVariant("bf16", 128, 128, cluster=True, out="e4m3"),
)
VARIANTS = by_default((FP8, BF16, *OTHERS), (FP8, BF16))
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 127, 129, 1, 1),
    (1, 129, 203, 2, 1),
    (2, 193, 131, 4, 2),
    (1, 200, 50, 1, 1),
    (2, 3, 0, 1, 1),
]


def dense_call(variant, batch, seqlen_q, seqlen_k, heads, heads_kv, **given) -> Call:
    if variant.dtype == "e4m3":
        return fp8_cases.dense_call(variant, batch, seqlen_q, seqlen_k, heads, heads_kv, **given)
    q, k, v = draw(variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch)
    if variant.cache == "e4m3":
        given["descales"] = fp8_cases.cache_descales(batch, heads_kv)
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant), **given)


def packed_call(variant, lengths=(1, 0, 127, 128, 129, 37, 2), heads=4, heads_kv=2) -> Call:
    """Lengths of one row more and less than a tile, primes, none; not all rows are used."""
    offsets = packed(lengths)
    batch, total = len(lengths), int(offsets[-1])
    q, k, v = draw(variant, total, total, heads, heads_kv)
    scales = {}
    if variant.dtype == "e4m3":
        blocks = total // 128 + batch
        counts = (batch, heads, heads_kv, blocks, blocks)
        scales = fp8_cases.descales(variant, *counts, packed=True)
    elif variant.cache == "e4m3":
        scales = fp8_cases.cache_descales(batch, heads_kv)
    used_q, used_k = (int32([max(0, n - less) for n in lengths]) for less in (0, 1))
    return Call(
        q,
        k,
        v,
        variant.head_dim**-0.5,
        **masks(variant),
        indices={
            "cu_seqlens_q": offsets,
            "cu_seqlens_k": offsets,
            "seqused_q": used_q,
            "seqused_k": used_k,
        },
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
        descales=scales,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(variant, shape):
    check(variant, dense_call(variant, *shape), seeds=(0, 1))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.values[0].cluster])
def test_packed(variant):
    check(variant, packed_call(variant), schedule=Schedule(num_ctas=3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_lie_apart(variant):
    call = dense_call(variant, 2, 70, 90, 4, 2)
    found, apart = launch(variant, call), launch(variant, call, gap=48)
    assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))


def bits_call(variant) -> Call:
    """Dense, with all that a kernel does to O behind its sums."""
    call = dense_call(variant, 2, 140, 200, 4, 2, s_aux=torch.linspace(-3.0, 3.0, 4))
    if variant.dtype != "e4m3":
        return call
    channels = torch.linspace(-1.0, 1.0, 4 * variant.head_dim_v).view(2, 2, -1)
    return replace(call, v_mean=channels, v_channel_descale=channels + 1.5)


@pytest.mark.parametrize("variant", by_default((FP8, BF16, *OTHERS), (FP8,)))
def test_the_bits_are_those_of_quantizing_its_own_output(variant, tmp_path):
    call = bits_call(variant)
    o = in_fp32(changed(tmp_path, variant, *IN_FP32), call)
    found = launch(variant, call)
    data, scale = quantized(o)
    assert torch.equal(found.data, data)
    assert torch.equal(found.scale, scale)
    given = float(o.abs().max() / 300.0)  # some are saturated
    static = launch(variant, call, out_scale=given)
    inverse = torch.tensor(given).reciprocal()
    assert torch.equal(static.data, as_bits((o * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)))
    assert static.scale.isnan().all(), "a scale was written beside the given one"


@pytest.mark.parametrize("variant", VARIANTS)
def test_beside_the_output_of_16_bits(variant):
    """The same O, but for two roundings; the same LSE to the bit."""
    call = dense_call(variant, 1, 140, 300, 2, 1)
    if variant.cluster:
        call = dense_call(variant, 1, 256, 300, 2, 1)
    found = launch(variant, call)
    o, lse = launch_wide(wide(variant), call)
    assert torch.equal(found.lse, lse)
    allowed = o.float().abs() * 0.07 + found.real().abs().amax(-1, keepdim=True) * 2.0**-15
    assert ((found.real() - o.float()).abs() <= allowed).all()


@pytest.mark.parametrize("variant", [FP8, BF16], ids=lambda v: v.name)
def test_one_visible_key(variant):
    """O is V then, times its descale, but for the reciprocal of a sum of one."""
    call = dense_call(variant, 2, 1, 1, 4, 2)
    found = launch(variant, call)
    for used in sequences(call):
        v = real(call, "v", used, torch.float32).repeat_interleave(2, 1)
        data, scale = quantized(v)
        assert torch.equal(found.data[used.index], data)
        torch.testing.assert_close(found.scale[used.index, None], scale, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("variant", [FP8, BF16], ids=lambda v: v.name)
def test_nan_stays_and_counts_for_nothing(variant):
    """A NaN of V is that of its channel; the scale is of the other channels."""
    call = dense_call(variant, 1, 40, 40, 1, 1)
    call.v[0, 20, 0, 5] = math.nan
    found = launch(variant, call)
    o = found.real()
    assert o[0, 20:, 0, 5].isnan().all()
    assert not o[..., :5].isnan().any() and not o[..., 6:].isnan().any()
    finite = found._replace(data=found.data.clone())
    finite.data[..., 5] = 0
    check_scales(finite)


def test_infinities_are_448():
    """V of 16 bits may be infinite: it is stored as 448 and counts for nothing."""
    call = dense_call(BF16, 1, 1, 1, 1, 1)
    call.v[0, 0, 0, 3], call.v[0, 0, 0, 9] = math.inf, -math.inf
    found = launch(BF16, call)
    data = found.data.view(torch.float8_e4m3fn).float().flatten()
    assert data[3] == 448.0 and data[9] == -448.0
    finite = call.v.float().flatten()
    finite[3] = finite[9] = 0.0
    assert found.scale.item() == finite.abs().max() / 448.0


def scaled_by(factor: float) -> Call:
    call = dense_call(FP8, 1, 70, 90, 2, 1)
    return replace(call, descales={**call.descales, "v_descale": torch.full((1, 1), factor)})


@pytest.mark.parametrize("factor", [2.0**-105, 2.0**-100, 2.0**100])
def test_extreme_scales(factor):
    check(FP8, scaled_by(factor), seeds=(0,))


def test_the_smallest_scale():
    """Its inverse is finite. O is smaller than 448 times as much."""
    channels = torch.full((1, 1, 128), 2.0**-20)
    found = launch(FP8, replace(scaled_by(2.0**-105), v_channel_descale=channels))
    assert (found.scale == 2.0**-126).all() and found.data.any()
    assert (found.data.view(torch.float8_e4m3fn).float().abs() < 128.0).all()


def test_zeros_have_the_scale_1():
    call = dense_call(FP8, 1, 70, 90, 2, 1)
    call.v.view(torch.uint8).zero_()
    found = launch(FP8, call)
    assert not found.data.any() and (found.scale == 1.0).all()


@pytest.mark.parametrize("variant", [FP8, BF16], ids=lambda v: v.name)
@pytest.mark.parametrize("out_scale", [None, 0.01])
def test_rows_without_a_sequence(variant, out_scale):
    """Rows before the first and after the last sequence are zeros with a scale of 1."""
    call = packed_call(variant, (5, 20, 9), 2, 1)
    moved = call.indices["cu_seqlens_q"].clamp(3, 30)
    indices = {**call.indices, "cu_seqlens_q": moved, "cu_seqlens_k": moved}
    del indices["seqused_q"], indices["seqused_k"]
    found = launch(variant, replace(call, indices=indices), out_scale=out_scale)
    unused = torch.tensor([*range(3), *range(30, 34)])
    assert not found.data[unused].any() and (found.lse[:, unused] == -math.inf).all()
    assert found.data[3:30].view(-1, 128).any(-1).all()
    if out_scale is None:
        assert (found.scale[unused] == 1.0).all() and not found.scale.isnan().any()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_invalid_scale_shows(value):
    found = launch(FP8, dense_call(FP8, 1, 20, 20, 1, 1), out_scale=value)
    assert (found.data & 0x7F == 0x7F).all()


def test_given_scale_of_packed_sequences():
    check(FP8, packed_call(FP8), out_scale=0.01)


FIRST = "largest = max(largest, __shfl_xor_sync(0xffffffff, largest, 1));"
SCALES = "head * E4m3Row<Config>::kScales"
SEQUENCE = "int64_t{batch} * params.sequences.max_seqlen_q"
HALVES = "kLowHalves = 0x5410, kHighHalves = 0x7632"
FINITE = "return bits < kInfinity ? bits : 0;"
GIVEN = "checked_descale(*out_scale.given)"
NO_SEQUENCE = "forward/zero_unused_rows.cuh"
#: What is wrong: the variant, and an edit of its sources.
MUTATIONS = {
    "the largest of the other two lanes": (FP8, (ROW, FIRST, "")),
    "scales of the first head": (FP8, (EPILOGUE, SCALES, f"0 * {SCALES}")),
    "scales of the first sequence": (FP8, (EPILOGUE, SEQUENCE, "0")),
    "chunks of another lane": (
        FP8,
        (ROW, "kChunk * (first + lane)", "kChunk * (first + (lane ^ 1))"),
    ),
    "the accumulator's order": (FP8, (ROW, "Config::kFp8 ? j % 2 : j / 2", "j / 2")),
    "halves swapped": (BF16, (ROW, HALVES, "kLowHalves = 0x7632, kHighHalves = 0x5410")),
    "no sum of weights": (BF16, (EPILOGUE, "x = scaled(x, factors.normalise);", "")),
    "rows of no sequence without scales": (FP8, (NO_SEQUENCE, "1.0f;", "0.0f;")),
    "rows of no sequence of 16 bits": (
        FP8,
        (NO_SEQUENCE, "16 / sizeof(Stored)", "8 / sizeof(Stored)"),
    ),
    "infinities count": (BF16, ("quantize/arithmetic.cuh", FINITE, "return bits;")),
    "the given scale multiplies": (FP8, (ROW, f"quantize::reciprocal({GIVEN})", GIVEN)),
    "any given scale": (FP8, (ROW, GIVEN, "*out_scale.given")),
}


def everything(variant: ForwardVariant, run) -> None:
    """The cases of this file that tell of a wrong kernel; run is in the place of `launch`."""
    dense = dense_call(variant, 2, 70, 90, 4, 2)
    compare(dense, run(dense))
    of_rows = packed_call(variant, (5, 20, 9), 2, 1)
    moved = of_rows.indices["cu_seqlens_q"].clamp(3, 30)
    indices = {"cu_seqlens_q": moved, "cu_seqlens_k": moved}
    of_rows = replace(of_rows, indices=indices)
    compare(of_rows, run(of_rows))
    scale = float(run(dense).scale.max())
    compare(dense, spread(run(dense, out_scale=scale), scale), finds_scales=False)
    assert (run(dense, out_scale=0.0).data & 0x7F == 0x7F).all()
    if variant.dtype != "e4m3":
        call = dense_call(variant, 1, 1, 1, 1, 1)
        call.v[0, 0, 0, 3] = math.inf
        assert run(call).scale.isfinite().all()


@pytest.mark.parametrize("variant", [FP8, BF16], ids=lambda v: v.name)
def test_a_sound_kernel_passes_them(variant):
    everything(variant, lambda call, **given: launch(variant, call, **given))


@pytest.mark.parametrize("name", by_default(MUTATIONS, []))
def test_a_wrong_kernel_is_found(name, tmp_path):
    variant, edit = MUTATIONS[name]
    wrong = changed(tmp_path, variant, edit)
    with pytest.raises((AssertionError, RuntimeError)):
        everything(variant, wrong.quantize)


@pytest.mark.parametrize("variant", [FP8, BF16], ids=lambda v: v.name)
def test_the_largest_of_two_lanes_is_found(variant):
    wrong = E4m3Kernel(device().driver, changed_ptx(variant, *LARGEST_OF_TWO_LANES))
    with pytest.raises(AssertionError):
        everything(variant, wrong.quantize)


def test_the_kernel_says_what_it_writes():
    assert kernel(FP8).info.out_e4m3 and kernel(BF16).info.out_e4m3

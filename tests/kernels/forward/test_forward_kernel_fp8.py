"""The FP8 forward kernel on the simulated device, whose tensor cores accumulate as Hopper's do."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

import flash8
import oracle
from defaults import by_default
from flash8 import fp8
from flash8.backends.cpu import operands
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from forward_cases import SHAPES, check, compare, device, draw, int32, kernel, launch, packed
from forward_launch import Call, Schedule
from fp8_forward_cases import (
    changed_kernel,
    check_one_visible_key,
    check_visible_nan,
    dense_call,
    descales,
    from_tensors,
    packed_call,
    wide,
)
from simulated_device import missing_compiler
from tolerances import (
    FP8_ACCUMULATION,
    FP8_REL_L2,
    FP8_SINK_KEY,
    FP8_UNQUANTISED,
    Bound,
    check_fp8_lse,
    rel_l2,
)

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

DENSE = ForwardVariant("e4m3", 128, 128, scales="head")
CAUSAL = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")
LOCAL = ForwardVariant("e4m3", 64, 64, mask="local", softcap=True, scales="block")
WIDE = ForwardVariant("e4m3", 256, 256, mask="causal", scales="head")
#: Around the widths of the tiles.
WIDTHS = [(1, 64, 577, 3, 1), (1, 70, 223, 1, 1), (1, 33, 225, 1, 1), (1, 33, 129, 1, 1)]
DEFAULT = (DENSE, CAUSAL, LOCAL, WIDE)
#: The widest K beside V for which tiles are wide: the most shared memory.
UNEQUAL = ForwardVariant("e4m3", 256, 128, mask="causal", scales="head")
OF_FP8 = [v for v in SHIPPED if v.dtype == "e4m3" and v.out == "wide"]
SLOW = (UNEQUAL, *(v for v in OF_FP8 if not v.paged and v not in DEFAULT))
VARIANTS = [pytest.param(v, id=v.name) for v in DEFAULT] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in SLOW
]
#: NUMERICS allows .012 against a block-exact emulator; the CPU backend can be one.
SPECIFIED = Bound(0.001, 1.8e-5, "kernel against the CPU backend that emulates its tensor cores")


def oracle_of(call: Call):
    options = {"causal": call.causal, "softmax_scale": call.softmax_scale}
    return oracle.attention(call.q, call.k, call.v, **options, **call.descales)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDTHS], ids=str)
def test_dense(variant, shape):
    check(variant, dense_call(variant, *shape))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_with_used_lengths(variant):
    check(variant, packed_call(variant), Schedule(num_ctas=3))


def test_left_padding_and_cache_rows():
    given = {"leftpad_k": [7, 0], "seqused_k": [150, 33], "kv_batch_idx": [1, 0]}
    indices = {name: int32(values) for name, values in given.items()}
    check(WIDE, dense_call(WIDE, 2, 40, 150, 2, 2, indices=indices))


def cache_rows_call(rows=(3, 0, 3)) -> Call:
    """Blocks of Q belong to the sequence, those of K and V to the row of the cache."""
    indices = {"seqused_k": int32([260, 140, 129]), "kv_batch_idx": int32(rows)}
    call = dense_call(CAUSAL, 3, 140, 260, 2, 2)
    _, k, v = draw(CAUSAL, 1, 260, 2, 2, batch=5, seed=1)
    blocks = descales(CAUSAL, 5, 2, 2, 1, 3)
    scales = {**blocks, "q_descale": call.descales["q_descale"]}
    return replace(call, k=k, v=v, indices=indices, descales=scales)


def test_blocks_of_cache_rows():
    check(CAUSAL, cache_rows_call(), seeds=(1,))


@pytest.mark.parametrize("name", ["k_descale", "v_descale"])
def test_the_bounds_catch_descales_of_another_row(name):
    call = cache_rows_call()
    scales = {**call.descales, name: call.descales[name].roll(1, 0)}
    o, lse = launch(CAUSAL, replace(call, descales=scales))
    with pytest.raises(AssertionError):
        compare(call, o, lse)


BLOCKS_OF_ROWS = {
    "keys by the sequence": (
        "attention/descales.cuh",
        "info.batch_k * ref.batch_stride",
        "batch * ref.batch_stride",
    ),
    "queries by the row": (
        "attention/descales.cuh",
        "values[info.batch_q * ref.batch_stride",
        "values[info.batch_k * ref.batch_stride",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS_OF_ROWS)
def test_the_bounds_catch_blocks_by_the_wrong_number(name, tmp_path):
    changed = changed_kernel(tmp_path, CAUSAL, BLOCKS_OF_ROWS[name])
    call = cache_rows_call()
    with pytest.raises((AssertionError, RuntimeError)):
        compare(call, *changed(call, Schedule()))


@pytest.mark.parametrize("mask", by_default(["none", "causal"], ["causal"]))
def test_packed_query_heads(mask):
    """Rows of one tile belong to heads with descales of their own."""
    variant = ForwardVariant("e4m3", 128, 128, mask=mask, scales="head", pack_gqa=True)
    call = dense_call(variant, 2, 37, 300, 8, 2, s_aux=torch.linspace(-1.0, 6.0, 8))
    q_descale = torch.linspace(0.5, 1.1, 16).reshape(2, 8) / 32
    check(variant, replace(call, descales={**call.descales, "q_descale": q_descale}))


@pytest.mark.parametrize("variant", [CAUSAL, LOCAL], ids=lambda v: v.name)
def test_sinks(variant):
    check(variant, dense_call(variant, 1, 70, 330, 2, 1, s_aux=torch.tensor([0.5, 9.0])))


def test_head_dim_is_filled_with_zeros():
    call = dense_call(CAUSAL, 1, 100, 140, 2, 1)
    check(CAUSAL, replace(call, **{x: getattr(call, x)[..., :80].contiguous() for x in "qkv"}))


def test_many_seeds_give_the_same_bits():
    check(CAUSAL, dense_call(CAUSAL, 1, 130, 260, 1, 1), seeds=range(12))


# ------------------------------------------------------------------- the bounds of the numerics


def specified(call: Call, block_n: int):
    """What the CPU backend computes with tiles of the kernel and tensor cores like Hopper's."""
    with fp8.study(accumulation="hopper"), mock.patch.object(operands, "FP8_BLOCK_N", block_n):
        return flash8.flash_attn_func(
            call.q, call.k, call.v, causal=call.causal, return_attn_probs=True, **call.descales
        )


@pytest.mark.parametrize("variant", [DENSE, CAUSAL, WIDE], ids=lambda v: v.name)
def test_the_cpu_backend_specifies_it(variant):
    call = dense_call(variant, 1, 140, 700, 2, 1)
    want, want_lse = specified(call, kernel(variant).info.block_n)
    o, lse = launch(variant, call)
    SPECIFIED.check("O", rel_l2(o, want))
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("variant", [DENSE, CAUSAL], ids=lambda v: v.name)
@pytest.mark.parametrize(
    "keys", [16384, pytest.param(131072, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_accumulation_over_many_keys(variant, keys):
    """V of mean 0.5: without promotion the error is 0.11 at 16k keys and 0.46 at 128k."""
    call = from_tensors(*wide(16, keys, mean_v=0.5), causal=variant.mask == "causal")
    o, lse = launch(variant, call)
    exact, exact_lse = oracle_of(call)
    FP8_ACCUMULATION.check("O", rel_l2(o, exact))
    check_fp8_lse("LSE", lse, exact_lse)


@pytest.mark.parametrize("position", [0, 1023, 2047])
def test_one_key_far_above_the_rest(position):
    q, k, v = wide(32, 2048, mean_v=0.5)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, position, :, 0] = 13.0 * 128**0.5 / 8.0
    v[:, position] = 0.0
    call = from_tensors(q, k, v)
    FP8_SINK_KEY.check("O", rel_l2(launch(DENSE, call)[0], oracle_of(call)[0]))


def test_against_the_unquantised_inputs():
    q, k, v = wide(200, 1024)
    o, _ = launch(DENSE, from_tensors(q, k, v))
    FP8_UNQUANTISED.check("O", rel_l2(o, oracle.attention(q, k, v)[0]))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_one_visible_key_is_exact(out_dtype):
    check_one_visible_key(LOCAL, out_dtype)


def test_nan_reaches_the_output_where_it_is_visible():
    check_visible_nan(CAUSAL)


# ------------------------------------------------------------------------------ what must not pass


def test_the_bounds_catch_swapped_descales():
    call = dense_call(DENSE, 1, 100, 300, 2, 1)
    scales = {**call.descales, "k_descale": call.descales["v_descale"]}
    scales["v_descale"] = call.descales["k_descale"]
    o, lse = launch(DENSE, replace(call, descales=scales))
    with pytest.raises(AssertionError):
        compare(call, o, lse)


@pytest.mark.slow
def test_the_bounds_catch_an_offset_that_lse_keeps(tmp_path):
    changed = changed_kernel(
        tmp_path, DENSE, ("attention/softmax.cuh", "(safe + ", "(safe + 8.0f + ")
    )
    call = dense_call(DENSE, 1, 100, 300, 2, 1)
    with pytest.raises(AssertionError, match="LSE"):
        compare(call, *changed(call, Schedule()))


@pytest.mark.slow
def test_the_bounds_catch_unscaled_p(tmp_path):
    changed = changed_kernel(
        tmp_path, DENSE, ("attention/softmax_fp8.cuh", "kOffset = 8.0f;", "kOffset = 0.0f;")
    )
    q, k, v = wide(100, 600)
    call = from_tensors(2.0 * q, k, v)
    want, _ = specified(call, changed.info.block_n)
    SPECIFIED.check("O", rel_l2(launch(DENSE, call)[0], want))
    with pytest.raises(AssertionError):
        SPECIFIED.check("O", rel_l2(changed(call, Schedule())[0], want))


def test_the_bounds_catch_a_missing_promotion(tmp_path):
    mainloop = "forward/mainloop_fp8_overlapped.cuh"
    changed = changed_kernel(
        tmp_path,
        DENSE,
        (mainloop, "multiply<true>(mma_pv, p,", "for (int i = 0; i < size(t); ++i) {\n"
         "t(i) = alpha[i / 2 % 2] * o(i);\n}\nmultiply<false>(mma_pv, p,"),
        (mainloop, "o(i) = alpha[i / 2 % 2] * o(i) + t(i);", "o(i) = t(i);"),
    )  # fmt: skip
    call = from_tensors(*wide(16, 8192, mean_v=0.5))
    exact = oracle_of(call)[0]
    FP8_ACCUMULATION.check("O", rel_l2(launch(DENSE, call)[0], exact))
    with pytest.raises(AssertionError):
        FP8_ACCUMULATION.check("O", rel_l2(changed(call, Schedule())[0], exact))


# ----------------------------------------------------------------------------- public functions


def ran_on_the_kernel() -> bool:
    return device().report()["kernel"] == "flash8_forward"


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
def test_scaled_tensors(granularity, monkeypatch):
    """Rotated, both means taken off, with a sink."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 200, h, 128, generator=g) for h in (4, 2, 2))
    k[..., :3] += 8.0
    sinks = torch.tensor([0.5, 9.0, -1.0, 3.0])
    scaled = (
        fp8.quantize(q, granularity, hadamard=True),
        fp8.quantize(k, granularity, hadamard=True, smooth_k=True),
        fp8.quantize(v, granularity, smooth_v=True),
    )
    options = {"causal": True, "s_aux": sinks, "return_attn_probs": True}
    want, want_lse = flash8.flash_attn_func(*scaled, **options)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(*scaled, **options)
    assert ran_on_the_kernel()
    # Tiles of the head kernel are wider than the CPU's blocks: other references, other roundings.
    assert rel_l2(o, want) <= (0.012 if granularity == "block" else FP8_REL_L2.limit)
    check_fp8_lse("LSE", lse, want_lse)


@pytest.mark.parametrize("granularity", ["head", "block"])
@pytest.mark.parametrize("pack_gqa", by_default([False, None], [False]))
def test_packed_scaled_tensors_with_a_mean_per_sequence(granularity, pack_gqa, monkeypatch):
    cu_seqlens = packed([100, 0, 170, 30])
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(300, h, 128, generator=g) for h in (4, 2, 2))
    k[..., :3] += 8.0
    scaled = (
        fp8.quantize(q, granularity, cu_seqlens=cu_seqlens),
        fp8.quantize(k, granularity, smooth_k=True, cu_seqlens=cu_seqlens),
        fp8.quantize(v, granularity, cu_seqlens=cu_seqlens),
    )
    options = {"max_seqlen_q": 170, "max_seqlen_k": 170, "causal": True, "return_attn_probs": True}
    options["pack_gqa"] = pack_gqa
    call = (*scaled, cu_seqlens, cu_seqlens)
    want, want_lse = flash8.flash_attn_varlen_func(*call, **options)
    with device().serving_cpu_tensors(monkeypatch):
        o, lse = flash8.flash_attn_varlen_func(*call, **options)
    assert ran_on_the_kernel()
    assert rel_l2(o, want) <= 0.012
    check_fp8_lse("LSE", lse, want_lse)


def test_fp8_attention_trains_through_the_kernels(monkeypatch):
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(1, 150, h, 128, generator=g).bfloat16() for h in (2, 1, 1)]
    dout = torch.randn(1, 150, 2, 128, generator=g).bfloat16()
    recipe = fp8.BlockScaling(smooth_k=True)

    def gradients(served=False):
        leaves = [x.clone().requires_grad_() for x in tensors]
        o = flash8.fp8_attention(*leaves, recipe, causal=True)
        assert not served or ran_on_the_kernel()
        return o, torch.autograd.grad(o, leaves, dout)

    want, want_gradients = gradients()
    with device().serving_cpu_tensors(monkeypatch):
        o, have = gradients(served=True)
    assert device().report()["kernel"] == "flash8_backward_postprocess"
    assert rel_l2(o, want) <= 0.012
    for name, a, b in zip("qkv", have, want_gradients, strict=True):
        assert rel_l2(a, b) <= 0.012, name

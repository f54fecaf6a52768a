"""The FP8 forward kernel on v_colmajor values, as the quantizer makes them."""

import math
from dataclasses import replace

import pytest
import torch

import flash8
from defaults import by_default
from flash8 import fp8
from flash8.backends.hopper import forward
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from forward_cases import SHAPES, check, compare, device, int32, launch
from forward_launch import ForwardKernel, Schedule
from fp8_forward_cases import (
    changed_kernel,
    changed_ptx,
    check_one_visible_key,
    check_visible_nan,
    dense_call,
    packed_call,
)
from simulated_device import missing_compiler
from tolerances import FP8_REL_L2, check_fp8_lse, rel_l2

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

DENSE = ForwardVariant("e4m3", 128, 128, scales="head", v_colmajor=True)
CAUSAL = replace(DENSE, mask="causal", scales="block")
LOCAL = ForwardVariant("e4m3", 64, 64, mask="local", softcap=True, scales="block", v_colmajor=True)
MLA = ForwardVariant("e4m3", 192, 128, mask="causal", scales="head", v_colmajor=True)
WIDE = ForwardVariant("e4m3", 256, 256, mask="causal", scales="head", v_colmajor=True)
DEFAULT = (DENSE, CAUSAL)
SLOW = (LOCAL, MLA, WIDE, ForwardVariant("e4m3", 96, 96, scales="head", v_colmajor=True))
VARIANTS = [pytest.param(v, id=v.name) for v in DEFAULT] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in SLOW
]
#: Around the widths of the tiles, and of the sixteens in which keys are ordered.
WIDTHS = [(1, 70, 127, 1, 1), (1, 33, 257, 1, 1), (2, 64, 577, 3, 1), (1, 20, 17, 1, 1)]


def test_some_ship():
    assert any(variant.v_colmajor for variant in SHIPPED)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDTHS], ids=str)
def test_dense(variant, shape):
    check(variant, dense_call(variant, *shape))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_with_used_lengths(variant):
    """Tiles of a sequence end in NaN, or in the next sequence's keys, which are NaN too."""
    check(variant, packed_call(variant), Schedule(num_ctas=3))


@pytest.mark.parametrize("used", range(112, 132))
def test_every_number_of_keys_of_the_last_sixteen(used):
    call = dense_call(DENSE, 1, 3, 150, 1, 1, indices={"seqused_k": int32([used])})
    check(DENSE, call, seeds=(0,))


def test_cache_rows_and_sinks():
    given = {"seqused_k": int32([150, 33]), "kv_batch_idx": int32([1, 0])}
    sinks = torch.tensor([0.5, 9.0])
    check(DENSE, dense_call(DENSE, 2, 40, 150, 2, 2, indices=given, s_aux=sinks))


@pytest.mark.slow
def test_packed_query_heads():
    variant = replace(DENSE, pack_gqa=True)
    check(variant, dense_call(variant, 2, 37, 300, 8, 2))


def test_head_dim_is_filled_with_zeros():
    call = dense_call(CAUSAL, 1, 100, 140, 2, 1)
    check(CAUSAL, replace(call, **{x: getattr(call, x)[..., :80].contiguous() for x in "qkv"}))


def test_many_seeds_give_the_same_bits():
    check(CAUSAL, dense_call(CAUSAL, 1, 130, 250, 1, 1), seeds=range(12))


@pytest.mark.slow
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_one_visible_key_is_exact(out_dtype):
    check_one_visible_key(LOCAL, out_dtype)


def test_nan_reaches_the_output_where_it_is_visible():
    check_visible_nan(CAUSAL)


def test_both_ways_of_v_agree_where_tiles_do():
    """Blocks of 128 keys both: the same products, whoever transposed V."""
    call = dense_call(CAUSAL, 1, 200, 333, 2, 1)
    o, lse = launch(CAUSAL, call)
    by_token, lse_by_token = launch(replace(CAUSAL, v_colmajor=False), call)
    assert torch.equal(o, by_token) and torch.equal(lse, lse_by_token)


MUTATIONS = {
    "tails are left": (
        "forward/mainloop_fp8_overlapped.cuh",
        "if constexpr (Config::kVColMajor) {\n            this->clear",
        "if constexpr (false) {\n            this->clear",
    ),
    "one key too many is left": (
        "attention/hidden_keys.cuh",
        "int const end = seen.end - chunk * kChunk;",
        "int const end = seen.end + 1 - chunk * kChunk;",
    ),
    "keys are in their own order": (
        "attention/hidden_keys.cuh",
        "return pair(count - 2 * q) | pair(count - 8 - 2 * q) << 16;",
        "return pair(count - 4 * q) | pair(count - 2 - 4 * q) << 16;",
    ),
}


@pytest.mark.parametrize("name", by_default(MUTATIONS, []))
def test_the_cases_catch_wrong_tails(name, tmp_path):
    changed = changed_kernel(tmp_path, DENSE, MUTATIONS[name])
    call = dense_call(DENSE, 1, 3, 150, 1, 1, indices={"seqused_k": int32([117])})
    call.v[:, 117:] = math.nan
    compare(call, *launch(DENSE, call))
    with pytest.raises(AssertionError, match="NaN"):
        compare(call, *changed(call, Schedule()))


def test_the_simulator_catches_tails_that_are_not_fenced():
    ptx = changed_ptx(DENSE, rb"fence\.proxy\.async[^;]*;", b"")
    changed = ForwardKernel(device().driver, ptx)
    call = dense_call(DENSE, 1, 3, 150, 1, 1)
    device().configure(seed=1)
    with pytest.raises(RuntimeError, match="LAUNCH_FAILED"):
        changed(call, Schedule())
    assert "fence.proxy.async" in device().last_error()


# ----------------------------------------------------------------------------- public functions


def scaled(granularity, lengths=None):
    cu_seqlens = None if lengths is None else int32([0, *torch.tensor(lengths).cumsum(0).tolist()])
    g = torch.Generator().manual_seed(1)
    shape = (2, 200) if lengths is None else (sum(lengths),)
    q, k, v = (torch.randn(*shape, h, 128, generator=g) for h in (4, 2, 2))
    given = {"cu_seqlens": cu_seqlens}
    return (
        fp8.quantize(q, granularity, **given),
        fp8.quantize(k, granularity, smooth_k=True, **given),
        fp8.quantize(v, granularity, smooth_v=True, v_colmajor=True, **given),
    ), cu_seqlens


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
def test_scaled_tensors(granularity, monkeypatch):
    tensors, _ = scaled(granularity)
    options = {"causal": granularity == "block", "return_attn_probs": True}
    want, want_lse = flash8.flash_attn_func(*tensors, **options)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(*tensors, **options)
    assert device().report()["kernel"] == "flash8_forward"
    assert rel_l2(o, want) <= (0.012 if granularity == "block" else FP8_REL_L2.limit)
    check_fp8_lse("LSE", lse, want_lse)


@pytest.mark.parametrize("granularity", ["head", "block"])
@pytest.mark.parametrize("pack_gqa", by_default([False, None], [False]))
def test_packed_scaled_tensors(granularity, pack_gqa, monkeypatch):
    (q, k, v), cu_seqlens = scaled(granularity, [100, 0, 170, 30])
    call = (q, k, v, cu_seqlens, cu_seqlens, 170, 170)
    options = {"causal": granularity == "block", "pack_gqa": pack_gqa, "return_attn_probs": True}
    want, want_lse = flash8.flash_attn_varlen_func(*call, **options)
    with device().serving_cpu_tensors(monkeypatch):
        o, lse = flash8.flash_attn_varlen_func(*call, **options)
    assert device().report()["kernel"] == "flash8_forward"
    assert rel_l2(o, want) <= (0.012 if granularity == "block" else FP8_REL_L2.limit)
    check_fp8_lse("LSE", lse, want_lse)


def of_training(monkeypatch, recipe, *, differentiated=False, **options):
    """O and LSE of `fp8_attention` on kernels, and whether V came with its keys innermost."""
    seen = []
    choose = forward.choose

    def watched(*arguments, **given):
        seen.append(choose(*arguments, **given))
        return seen[-1]

    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 150, h, 128, generator=g).bfloat16() for h in (2, 1, 1))
    v.requires_grad_(differentiated)
    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(forward, "choose", watched)
        out, lse = fp8.fp8_attention(q, k, v, recipe, return_attn_probs=True, **options)
    assert device().report()["kernel"] == "flash8_forward"
    (colmajor,) = {variant.v_colmajor for variant in seen}
    return out.detach(), lse.detach(), colmajor


def test_training_forwards_take_it_where_no_derivative_is_asked_for(monkeypatch):
    recipe = fp8.CurrentScaling(smooth_v=True)
    out, lse, colmajor = of_training(monkeypatch, recipe)
    by_token, lse_by_token, other = of_training(monkeypatch, recipe, differentiated=True)
    assert (colmajor, other) == (True, False)
    assert torch.equal(out, by_token) and torch.equal(lse, lse_by_token)
    with torch.no_grad():
        again, _, colmajor = of_training(monkeypatch, recipe, differentiated=True)
    assert colmajor and torch.equal(again, out)


def test_training_forwards_with_block_scales_take_v_by_token(monkeypatch):
    _, _, colmajor = of_training(monkeypatch, fp8.BlockScaling(), causal=True)
    assert not colmajor


def test_tangents_are_derivatives_too(monkeypatch):
    with torch.autograd.forward_ad.dual_level():
        _, _, colmajor = of_training(monkeypatch, fp8.CurrentScaling())
    assert not colmajor

"""What the FP8 forward kernel does beside products and descales: means, channels of V, ALiBi."""

from dataclasses import replace

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import check, compare, launch
from forward_launch import Schedule
from fp8_forward_cases import changed_kernel, dense_call, packed_call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

HEAD = ForwardVariant("e4m3", 128, 128, scales="head")
BLOCK = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")
SMALL = ForwardVariant("e4m3", 64, 64, mask="causal", scales="block")
NARROW = ForwardVariant("e4m3", 96, 96, scales="head")
WIDE = ForwardVariant("e4m3", 256, 256, mask="causal", scales="head")
TRANSPOSED = replace(HEAD, v_colmajor=True)
VARIANTS = by_default(
    [HEAD, BLOCK, SMALL, NARROW, WIDE, TRANSPOSED], [HEAD, BLOCK, WIDE, TRANSPOSED]
)


def channels(call, batch, seed=11):
    """Means and descales of channels that matter: LSE moves by up to 2, O by up to 1."""
    g = torch.Generator().manual_seed(seed)
    heads_kv, d, d_v = call.k.shape[-2], call.k.shape[-1], call.v.shape[-1]
    return {
        "k_mean": torch.randn(batch, heads_kv, d, generator=g),
        "v_mean": torch.randn(batch, heads_kv, d_v, generator=g),
        "v_channel_descale": torch.empty(batch, heads_kv, d_v).uniform_(0.5, 2.0, generator=g),
    }


def with_channels(call, batch):
    return replace(call, **channels(call, batch))


@pytest.mark.parametrize("variant", VARIANTS)
def test_means_and_channel_descales(variant):
    call = dense_call(variant, 2, 150, 210, 4, 2, s_aux=torch.tensor([0.5, 3.0, -1.0, 2.0]))
    check(variant, with_channels(call, 2))


@pytest.mark.parametrize("variant", [HEAD, BLOCK, TRANSPOSED], ids=lambda v: v.name)
def test_of_packed_sequences(variant):
    check(variant, with_channels(packed_call(variant), 5), Schedule(num_ctas=3))


@pytest.mark.parametrize("variant", [HEAD, TRANSPOSED], ids=lambda v: v.name)
def test_of_heads_filled_with_zeros(variant):
    """Nothing is read behind the last channel of a mean."""
    call = dense_call(variant, 1, 70, 140, 2, 1)
    call = replace(call, **{x: getattr(call, x)[..., :80].contiguous() for x in "qkv"})
    check(variant, with_channels(call, 1))


def test_of_packed_query_heads():
    variant = replace(HEAD, mask="causal", pack_gqa=True)
    check(variant, with_channels(dense_call(variant, 2, 37, 130, 8, 2), 2))


SHIFT, EPILOGUE = "forward/score_shift.cuh", "forward/epilogue.cuh"
MUTATIONS = {
    "no scale": (SHIFT, "(log2_scale[r] * kLn2)", "kLn2"),
    "another row": (SHIFT, "8 * r * Config::kPanel", "8 * Config::kPanel"),
    "LSE keeps it": (EPILOGUE, "statistics.lse[r] + scales.score_shift[r]", "statistics.lse[r]"),
    "the sink keeps it": (EPILOGUE, "[rows[r].head] - scales.score_shift[r]", "[rows[r].head]"),
    "one channel": (EPILOGUE, "checked_descale(descale_[channel])", "checked_descale(descale_[0])"),
    "no weight": (EPILOGUE, "factors.weight * mean_[channel]", "mean_[channel]"),
}


@pytest.mark.parametrize("name", by_default(MUTATIONS, []))
def test_the_bounds_catch(name, tmp_path):
    changed = changed_kernel(tmp_path, HEAD, MUTATIONS[name])
    call = with_channels(dense_call(HEAD, 1, 60, 100, 2, 1, s_aux=torch.tensor([2.0, 9.0])), 1)
    compare(call, *launch(HEAD, call))
    with pytest.raises(AssertionError):
        compare(call, *changed(call, Schedule()))


SLOPED = (
    replace(HEAD, alibi=True),
    replace(BLOCK, alibi=True),
    replace(SMALL, alibi=True),
    replace(SMALL, mask="local", softcap=True, alibi=True),
)


@pytest.mark.parametrize("variant", by_default(SLOPED, [replace(BLOCK, alibi=True)]))
def test_alibi(variant):
    slopes = torch.tensor([[0.5, 0.01], [0.003, 0.2]])
    check(variant, dense_call(variant, 2, 130, 300, 2, 1, alibi_slopes=slopes))


@pytest.mark.parametrize(
    "variant", by_default([replace(TRANSPOSED, alibi=True), SLOPED[1]], [SLOPED[1]])
)
def test_alibi_of_packed_sequences_with_a_mean(variant):
    slopes = torch.tensor([0.25, 0.02])
    call = with_channels(packed_call(variant, alibi_slopes=slopes), 5)
    check(variant, call, Schedule(num_ctas=3))


def test_alibi_where_a_descale_is_the_smallest():
    """What a quantizer may give a block of zeros: the slopes alone decide then."""
    variant = replace(BLOCK, alibi=True)
    call = dense_call(variant, 1, 60, 300, 2, 1, alibi_slopes=torch.tensor([0.5, 0.1]))
    call.descales["k_descale"][..., 1] = 2.0**-126
    check(variant, call)


@pytest.mark.slow
def test_the_bounds_catch_slopes_without_descales(tmp_path):
    variant = replace(BLOCK, alibi=True)
    edit = ("attention/score_mod.cuh", "kScoresInLog2 ? scale[r] : 1.0f", "1.0f")
    changed = changed_kernel(tmp_path, variant, edit)
    call = dense_call(variant, 1, 60, 200, 2, 1, alibi_slopes=torch.tensor([0.5, 0.1]))
    compare(call, *launch(variant, call))
    with pytest.raises(AssertionError):
        compare(call, *changed(call, Schedule()))

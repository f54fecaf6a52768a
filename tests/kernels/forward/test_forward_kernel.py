"""The forward kernel on the simulated device: shapes, sequences, numbers, and the public function.

A finding of the simulator (a race, a missing wait, a read of something unwritten, an access out of
bounds) fails the launch; forward_cases.py says what else a case must fulfil.
"""

from dataclasses import replace

import pytest
import torch

import flash8
from defaults import by_default
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from forward_cases import (
    SHAPES,
    check,
    compare,
    device,
    draw,
    int32,
    kernel,
    launch,
    masks,
    packed,
)
from forward_launch import Call, Schedule
from fp8_forward_cases import changed_kernel
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal")
LOCAL = ForwardVariant("bf16", 64, 64, mask="local")
CAPPED = ForwardVariant("fp16", 64, 64, softcap=True)
MLA = ForwardVariant("bf16", 192, 128, mask="causal")
DENSE = ForwardVariant("bf16", 128, 128)
WIDE = ForwardVariant("bf16", 256, 256, mask="causal")
#: Around the widths of the tiles.
WIDTHS = [(1, 64, 257, 3, 1), (1, 60, 175, 1, 1), (1, 33, 81, 2, 1), (1, 61, 353, 1, 1)]
DEFAULT = (CAUSAL, LOCAL, CAPPED, MLA, DENSE, WIDE)
#: FP8, heads in rows, pages, widened keys and e4m3 outputs have files of their own.
SLOW = tuple(
    v
    for v in SHIPPED
    if "e4m3" not in (v.dtype, v.cache, v.out)
    and not v.pack_gqa
    and not v.paged
    and v not in DEFAULT
)
VARIANTS = [pytest.param(v, id=v.name) for v in DEFAULT] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in SLOW
]


def scale(variant: ForwardVariant) -> float:
    return variant.head_dim**-0.5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDTHS], ids=str)
def test_dense(variant, shape):
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    q, k, v = draw(variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch)
    check(variant, Call(q, k, v, scale(variant), **masks(variant)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_with_used_lengths(variant):
    offsets = packed([5, 0, 130, 1, 64])
    q, k, v = draw(variant, int(offsets[-1]), int(offsets[-1]), 2, 1)
    indices = {
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "seqused_q": int32([5, 0, 99, 0, 64]),
        "seqused_k": int32([3, 0, 77, 1, 0]),
    }
    lengths = {"max_seqlen_q": 130, "max_seqlen_k": 130}
    call = Call(q, k, v, scale(variant), **masks(variant), indices=indices, **lengths)
    check(variant, call, Schedule(num_ctas=3))


def test_left_padding_and_cache_rows():
    q, k, v = draw(CAUSAL, 40, 150, 2, 2, batch=2)
    given = {"leftpad_k": [7, 0], "seqused_k": [150, 33], "kv_batch_idx": [1, 0]}
    indices = {name: int32(values) for name, values in given.items()}
    # seqused_k and leftpad_k belong to the sequence, the cache's row to the data.
    check(CAUSAL, Call(q, k, v, 0.1, causal=True, indices=indices))


@pytest.mark.parametrize("variant", [CAUSAL, LOCAL, CAPPED], ids=lambda v: v.name)
def test_sinks(variant):
    q, k, v = draw(variant, 70, 130, 2, 1, batch=1)
    sinks = torch.tensor([0.5, 9.0])
    check(variant, Call(q, k, v, scale(variant), **masks(variant), s_aux=sinks))


@pytest.mark.parametrize("variant", DEFAULT, ids=lambda v: v.name)
@pytest.mark.parametrize("size", [40.0, 1e4])
def test_extreme_logits(variant, size):
    q, k, v = draw(variant, 130, 190, 1, 1, batch=1, scale=size)
    check(variant, Call(q, k, v, scale(variant), **masks(variant)))


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x with more than 2^31 elements between its two sequences, most of them never touched."""
    step = 2**31 + 64
    memory = torch.empty(step + x[0].numel(), dtype=x.dtype)
    apart = memory.as_strided(x.shape, (step, *x[0].contiguous().stride()))
    return apart.copy_(x)


@pytest.mark.parametrize("pack_gqa", by_default([False, None], [False]))
def test_sequences_more_than_two_to_the_31_elements_apart(pack_gqa, monkeypatch):
    q, k, v = draw(LOCAL, 40, 70, 2, 1, batch=2)
    out = far_apart(torch.zeros_like(q))
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(
            far_apart(q),
            far_apart(k),
            far_apart(v),
            window_size=(20, 5),
            pack_gqa=pack_gqa,
            return_attn_probs=True,
            out=out,
        )
    assert device().report()["kernel"] == "flash8_forward"
    compare(Call(q, k, v, scale(LOCAL), window=(20, 5)), o, lse)


def long_call(keys: int) -> Call:
    q, k, v = draw(CAUSAL, 64, keys, 1, 1, batch=1)
    return Call(q, k, v, scale(CAUSAL), causal=True)


@pytest.mark.parametrize("keys", [385, 1024])
def test_many_blocks_of_keys(keys):
    """Stages of K and V are used again and again, by the first block of queries alone."""
    assert keys > 3 * kernel(CAUSAL).info.block_n
    check(CAUSAL, long_call(keys), seeds=(1, 2))


@pytest.mark.slow
def test_many_blocks_of_keys_catch_a_fourth_that_is_left_out(tmp_path):
    edit = (
        "attention/key_walk.cuh",
        "max(blocks.begin, blocks.left_end)",
        "max(max(blocks.begin, blocks.left_end), blocks.end - 3)",
    )
    changed = changed_kernel(tmp_path, CAUSAL, edit)
    compare(long_call(384), *changed(long_call(384), Schedule()))
    with pytest.raises((AssertionError, RuntimeError)):
        compare(long_call(385), *changed(long_call(385), Schedule()))


def test_head_dim_is_filled_with_zeros():
    q, k, v = (x[..., :72].contiguous() for x in draw(CAUSAL, 100, 140, 2, 1, batch=1))
    check(CAUSAL, Call(q, k, v, 72**-0.5, causal=True))


def test_many_seeds_give_the_same_bits():
    q, k, v = draw(CAUSAL, 130, 260, 1, 1, batch=1)
    check(CAUSAL, Call(q, k, v, scale(CAUSAL), causal=True), seeds=range(12))


def mutated(good: Call, mutation: str) -> Call:
    if mutation == "scale":
        return replace(good, softmax_scale=good.softmax_scale * 1.05)
    if mutation == "mask off by one":
        rolled = (torch.cat((x[:, 1:], x[:, :1]), 1) for x in (good.k, good.v))
        return replace(good, **dict(zip("kv", rolled, strict=True)))
    if mutation == "no mask":
        return replace(good, causal=False)
    return replace(good, v=torch.zeros_like(good.v))


@pytest.mark.parametrize("mutation", ["scale", "mask off by one", "no mask", "zero v"])
def test_the_bounds_catch(mutation):
    variant = LOCAL if mutation == "no mask" else CAUSAL
    q, k, v = draw(variant, 100, 200, 1, 1, batch=1)
    good = Call(q, k, v, scale(variant), causal=True)
    o, lse = launch(variant, mutated(good, mutation))
    with pytest.raises(AssertionError):
        compare(good, o, lse)


def test_the_public_function_runs_on_the_kernel(monkeypatch):
    q, k, v = draw(CAUSAL, 150, 150, 4, 2, batch=2)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert device().report()["kernel"] == "flash8_forward"
    compare(Call(q, k, v, scale(CAUSAL), causal=True), o, lse)


def test_gradients_flow_through_the_kernels_lse(monkeypatch):
    tensors = [x.requires_grad_() for x in draw(CAUSAL, 60, 90, 2, 1, batch=1)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    with device().serving_cpu_tensors(monkeypatch):
        o = flash8.flash_attn_func(*tensors, causal=True)
    dout = torch.randn(o.shape, generator=torch.Generator().manual_seed(5)).to(o.dtype)
    gradients = torch.autograd.grad(o, tensors, dout)
    reference = flash8.flash_attn_func(*exact, causal=True)
    for have, want in zip(
        gradients, torch.autograd.grad(reference, exact, dout.double()), strict=True
    ):
        assert ((have.double() - want).norm() / want.norm()) < 1e-2

"""Attention into the output projection, both on the simulated device: two launches, and the bits of
attention in fp32 that is quantized and then multiplied."""

from dataclasses import replace

import pytest
import torch

from defaults import by_default
from e4m3_output_cases import BF16, FP8, IN_FP32, as_bits, changed, in_fp32, quantized
from flash8 import _native, fp8, gemm
from flash8.backends.hopper import forward_e4m3 as hopper
from flash8.call.options import Options
from forward_cases import device, packed
from forward_launch import Call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

LENGTHS = (1, 127, 0, 129, 37)
HEADS = 2


def draw(variant):
    """Packed q, k and v, their descales, and a weight (48, heads * 128)."""
    g = torch.Generator().manual_seed(1)
    unit = 32.0 if variant.dtype == "e4m3" else 1.0
    dtype = torch.float8_e4m3fn if variant.dtype == "e4m3" else torch.bfloat16
    shape = (sum(LENGTHS), HEADS, 128)
    q, k, v = ((torch.randn(shape, generator=g) * unit).to(dtype) for _ in "qkv")
    names = ("q_descale", "k_descale", "v_descale") if variant.dtype == "e4m3" else ()
    descales = {x: torch.rand(len(LENGTHS), HEADS, generator=g) / 32 + 0.02 for x in names}
    return (q, k, v), descales, torch.randn(48, HEADS * 128, generator=g)


def projected(o8, scale_o, weight, *, by="128x128"):
    w8, scale_w = gemm.quantize(weight, by)
    return gemm.scaled_mm(o8, w8.t(), scale_o, scale_w.t(), out_dtype=torch.float32)


@pytest.mark.parametrize("variant", by_default([FP8, BF16], [FP8]))
def test_attention_feeds_the_projection(variant, monkeypatch, tmp_path):
    tensors, descales, weight = draw(variant)
    offsets, longest = packed(LENGTHS), max(LENGTHS)
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    longests = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    launches = []
    launch = _native.launch_forward
    monkeypatch.setattr(
        _native, "launch_forward", lambda *x, **y: launches.append(1) or launch(*x, **y)
    )
    with device().serving_cpu_tensors(monkeypatch):
        given = {**lengths, **longests, **descales}
        options = Options(**given, causal=True, window_right=0)
        assert hopper.choose(*tensors, options) == variant
        o8, scale_o = gemm.quantize_attention(*tensors, **given, causal=True)
        assert device().report()["kernel"] == "flash8_forward" and len(launches) == 1
        y = projected(o8, scale_o, weight)
        static = torch.tensor([0.01])
        narrow = gemm.quantize_attention(*tensors, **given, causal=True, out_scale=static)
        again = projected(*narrow, weight, by="tensor")
    call = Call(*tensors, 128**-0.5, causal=True, indices=lengths, descales=descales, **longests)
    o = in_fp32(changed(tmp_path, variant, *IN_FP32), call)
    data, scale = quantized(o)
    assert torch.equal(as_bits(o8), data.view(o8.shape)) and torch.equal(scale_o, scale)
    with fp8.study(accumulation="hopper"):
        assert torch.equal(y, projected(data.view(o8.shape).view(o8.dtype), scale, weight))
        o8 = (o * static.reciprocal()).clamp(-448, 448).to(o8.dtype).view(o8.shape)
        assert torch.equal(again, projected(o8, static.view(1, 1), weight, by="tensor"))


SERVED = {
    "query heads in rows": replace(BF16, pack_gqa=True),
    "pages": replace(BF16, paged=True),
    "an e4m3 cache": replace(BF16, cache="e4m3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_calls_that_take_other_kernels(name, monkeypatch):
    """Beside the portable code: a step of e4m3 in a few places."""
    g = torch.Generator().manual_seed(4)
    heads_kv = 1 if name == "query heads in rows" else 2
    q = torch.randn(2, 40, 2, 128, generator=g).bfloat16()
    k, v = (torch.randn(2, 64, heads_kv, 128, generator=g).bfloat16() for _ in "kv")
    given = {"causal": True, "seqused_k": torch.tensor([64, 41], dtype=torch.int32)}
    if name == "pages":
        k, v = (x.view(8, 16, heads_kv, 128) for x in (k, v))
        given["page_table"] = torch.arange(8, dtype=torch.int32).view(2, 4)
    if name == "an e4m3 cache":
        k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    want, want_scale = gemm.quantize_attention(q, k, v, **given)
    with device().serving_cpu_tensors(monkeypatch):
        have, have_scale = gemm.quantize_attention(q, k, v, **given)
        options = Options(window_right=0, **given)
        assert hopper.choose(q, k, v, options) == SERVED[name]
        assert device().report()["kernel"] == "flash8_forward"
    torch.testing.assert_close(have_scale, want_scale, rtol=0.02, atol=0.0)
    off = have.float() * have_scale.repeat_interleave(128, 1)
    off -= want.float() * want_scale.repeat_interleave(128, 1)
    assert off.norm() < 0.02 * (want.float() * want_scale.repeat_interleave(128, 1)).norm()


def test_what_no_kernel_takes_goes_to_the_portable_code(monkeypatch):
    q, k, v = (torch.randn(1, 20, 1, 128) for _ in "qkv")
    want = gemm.quantize_attention(q, k, v)
    with device().serving_cpu_tensors(monkeypatch), pytest.warns(UserWarning, match="float32 q"):
        have = gemm.quantize_attention(q, k, v)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(have, want, strict=True))

"""Sound kernels pass their check, and serve; wrong ones fail it, and the portable code serves."""

import re
import time
from dataclasses import replace

import pytest
import torch

import flash8
from defaults import SHIPPED_BY_DEFAULT, by_default
from flash8 import flash_attn_func, flash_attn_varlen_func, fp8
from flash8.backends.hopper.append_variants import SHIPPED_APPENDS
from flash8.backends.hopper.quantize_variants import SHIPPED_QUANTIZERS
from flash8.backends.hopper.schedule_variants import SCHEDULE
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from flash8.backends.hopper.verify import trust
from forward_cases import int32, packed
from fp8_forward_cases import changed_ptx
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import Image, changed_image, changed_quantizers, told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
BF16 = ForwardVariant("bf16", 128, 128)
CAPPED = ForwardVariant("fp16", 64, 64, softcap=True)
HEAD = ForwardVariant("e4m3", 128, 128, scales="head")
BLOCK = ForwardVariant("e4m3", 128, 128, scales="block")
DROPPED = ForwardVariant("bf16", 128, 128, mask="causal", dropout=True)
OTHERS = (
    ForwardVariant("fp16", 64, 64, mask="local", alibi=True, pack_gqa=True),
    ForwardVariant("bf16", 64, 64, mask="local", alibi=True),
    ForwardVariant("e4m3", 64, 64, mask="causal", scales="block", alibi=True),
    replace(HEAD, alibi=True, v_colmajor=True),
    replace(HEAD, pack_gqa=True),
    DROPPED,
    replace(BLOCK, cluster=True, v_colmajor=True),
)
SLOW = (
    replace(BF16, mask="causal", alibi=True),
    replace(BLOCK, alibi=True),
    replace(HEAD, dropout=True),
    ForwardVariant("e4m3", 192, 128, scales="head", cluster=True, v_colmajor=True),
)
DEFAULT = (*SHIPPED_BY_DEFAULT, OTHERS[0], OTHERS[-1])


def faults(variant, checked, image=None):
    with checked(image):
        return trust.find_fault(variant, CPU)


@pytest.mark.parametrize("variant", by_default([*SHIPPED, *OTHERS, *SLOW], DEFAULT))
def test_a_sound_forward_passes(variant, checked):
    device().ptx(variant)
    start = time.process_time()
    assert faults(variant, checked) is None
    assert time.process_time() - start < 5.0, "several times what it takes"


@pytest.mark.parametrize(
    "variant", [*SHIPPED_QUANTIZERS, *SHIPPED_APPENDS, SCHEDULE], ids=lambda v: v.name
)
def test_a_sound_quantizer_passes(variant, checked):
    assert faults(variant, checked) is None


def test_the_tanh_of_a_gpu_passes(checked):
    """The simulated device's is exact; that of a GPU may be off by 2^-11."""
    ptx = changed_ptx(
        CAPPED,
        rb"tanh\.approx\.f32\s+(%\w+), (%\w+);",
        rb"tanh.approx.f32 \1, \2; mul.f32 \1, \1, 0f3F801000;",
    )
    assert faults(CAPPED, checked, lambda _: ptx) is None


# ------------------------------------------------------------------------------- wrong kernels


def draw(dtype, width=128, heads=(4, 2), rows=(70, 150)):
    g = torch.Generator().manual_seed(3)
    shapes = [(2, n, h, width) for n, h in zip((*rows, rows[1]), (*heads, heads[1]), strict=True)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def attend(*tensors, **options):
    return lambda: flash_attn_func(*tensors, pack_gqa=False, return_attn_probs=True, **options)


def bf16(**options):
    return attend(*draw(torch.bfloat16), **options)


def e4m3(granularity, **options):
    """Of e4m3 bytes that no kernel has made."""
    q, k, v = (x.to(torch.float8_e4m3fn) for x in draw(torch.float32))
    shapes = ((2, 4), (2, 2), (2, 2)) if granularity == "head" else ((2, 4, 1), *((2, 2, 2),) * 2)
    descales = [torch.linspace(0.5, 1.5, torch.Size(s).numel()).view(s) for s in shapes]
    names = ("q_descale", "k_descale", "v_descale")
    given = dict(zip(names, descales, strict=True))
    return lambda: flash_attn_func(
        q, k, v, pack_gqa=False, return_attn_probs=True, **given, **options
    )


def paged_bf16(size=8, **options):
    q, k, v = draw(torch.bfloat16)
    pages = [x.reshape(20, 15, 2, 128)[:, :size].contiguous() for x in (k, v)]
    table = int32(range(19, -1, -1)).view(2, 10)
    given = {"page_table": table, "cache_seqlens": int32([70, 33]), "pack_gqa": False}
    given |= {"causal": True, **options}
    out, lse, *_ = flash8.flash_attn_with_kvcache(q, *pages, return_softmax_lse=True, **given)
    return out, lse


def over_e4m3():
    q, k, v = draw(torch.bfloat16)
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    descales = torch.linspace(0.5, 1.5, 4).view(2, 2)
    given = {"k_descale": descales, "v_descale": descales.flip(1), "pack_gqa": False}
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=int32([150, 33]), causal=True, return_softmax_lse=True, **given
    )
    return out, lse


def packed_bf16():
    q, k, v = (x.flatten(0, 1) for x in draw(torch.bfloat16, rows=(70, 70)))
    ends = packed([40, 100])
    return flash_attn_varlen_func(
        q, k, v, ends, ends, 100, 100, int32([33, 99]), pack_gqa=False, return_attn_probs=True
    )


SINKS = {"s_aux": torch.linspace(0.0, 3.0, 4)}
SLOPES = {"alibi_slopes": torch.linspace(0.01, 0.3, 4)}
CAUSAL, LOCAL = replace(BF16, mask="causal"), replace(BF16, mask="local")
SLOPED = replace(BF16, alibi=True)
PAGED = replace(CAUSAL, paged=True)
GATHERED = replace(PAGED, gather=True)
WINDOWED = replace(GATHERED, mask="local")
WIDENED = replace(CAUSAL, cache="e4m3")
MASK, EPILOGUE, SCORES = "attention/mask.cuh", "forward/epilogue.cuh", "attention/score_mod.cuh"
SINK = "params.scores.sinks != nullptr"
SHIFT = "float shift = reference;"
KV_HEAD = "tile.head / (params.heads_q / params.heads_kv)"
SEEN = "position >= first_seen && position < end_seen"
INSIDE, KEYS = "bool const inside = rows[r].query", "keys = {position - left_"
#: What is wrong: the variant that a public call takes, the call, and words of what is found.
CALLS = {
    "causal mask off by one": (CAUSAL, bf16(causal=True), "LSE is"),
    "window off by one": (LOCAL, bf16(window_size=(9, 2)), "LSE is off"),
    "softcap missing": (CAPPED, attend(*draw(torch.float16, 64), softcap=2.0), "LSE is off"),
    "another head's slope": (SLOPED, bf16(**SLOPES), "LSE is off"),
    "sinks ignored": (BF16, bf16(**SINKS), "LSE is"),
    "dropout ignored": (DROPPED, bf16(causal=True, dropout_p=0.5, dropout_seed=7), "O is off"),
    "another KV head": (BF16, bf16(), "off"),
    "unused rows unwritten": (BF16, packed_bf16, "rows are not written"),
    "pages in their own order": (PAGED, paged_bf16, "not written, or NaN"),
    "keys of the next place": (GATHERED, lambda: paged_bf16(7), "off"),
    "gathered without padding": (GATHERED, lambda: paged_bf16(7), "off"),
    "slots before the window": (WINDOWED, lambda: paged_bf16(7, window_size=(9, 2)), "NaN"),
    "slots after the last key": (GATHERED, lambda: paged_bf16(7), "NaN"),
    "widened without padding": (WIDENED, over_e4m3, "off"),
    "descales swapped": (HEAD, e4m3("head"), "LSE is off"),
    "descales of the cache swapped": (WIDENED, over_e4m3, "LSE is off"),
    "LSE keeps the offset": (BLOCK, e4m3("block"), "LSE is off"),
    "counter left": (CAUSAL, bf16(causal=True), "counter of tiles is left at"),
    "a trap": (BF16, bf16(), "DriverError: cuLaunchKernelEx"),
}
EDITS = {
    "causal mask off by one": (MASK, "query + shift_ + 1);", "query + shift_ + 2);"),
    "window off by one": (MASK, KEYS, f"{KEYS} + 1"),
    "another head's slope": (SCORES, "tile.batch, row.head, pos", "tile.batch, 0, pos"),
    "sinks ignored": (EPILOGUE, SINK, "false"),
    "another KV head": ("attention/pack_gqa.cuh", KV_HEAD, "tile.head % params.heads_kv"),
    "unused rows unwritten": (EPILOGUE, f"{INSIDE} < info.rows_q", f"{INSIDE} < info.seqlen_q"),
    "pages in their own order": (
        "attention/pages.cuh",
        "pages.page_table[table_row * pages.page_table_stride + index]",
        "table_row * pages.max_pages + index",
    ),
    "keys of the next place": (
        "forward/page_gatherer.cuh",
        "step, kLanesPerRow);",
        "step ^ 1, kLanesPerRow);",
    ),
    "gathered without padding": (
        "forward/gathered_keys.cuh",
        "info.offset_k,\n",
        "0,\n",
    ),
    "slots before the window": (
        "forward/gathered_keys.cuh",
        SEEN,
        "position < end_seen",
    ),
    "slots after the last key": (
        "forward/gathered_keys.cuh",
        SEEN,
        "position >= first_seen",
    ),
    "descales swapped": (
        "forward/consumer.cuh",
        "Descale const k_descale(params_.k_descale,",
        "Descale const k_descale(params_.v_descale,",
    ),
    "descales of the cache swapped": (
        "forward/consumer.cuh",
        "Descale<false> const k_descale(params_.k_descale,",
        "Descale<false> const k_descale(params_.v_descale,",
    ),
    "LSE keeps the offset": ("attention/softmax_fp8.cuh", SHIFT, f"{SHIFT} reference += kOffset;"),
}
EDITS["widened without padding"] = EDITS["gathered without padding"]
#: Edits of the PTX: what is matched, and what stands there instead.
PTX_EDITS = {
    "softcap missing": (rb"tanh\.approx\.f32", b"mov.f32"),
    "counter left": (rb"atom\.global\.exch[^;]*;", b""),
    "a trap": (rb"\bret;", b"trap; ret;"),
    # One of the multipliers of Philox.
    "dropout ignored": (rb"(mul\.wide\.u32[^;]*), -766435501;", rb"\1, 0;"),
}


def ptx_of(name: str) -> Image:
    return lambda variant: changed_ptx(variant, *PTX_EDITS[name])


KEPT = ["causal mask off by one", "LSE keeps the offset", *PTX_EDITS]


@pytest.mark.parametrize("name", by_default(CALLS, KEPT))
def test_a_wrong_forward_fails_and_the_portable_code_serves(name, checked, tmp_path):
    variant, call, words = CALLS[name]
    image = ptx_of(name) if name in PTX_EDITS else changed_image(tmp_path, EDITS[name])
    want = call()
    with checked(image):
        have, said = told(call)
        _, again = told(call)
    assert len(said) == 1 and not again
    assert f"its kernel {variant.name} on cpu: " in said[0] and "FLASH8_KERNELS" in said[0]
    assert re.search(words, said[0]), said[0]
    for x, y in zip(have, want, strict=True):
        assert torch.equal(x, y)


def test_a_sound_forward_serves_and_is_remembered(checked, monkeypatch):
    call = bf16(causal=True)
    want = call()
    seen = []
    find_fault = trust.find_fault
    monkeypatch.setattr(trust, "find_fault", lambda *args: seen.append(1) or find_fault(*args))
    with checked():
        (have, _), said = told(call)
        call()
        assert device().report()["kernel"] == "flash8_forward"
    assert not said and len(seen) == 1
    assert not torch.equal(have, want[0])  # another order of sums
    torch.testing.assert_close(have, want[0], atol=0.02, rtol=0.02)


X = torch.randn(2, 70, 2, 64, generator=torch.Generator().manual_seed(5)).bfloat16()


def append(dtype=torch.float8_e4m3fn):
    caches = [torch.zeros(2, 128, 2, 64).to(dtype) for _ in range(2)]
    given = {"cache_seqlens": int32([3, 50])}
    if dtype == torch.float8_e4m3fn:
        given["k_mean"] = torch.ones(2, 64)
    flash8.flash_attn_with_kvcache(X, *caches, X, X, **given)
    return torch.stack(caches)


def quantized(**options):
    return lambda: fp8.quantize(X, **options).data


COUNTED = "tile.counted = clamped(params.seqused[tile.batch], 0, tile.counted);"
#: File, what is replaced, by what; the kernel that must not pass, a call of it, and words.
WRONG_QUANTIZERS = {
    "descale for its inverse": (
        *("cast.cu", "reciprocal(choose", "(choose"),
        *("quantize_cast_bf16_d64", quantized(granularity="block"), "bytes of the result differ"),
    ),
    "no signs": (
        *("rows.cuh", "^ (signs >> c << 31)", ""),
        *(
            "quantize_cast_bf16_d64",
            quantized(granularity="block", hadamard=1),
            "bytes of the result",
        ),
    ),
    "keys in plain order": (
        *("rows.cuh", "if constexpr (Config::kVColMajor)", "if constexpr (false)"),
        *(
            "quantize_cast_bf16_d64_vcolmajor",
            quantized(granularity="block", v_colmajor=True),
            "bytes",
        ),
    ),
    "unused tokens count": (
        *("tokens.cuh", COUNTED, ""),
        *(
            "quantize_mean_bf16_d64",
            quantized(granularity="block", smooth_k=True),
            "the mean is off by",
        ),
    ),
    "mean not taken off": (
        *("quantize/new_row.cuh", "if (rows.mean.ptr != nullptr)", "if (false)"),
        *("append_bf16_to_e4m3", append, "elements of the K cache differ"),
    ),
    "queries in positions of their own": (
        *("quantize/new_token.cuh", "(rows.advances ? token.index : 0)", "token.index"),
        *("append_bf16", lambda: append(torch.bfloat16), "elements of Q differ"),
    ),
}


@pytest.mark.parametrize("name", WRONG_QUANTIZERS)
def test_a_wrong_quantizer_fails_and_the_portable_code_serves(name, checked, tmp_path):
    file, old, new, kernel, call, words = WRONG_QUANTIZERS[name]
    want = call()
    with checked(changed_quantizers(tmp_path, file, old, new)):
        have, said = told(call)
        _, again = told(call)
    found = [text for text in said if f"its kernel {kernel} on cpu: " in text]
    assert len(found) == 1 and words in found[0] and not again
    assert torch.equal(have.view(torch.uint8), want.view(torch.uint8))

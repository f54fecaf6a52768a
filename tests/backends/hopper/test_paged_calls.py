"""Caches on the forward kernel: more rows than the decode kernel takes, dense and paged. On CPU
tensors, the simulated device and the fake driver."""

import warnings

import pytest
import torch

import flash8
from flash8 import flash_attn_varlen_func, flash_attn_with_kvcache
from flash8.backends.hopper import decode
from flash8.backends.hopper import forward as hopper
from forward_cases import device, int32
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
E4M3 = torch.float8_e4m3fn


def draw(page_size=16, *, seqlen_q=40, heads=2, heads_kv=2, width=128, dtype=torch.bfloat16):
    """q, and caches of as many pages as three sequences of 150 keys take."""
    generator = torch.Generator().manual_seed(5)

    def tensor(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    columns = -(-150 // page_size)
    cache = [tensor(3 * columns + 1, page_size, heads_kv, width) for _ in "kv"]
    table = torch.randperm(3 * columns + 1, generator=generator)[: 3 * columns]
    given = {"page_table": table.view(3, columns).int(), "cache_seqlens": int32([150, 1, 67])}
    return [tensor(3, seqlen_q, heads, width), *cache], {**given, "causal": True}


def dense(**options):
    (q, *cache), given = draw(150, **options)
    given.pop("page_table")
    return [q, *(x[:3] for x in cache)], given


def over_e4m3(page_size=16, **options):
    """The same caches in e4m3; dense without a page_size."""
    (q, *cache), given = dense(**options) if page_size is None else draw(page_size, **options)
    return [q, *(x.to(E4M3) for x in cache)], given


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that calls inside took."""
    names = []
    for module in (decode, hopper):
        plan = module.plan

        def named(q, k, v, s_aux, options, *rest, module=module, plan=plan):
            names.append(module.choose(q, k, v, options).name)
            return plan(q, k, v, s_aux, options, *rest)

        monkeypatch.setattr(module, "plan", named)
    return names


CALLS = {
    "paged": (draw(), {}, "forward_bf16_d128_causal_paged"),
    "a row for decoding": (draw(seqlen_q=16), {}, "decode_bf16_d128_rows16"),
    "more rows": (draw(heads=8), {}, "forward_bf16_d128_causal_packgqa_paged"),
    "all keys": (draw(), {"causal": False}, "forward_bf16_d128_paged"),
    "window": (draw(), {"window_size": (9, 0)}, "forward_bf16_d128_local_paged"),
    "padding": (draw(), {"cache_leftpad": int32([1, 1, 9])}, "forward_bf16_d128_local_paged"),
    "softcap": (draw(), {"softcap": 9.0}, "forward_bf16_d128_causal_softcap_paged"),
    "e4m3": (draw(dtype=E4M3), {}, "forward_e4m3_d128_causal_paged_headscales"),
    "e4m3, one row": (
        draw(dtype=E4M3, seqlen_q=1),
        {"pack_gqa": False},
        "decode_bf16_e4m3_d128_rows8",
    ),
    "e4m3, pages' descales": (
        draw(dtype=E4M3),
        {"k_descale": torch.ones(31, 2, 1), "v_descale": torch.ones(31, 2, 1)},
        "decode_bf16_e4m3_d128_rows32_keyscales",
    ),
    "pages of 20 keys": (draw(20), {}, "forward_bf16_d128_causal_paged_gather"),
    "a row for decoding, of pages of 20 keys": (
        draw(20, seqlen_q=16),
        {},
        "decode_bf16_d128_rows16_gather",
    ),
    "pages of one key, window": (
        draw(1),
        {"window_size": (9, 0)},
        "forward_bf16_d128_local_paged_gather",
    ),
    "pages of one key, padding": (
        draw(1, heads=8),
        {"cache_leftpad": int32([1, 1, 9])},
        "forward_bf16_d128_causal_packgqa_paged_gather",
    ),
    "e4m3, pages of 20 keys": (
        draw(20, dtype=E4M3),
        {},
        "forward_e4m3_d128_causal_paged_gather_headscales",
    ),
    "16 bits over e4m3": (over_e4m3(), {}, "forward_bf16_e4m3_d128_causal"),
    "16 bits over e4m3, descales": (
        over_e4m3(1, heads=8),
        {"k_descale": torch.ones(3, 2), "v_descale": torch.ones(3, 2)},
        "forward_bf16_e4m3_d128_causal_packgqa",
    ),
    "16 bits over e4m3, window and padding": (
        over_e4m3(20),
        {"window_size": (9, 0), "cache_leftpad": int32([1, 1, 9])},
        "forward_bf16_e4m3_d128_local",
    ),
    "16 bits over e4m3, dense": (
        over_e4m3(None),
        {"cache_batch_idx": int32([2, -1, 0])},
        "forward_bf16_e4m3_d128_causal",
    ),
    "16 bits over e4m3, a row for decoding": (
        over_e4m3(seqlen_q=32),
        {},
        "decode_bf16_e4m3_d128_rows32",
    ),
    "16 bits over e4m3, smoothed": (
        over_e4m3(),
        {"k_mean": torch.zeros(2, 128)},
        "decode_bf16_e4m3_d128_rows32",
    ),
    "dense": (dense(), {}, "forward_bf16_d128_causal"),
    "dense, padding": (
        dense(),
        {"cache_leftpad": int32([1, 1, 9]), "cache_batch_idx": int32([2, -1, 0])},
        "forward_bf16_d128_causal",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_which_kernel_serves(name, launched, on_fake_driver, fake, monkeypatch):
    """One launch, and nothing is read from the device."""
    (tensors, given), more, kernel = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The fake driver's kernels are for dense keys.
        monkeypatch.setattr("flash8._native.launch_forward", lambda *args: None)
        flash_attn_with_kvcache(*tensors, **{**given, **more})
    assert launched == [kernel]
    assert fake.count("cuMemcpyDtoH_v2") == 0


REFUSED = {
    "rows of no 16 bytes, of odd pages": (
        draw(20, dtype=E4M3, width=120),
        {},
        "head_dim is 120",
    ),
    "splits": (draw(), {"num_splits": 2}, "num_splits has no"),
    "e4m3, many rows and tokens' descales of a dense cache": (
        dense(dtype=E4M3, heads=16),
        {"k_descale": torch.ones(3, 150, 2)},
        "a descale per token has no forward kernel; the decode kernel.*there are 320",
    ),
    "16 bits over e4m3, many rows and pages' descales": (
        over_e4m3(heads=16),
        {"k_descale": torch.ones(31, 2, 1)},
        "k_descale is per token, block or page.*decode kernel.*up to 256 rows.*there are 320",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_names(name, launched, monkeypatch):
    (tensors, given), more, words = REFUSED[name]
    given = {**given, **more}
    flash8.backends._warn_of_refusal.cache_clear()
    with pytest.warns(UserWarning, match=words), device().serving_cpu_tensors(monkeypatch):
        found = flash_attn_with_kvcache(*tensors, **given)
    assert torch.equal(found, flash_attn_with_kvcache(*tensors, **given))
    assert launched == []


def agree(found, want):
    for x, y, bound in zip(found, want, (2e-2, 1e-4), strict=True):
        finite = torch.isfinite(y)
        assert torch.equal(finite, torch.isfinite(x))
        torch.testing.assert_close(x[finite], y[finite], atol=bound, rtol=bound)


@needs_compiler
def test_a_chunk_of_a_prompt_appends_and_attends(launched, monkeypatch):
    (q, *cache), given = draw()
    given |= {x: torch.randn(3, 40, 2, 128).bfloat16() for x in ("k", "v")}
    given["cache_seqlens"] = int32([90, 1, 67])
    copies = [[q, *(x.clone() for x in cache)] for _ in range(2)]
    want = flash_attn_with_kvcache(*copies[0], return_softmax_lse=True, **given)[:2]
    with device().serving_cpu_tensors(monkeypatch):
        found = flash_attn_with_kvcache(*copies[1], return_softmax_lse=True, **given)[:2]
    agree(found, want)
    assert all(torch.equal(x, y) for x, y in zip(*copies, strict=True))
    assert launched == ["forward_bf16_d128_causal_paged"]


VARLEN = {
    "16 bits": (draw(seqlen_q=50), "forward_bf16_d128_causal_paged"),
    "e4m3": (over_e4m3(seqlen_q=50), "forward_bf16_e4m3_d128_causal"),
}


@needs_compiler
@pytest.mark.parametrize("name", VARLEN)
def test_the_varlen_function(name, launched, monkeypatch):
    ((q, *cache), given), kernel = VARLEN[name]
    lengths = {"cu_seqlens_q": int32([0, 90, 90, 150]), "seqused_k": given["cache_seqlens"]}
    lengths |= {"cu_seqlens_k": None, "max_seqlen_q": 90, "max_seqlen_k": 150}

    def call():
        return flash_attn_varlen_func(
            q.reshape(150, 2, 128),
            *cache,
            page_table=given["page_table"],
            causal=True,
            return_attn_probs=True,
            **lengths,
        )

    want = call()
    with device().serving_cpu_tensors(monkeypatch):
        found = call()
    agree(found, want)
    assert launched == [kernel]

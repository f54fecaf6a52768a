"""The imports of frameworks, and calls in the shapes that they make of what they import.

Megatron-LM, TransformerEngine, OLMo-core, DeepSpeed and transformers. Nothing but the imports is
theirs; the calls are written anew. `test_compat_ring.py` has ring-flash-attention's.
"""

import importlib.metadata
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F

import flash8
from flash8.compat import install
from framework_cases import (
    BATCH,
    CU_SEQLENS,
    DIM,
    HEADS,
    HEADS_KV,
    IMPORTS,
    SEQLEN,
    dense,
    imported,
    near,
    packed,
    whole,
)


@pytest.fixture(autouse=True)
def installed():
    with install():
        yield


@pytest.mark.parametrize("framework", IMPORTS)
def test_imports(framework):
    names = {name: x for name, x in imported(framework).items() if name != "__builtins__"}
    modules = {getattr(x, "__module__", None) or x.__name__ for x in names.values()}
    assert all(module.startswith("flash8.") for module in modules)


def test_versions_that_frameworks_ask_for():
    assert (2, 1, 1) <= release("flash-attn") < (2, 8, 4)  # TransformerEngine
    assert release("flash-attn-3") >= (3, 0, 0)
    assert imported("Megatron-LM")["fa"].__version__ == importlib.metadata.version("flash-attn")


def release(name):
    return tuple(int(part) for part in importlib.metadata.version(name).split("."))


# TransformerEngine's context parallelism gives the lengths by position and the rest by name.


def test_transformer_engine_with_flash_attention_2():
    names = imported("TransformerEngine")
    q, k, v, dout = packed()
    lengths = [CU_SEQLENS, CU_SEQLENS, 16, 16]
    forward = dict(softmax_scale=0.3, dropout_p=0.2, return_softmax=False, softcap=0.0)
    forward |= dict(window_size_left=-1, window_size_right=0, alibi_slopes=None)
    out, lse, _, rng_state = names["_flash_attn_varlen_fwd"](
        q, k, v, *lengths, causal=True, block_table=None, **forward
    )
    written = [torch.empty_like(x) for x in (q, k, v)]
    backward = {**forward, "deterministic": False, "rng_state": rng_state, "causal": True}
    del backward["return_softmax"]
    names["_flash_attn_varlen_bwd"](dout, q, k, v, out, lse, *written, *lengths, **backward)
    want = whole(
        lambda q, k, v, **options: flash8.flash_attn_varlen_func(q, k, v, *lengths, **options),
        *(q, k, v, dout),
        causal=True,
        softmax_scale=0.3,
        dropout_p=0.2,
        dropout_seed=rng_state[:1],
    )
    near((out, lse, *written), want)
    # The modules: dropout by position.
    got = names["flash_attn_varlen_func"](
        q,
        k,
        v,
        *lengths,
        0.0,
        softmax_scale=0.3,
        causal=True,
        window_size=(-1, 0),
        alibi_slopes=None,
        deterministic=True,
    )
    options = dict(softmax_scale=0.3, causal=True)
    near(got, flash8.flash_attn_varlen_func(q, k, v, *lengths, **options))


@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_transformer_engine_with_flash_attention_3(layout):
    names = imported("TransformerEngine")
    forward, backward = names["_flash_attn_fwd_v3"], names["_flash_attn_bwd_v3"]
    used = torch.tensor([5, 16], dtype=torch.int32)  # padding between the sequences
    if layout == "thd":
        q, k, v, dout = packed()
        lengths = [CU_SEQLENS, CU_SEQLENS]
        before = [*[None] * 4, *lengths, None, used, used, 16, 16, *[None] * 9]
        between = [*lengths, used, used, 16, 16]

        def attention(q, k, v, **options):
            return flash8.flash_attn_varlen_func(q, k, v, *lengths, 16, 16, used, used, **options)

    else:
        q, k, v, dout = dense()
        before = [*[None] * 9, SEQLEN, SEQLEN, *[None] * 9]
        between = [None, None, None, None, SEQLEN, SEQLEN]
        attention = flash8.flash_attn_func
    options = dict(softmax_scale=0.3, window_size_left=-1, window_size_right=0)
    out, lse, *_ = forward(q, k, v, *before, causal=True, **options)
    written = [torch.zeros_like(x) for x in (q, k, v)]
    backward(
        dout, q, k, v, out, lse, *between, *written, is_causal=True, deterministic=False, **options
    )
    want = whole(attention, q, k, v, dout, causal=True, softmax_scale=0.3)
    near((out, lse, *written), want)


def test_transformer_engine_in_fp8_and_with_a_cache():
    names = imported("TransformerEngine")
    q, k, v, _ = packed()
    e4m3 = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    scale = torch.tensor([0.5])
    descales = {f"{x}_descale": scale.unsqueeze(0).repeat(2, HEADS_KV) for x in "qkv"}
    lengths = (CU_SEQLENS, CU_SEQLENS, 16, 16)
    options = dict(softmax_scale=0.3, causal=True, window_size=(-1, 0), num_splits=1)
    out = names["flash_attn_varlen_func_v3"](*e4m3, *lengths, **options, **descales)
    scalar = dict.fromkeys(descales, torch.tensor(0.5))
    near(out, flash8.flash_attn_varlen_func(*e4m3, *lengths, **options, **scalar))
    caches = [torch.randn(BATCH, 32, HEADS_KV, DIM) for _ in range(2)]
    got = names["flash_attn_with_kvcache_v3"](
        q,
        *caches,
        cu_seqlens_q=CU_SEQLENS,
        max_seqlen_q=16,
        cache_seqlens=torch.tensor([9, 30], dtype=torch.int32),
        **options,
    )
    assert got.shape == q.shape


# Megatron-LM asks the signature which of its arguments there are, and finds LSE by its rank.


UNUSED = ["k_new", "v_new", "qv", "out", "out_", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q"]
UNUSED += ["kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"]
UNUSED += ["q_descale", "k_descale", "v_descale"]


def test_megatron_dynamic_batching():
    forward = imported("Megatron-LM")["_flash_attn_forward"]
    assert inspect.isfunction(forward)
    q = packed()[0]
    pages = [torch.randn(6, 8, HEADS_KV, DIM) for _ in range(2)]
    table = torch.tensor([[1, 4], [3, 0]], dtype=torch.int32)
    used = torch.tensor([9, 16], dtype=torch.int32)
    candidates = dict.fromkeys([*UNUSED, "scheduler_metadata", "pack_gqa"])
    candidates |= dict(q=q, k=pages[0], v=pages[1], cu_seqlens_q=CU_SEQLENS, seqused_k=used)
    candidates |= dict(max_seqlen_q=16, max_seqlen_k=16, page_table=table, softmax_scale=0.3)
    candidates |= dict(causal=True, attention_chunk=0, softcap=0.0, window_size=(-1, -1))
    candidates |= dict(window_size_left=-1, window_size_right=-1, rotary_interleaved=True)
    candidates |= dict(num_splits=0, sm_margin=0)
    known = inspect.signature(forward).parameters
    out, *others = forward(**{name: candidates[name] for name in known if name in candidates})
    (lse,) = [x for x in others if x.dim() == 2 and x.shape[0] == HEADS]
    want = flash8.flash_attn_varlen_func(
        q,
        *pages,
        CU_SEQLENS,
        None,
        16,
        16,
        seqused_k=used,
        page_table=table,
        softmax_scale=0.3,
        causal=True,
        return_attn_probs=True,
    )
    near((out, lse), want)


def test_megatron_flash_decoding():
    names = imported("Megatron-LM")
    q, k, v = (torch.randn(1, BATCH, heads, DIM) for heads in (HEADS, HEADS_KV, HEADS_KV))
    caches = [torch.randn(32, BATCH, HEADS_KV, DIM) for _ in range(2)]  # (seqlen, batch, ...)
    angles = torch.rand(32, DIM // 2)
    rotary = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=False)
    new = dict(q=q, k=k, v=v)
    new = {name: x.permute(1, 0, 2, 3) for name, x in new.items()}
    given = dict(k_cache=caches[0].permute(1, 0, 2, 3), v_cache=caches[1].permute(1, 0, 2, 3))
    copies = {name: x.clone() for name, x in given.items()}
    out, lse = names["flash_attn_with_kvcache"](
        **new, **given, cache_seqlens=7, return_softmax_lse=True, **rotary
    )
    want, want_lse, *_ = flash8.flash_attn_with_kvcache(
        **new, **copies, cache_seqlens=7, return_softmax_lse=True, **rotary
    )
    near((out, lse), (want, want_lse))
    near(caches[0].permute(1, 0, 2, 3), copies["k_cache"])
    turned = names["apply_rotary_emb_flash"](new["q"], angles.cos(), angles.sin(), False)
    assert turned.shape == new["q"].shape


def test_deepspeed_by_position():
    names = imported("DeepSpeed")
    assert names["flash_attn"].__version__ >= "2.7.0"
    q, k, v, dout = dense()
    out, lse, _, _ = names["_flash_attn_forward"](
        q,
        k,
        v,
        0.0,
        0.3,
        causal=True,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    written = [torch.empty_like(x) for x in (q, k, v)]
    names["_flash_attn_backward"](
        dout, q, k, v, out, lse, *written, 0.0, 0.3, True, -1, -1, 0.0, None, False, rng_state=None
    )
    options = dict(causal=True, softmax_scale=0.3)
    near((out, lse, *written), whole(flash8.flash_attn_func, q, k, v, dout, **options))


def test_olmo_core():
    names = imported("OLMo-core")
    q, k, v, _ = dense()
    options = dict(softmax_scale=None, causal=True, window_size=(5, 0))
    want = flash8.flash_attn_func(q, k, v, **options)
    near(names["flash_attn_2"].flash_attn_func(q, k, v, dropout_p=0.0, **options), want)
    near(names["flash_attn_3"].flash_attn_func(q, k, v, **options), want)
    steps = torch.arange(BATCH + 1, dtype=torch.int32) * SEQLEN
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    lengths = (steps, steps, SEQLEN, SEQLEN)
    for module in ("flash_attn_2", "flash_attn_3"):
        out = names[module].flash_attn_varlen_func(*flat, *lengths, **options)
        near(out.view_as(want), want)
        qkv = torch.stack((k, k, v), 2)
        out = names[module].flash_attn_varlen_qkvpacked_func(
            qkv.flatten(0, 1), steps, SEQLEN, **options
        )
        near(out.view_as(k), names[module].flash_attn_qkvpacked_func(qkv, **options))
        cached = names[module].flash_attn_with_kvcache(
            q,
            k.clone(),
            v.clone(),
            k=None,
            v=None,
            cache_seqlens=torch.full((BATCH,), SEQLEN, dtype=torch.int32),
            cache_leftpad=None,
            **options,
        )
        near(cached, want)
    x, weight = torch.randn(3, 8), torch.rand(8)
    near(names["rms_norm_fn"](x, weight, None, eps=1e-5), F.rms_norm(x, (8,), weight, 1e-5))
    angles = torch.rand(20, DIM // 2)
    turned = names["apply_rotary_emb_qkv_"](
        qkv, angles.cos(), angles.sin(), interleaved=False, seqlen_offsets=3
    )
    assert turned.shape == qkv.shape


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_transformers(implementation, monkeypatch):
    """Its own function, on CPU tensors: with a padding mask, a window, packed positions."""
    pytest.importorskip("transformers")
    from transformers import modeling_flash_attention_utils as utils

    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(utils, name, None)
    for version in (2, 3):  # both ask for a GPU
        available = implementation.endswith(str(version))
        monkeypatch.setattr(utils, f"is_flash_attn_{version}_available", lambda x=available: x)
    q, k, v, _ = dense()
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.int64)
    mask[0, :5] = 0
    shared = dict(query_length=SEQLEN, is_causal=True, attn_implementation=implementation)
    out = utils._flash_attention_forward(q, k, v, None, sliding_window=4, **shared)
    near(out, flash8.flash_attn_func(q, k, v, causal=True, window_size=(3, 3)))
    padded = utils._flash_attention_forward(q, k, v, mask, softmax_scale=0.3, **shared)
    rows = [x[0, None, 5:] for x in (q, k, v)]
    near(padded[0, None, 5:], flash8.flash_attn_func(*rows, 0.3, True))
    positions = torch.tensor([[*range(7), *range(5)]])
    parts = [x[:1] for x in (q, k, v)]
    out = utils._flash_attention_forward(*parts, None, position_ids=positions, **shared)
    second = [x[:, 7:] for x in parts]
    near(out[:, 7:], flash8.flash_attn_func(*second, causal=True))
    assert utils._flash_fn.__module__.startswith("flash8.compat")


def test_frameworks_do_not_find_version_4():
    with pytest.raises(ImportError):
        exec("from flash_attn.cute import flash_attn_varlen_func", {})
    assert "flash_attn.cute" not in sys.modules

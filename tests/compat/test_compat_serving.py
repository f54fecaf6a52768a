"""FlashAttention-3's functions with the keywords that vLLM and SGLang pass."""

import inspect

import pytest
import torch

import flash8
from flash8.compat import flash_attn_interface as fa3
from flash8.compat import vllm_flash_attn

HEADS, HEADS_KV, DIM, PAGE = 4, 2, 16, 8
CU_SEQLENS_Q = torch.tensor([0, 2, 5], dtype=torch.int32)
USED = torch.tensor([11, 7], dtype=torch.int32)
TABLE = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def paged(dtype=torch.bfloat16, cache_dtype=None):
    q = torch.randn(5, HEADS, DIM, dtype=dtype)
    cache = [torch.randn(4, PAGE, HEADS_KV, DIM).to(cache_dtype or dtype) for _ in range(2)]
    return q, *cache


def wanted(q, k, v, **options):
    return flash8.flash_attn_varlen_func(
        q, k, v, CU_SEQLENS_Q, None, 3, 16, seqused_k=USED, page_table=TABLE, **options
    )


FUNCTIONS = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_positions_are_those_of_flash_attention_3(name):
    ours, native = (
        [
            parameter.name
            for parameter in inspect.signature(getattr(module, name)).parameters.values()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        for module in (fa3, flash8)
    )
    assert ours == native


def test_vllm_by_position_and_by_name():
    q, k, v = paged()
    options = dict(causal=True, softmax_scale=0.3, softcap=5.0)
    want = wanted(q, k, v, window_size=(6, 0), s_aux=SINKS, return_attn_probs=True, **options)
    out = torch.empty_like(q)
    got = vllm_flash_attn.flash_attn_varlen_func(
        q,
        k,
        v,
        3,
        CU_SEQLENS_Q,
        16,
        seqused_k=USED,
        window_size=[6, 0],
        block_table=TABLE,
        return_softmax_lse=True,
        out=out,
        scheduler_metadata=None,
        # A 16-bit cache has descales of 1 there, which the kernel does not look at.
        q_descale=None,
        k_descale=torch.ones(1).expand(2, HEADS_KV),
        v_descale=torch.ones(1).expand(2, HEADS_KV),
        num_splits=0,
        fa_version=3,
        s_aux=SINKS,
        **options,
    )
    assert got[0] is out
    torch.testing.assert_close(got, want)
    dense = torch.randn(5, HEADS_KV, DIM, dtype=torch.bfloat16)
    plain = vllm_flash_attn.flash_attn_varlen_func(
        q, dense, dense, 3, CU_SEQLENS_Q, 3, CU_SEQLENS_Q, causal=True, dropout_p=0.0
    )
    lengths = (CU_SEQLENS_Q, CU_SEQLENS_Q, 3, 3)
    assert torch.equal(plain, flash8.flash_attn_varlen_func(q, dense, dense, *lengths, causal=True))


def test_vllm_says_what_is_not_served():
    assert vllm_flash_attn.is_fa_version_supported(2)
    assert vllm_flash_attn.fa_version_unsupported_reason(3) is None
    assert not vllm_flash_attn.is_fa_version_supported(4)
    q, k, v = paged()
    call = dict(seqused_k=USED, block_table=TABLE)
    with pytest.raises(ValueError, match="not of 4"):
        vllm_flash_attn.flash_attn_varlen_func(q, k, v, 3, CU_SEQLENS_Q, 16, fa_version=4, **call)
    with pytest.raises(NotImplementedError, match="cp_world_size must be 1"):
        vllm_flash_attn.flash_attn_varlen_func(
            q, k, v, 3, CU_SEQLENS_Q, 16, cp_world_size=2, **call
        )


def test_vllm_plan():
    sizes = (2, 3, 16, HEADS, HEADS_KV, DIM, USED)
    named = dict(page_size=PAGE, causal=True, window_size=(6, 0), num_splits=2)
    got = vllm_flash_attn.get_scheduler_metadata(*sizes, **named)
    assert torch.equal(got, flash8.get_scheduler_metadata(*sizes, **named))


@pytest.mark.parametrize("paging", ["page_table", "block_table"])
def test_sglang_decodes(paging):
    q, k, v = paged()
    want = wanted(q, k, v, causal=True, s_aux=SINKS, return_attn_probs=True)
    out, lse, *rest = fa3.flash_attn_with_kvcache(
        q=q,
        k_cache=k,
        v_cache=v,
        cache_seqlens=USED,
        cu_seqlens_q=CU_SEQLENS_Q,
        cu_seqlens_k_new=torch.tensor([0, 11, 18], dtype=torch.int32),
        max_seqlen_q=3,
        causal=True,
        window_size=(-1, -1),
        num_splits=1,
        k_descale=None,
        v_descale=None,
        return_softmax_lse=True,
        sinks=SINKS,
        ver=3,
        **{paging: TABLE},
    )
    assert len(rest) == 2
    torch.testing.assert_close((out, lse), want)


def test_sglang_prefills():
    q = torch.randn(5, HEADS, DIM, dtype=torch.bfloat16)
    kv = torch.randn(5, HEADS_KV, DIM, dtype=torch.bfloat16)
    lengths = (CU_SEQLENS_Q, CU_SEQLENS_Q, 3, 3)
    want = flash8.flash_attn_varlen_func(
        q, kv, kv, *lengths, causal=True, s_aux=SINKS, return_attn_probs=True
    )
    got = fa3.flash_attn_varlen_func(
        q=q,
        k=kv,
        v=kv,
        cu_seqlens_q=CU_SEQLENS_Q,
        cu_seqlens_k=CU_SEQLENS_Q,
        max_seqlen_q=3,
        max_seqlen_k=3,
        causal=True,
        return_softmax_lse=True,
        sinks=SINKS,
        ver=3,
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_block_table_of_a_varlen_call():
    q, k, v = paged()
    want = wanted(q, k, v, causal=True)
    cu_seqlens_k = torch.tensor([0, 11, 18], dtype=torch.int32)
    options = dict(causal=True, block_table=TABLE, fa_version=3, window_size=None)
    out = fa3.flash_attn_varlen_func(q, k, v, CU_SEQLENS_Q, cu_seqlens_k, 3, 16, **options)
    torch.testing.assert_close(out, want)
    out = fa3.flash_attn_varlen_func(
        q, k, v, CU_SEQLENS_Q, None, 3, 16, seqused_k=USED, scheduler_metadata=None, **options
    )
    torch.testing.assert_close(out, want)
    with pytest.raises(ValueError, match="page_table and block_table are one argument"):
        fa3.flash_attn_varlen_func(q, k, v, CU_SEQLENS_Q, None, 3, 16, page_table=TABLE, **options)


DESCALES = {
    "number": 0.5,
    "one": torch.tensor([0.5]),
    "scalar": torch.tensor(0.5),
    "by head": torch.tensor([0.5, 0.5]),
    "by sequence and head": torch.full((2, HEADS_KV), 0.5),
}


@pytest.mark.parametrize("shape", DESCALES)
def test_shapes_of_descales(shape):
    descale = DESCALES[shape]
    q, k, v = paged(cache_dtype=torch.float8_e4m3fn)
    want = wanted(q, k, v, k_descale=torch.tensor(0.5), v_descale=torch.tensor(0.5))
    named = dict(k_descale=descale, v_descale=descale)
    call = dict(seqused_k=USED, block_table=TABLE)
    got = vllm_flash_attn.flash_attn_varlen_func(q, k, v, 3, CU_SEQLENS_Q, 16, **call, **named)
    torch.testing.assert_close(got, want)
    call = dict(cache_seqlens=USED, page_table=TABLE, cu_seqlens_q=CU_SEQLENS_Q, max_seqlen_q=3)
    torch.testing.assert_close(fa3.flash_attn_with_kvcache(q, k, v, **call, **named), want)
    # All of them float8, dense; the descale of 16-bit tensors is not looked at.
    x = torch.randn(2, 6, HEADS_KV, DIM)
    e4m3 = x.to(torch.float8_e4m3fn)
    out = fa3.flash_attn_func(e4m3, e4m3, e4m3, q_descale=descale, **named)
    want = flash8.flash_attn_func(
        e4m3, e4m3, e4m3, **dict.fromkeys(("q_descale", *named), torch.tensor(0.5))
    )
    torch.testing.assert_close(out, want)
    assert torch.equal(fa3.flash_attn_func(x, x, x, **named), flash8.flash_attn_func(x, x, x))


def test_descales_by_head_are_those_of_each_head():
    x = torch.randn(3, 6, HEADS_KV, DIM).to(torch.float8_e4m3fn)
    by_head = torch.tensor([0.25, 2.0])
    out = fa3.flash_attn_func(x, x, x, v_descale=by_head)
    want = flash8.flash_attn_func(x, x, x, v_descale=by_head.repeat(3, 1))
    assert torch.equal(out, want)

"""Errors name the argument that the caller passed, in every public function."""

import re

import pytest
import torch

import flash8
from argument_cases import cache, ones, pages
from cases import int32

BF16 = torch.bfloat16


def qkvpacked(**changes):
    return flash8.flash_attn_qkvpacked_func(**{"qkv": ones(2, 5, 3, 2, 16), **changes})


def varlen_qkvpacked(**changes):
    arguments = dict(qkv=ones(9, 3, 2, 16), cu_seqlens=int32([0, 4, 9]), max_seqlen=5)
    return flash8.flash_attn_varlen_qkvpacked_func(**{**arguments, **changes})


def kvpacked(**changes):
    arguments = dict(q=ones(2, 5, 4, 16), kv=ones(2, 7, 2, 2, 16))
    return flash8.flash_attn_kvpacked_func(**{**arguments, **changes})


def varlen_kvpacked(**changes):
    arguments = dict(
        q=ones(9, 4, 16),
        kv=ones(12, 2, 2, 16),
        cu_seqlens_q=int32([0, 4, 9]),
        cu_seqlens_k=int32([0, 7, 12]),
        max_seqlen_q=5,
        max_seqlen_k=7,
    )
    return flash8.flash_attn_varlen_kvpacked_func(**{**arguments, **changes})


def fp8_attention(**changes):
    arguments = dict(q=ones(9, 4, 16), k=ones(9, 2, 16), v=ones(9, 2, 16))
    arguments |= dict(cu_seqlens_q=int32([0, 4, 9]), cu_seqlens_k=int32([0, 4, 9]))
    arguments |= dict(max_seqlen_q=5, max_seqlen_k=5)
    return flash8.fp8.fp8_attention(**{**arguments, **changes})


#: Names of other functions that a message must not have.
FOREIGN = {
    qkvpacked: ("k must", "v must", "q must", "cu_seqlens_q"),
    varlen_qkvpacked: ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "q must"),
    kvpacked: ("k must", "cu_seqlens"),
    varlen_kvpacked: ("k must",),
    cache: ("seqused_k", "leftpad_k", "kv_batch_idx", "max_seqlen_k"),
    pages: ("seqused_k", "leftpad_k", "kv_batch_idx", "max_seqlen_k"),
    fp8_attention: (),
}
BAD = [
    (qkvpacked, dict(qkv=ones(2, 5, 3, 2, 600)), "qkv (head_dim)"),
    (qkvpacked, dict(qkv=[1]), "qkv must"),
    (qkvpacked, dict(qkv=ones(2, 5, 2, 2, 16)), "qkv must"),
    (qkvpacked, dict(qkv=ones(2, 5, 3, 0, 16)), "heads of qkv"),
    (qkvpacked, dict(qkv=ones(2, 5, 7, 16), num_heads_q=3), "num_heads_q must be a multiple"),
    (qkvpacked, dict(softmax_scale=torch.tensor(1.0)), "softmax_scale.item()"),
    (qkvpacked, dict(out=ones(2, 5, 2, 17)), "out must"),
    (qkvpacked, dict(wrong=1), "'wrong'"),
    (varlen_qkvpacked, dict(cu_seqlens=int32([0, 5, 4])), "cu_seqlens must never decrease"),
    (varlen_qkvpacked, dict(cu_seqlens=int32([0, 4, 10])), "cu_seqlens must end"),
    (varlen_qkvpacked, dict(cu_seqlens=int32([1, 4, 9])), "cu_seqlens must start"),
    (varlen_qkvpacked, dict(cu_seqlens=ones(3)), "cu_seqlens must have dtype"),
    (varlen_qkvpacked, dict(cu_seqlens=int32([[0, 9]])), "cu_seqlens must have 1 dim"),
    (varlen_qkvpacked, dict(cu_seqlens=int32([])), "cu_seqlens must have batch + 1"),
    (varlen_qkvpacked, dict(max_seqlen=4), "max_seqlen must be at least"),
    (varlen_qkvpacked, dict(max_seqlen=-1), "max_seqlen must be an integer"),
    (varlen_qkvpacked, dict(max_seqlen=None), "max_seqlen must be given with cu_seqlens"),
    (kvpacked, dict(kv=ones(2, 7, 2, 2, 24)), "kv must have q's head_dim"),
    (kvpacked, dict(kv=ones(3, 7, 2, 2, 16)), "kv must have the batch size"),
    (kvpacked, dict(kv=ones(2, 7, 2, 3, 16)), "heads of kv"),
    (kvpacked, dict(kv=ones(2, 7, 2, 2, 16).to(BF16)), "kv must have dtype"),
    (varlen_kvpacked, dict(kv=ones(12, 2, 2, 16, device="meta")), "kv must be on"),
    (varlen_kvpacked, dict(cu_seqlens_k=int32([0, 7, 13])), "cu_seqlens_k must end"),
    (varlen_kvpacked, dict(seqused_k=int32([8, 1])), "seqused_k must be from 0 to 7"),
    (cache, dict(cache_seqlens=int32([5, 21])), "cache_seqlens must be from 0 to 20"),
    (cache, dict(cache_seqlens=int32([5, 19])), "cache_seqlens, with the appended rows, must"),
    (
        cache,
        dict(k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=21),
        "cache_seqlens",
    ),
    (cache, dict(cache_seqlens=ones(2)), "cache_seqlens must have dtype"),
    (cache, dict(cache_leftpad=int32([6, 0])), "cache_leftpad must be from 0 to 5"),
    (cache, dict(cache_leftpad=ones(2)), "cache_leftpad must have dtype"),
    (cache, dict(cache_batch_idx=int32([0, 3])), "cache_batch_idx must be from 0 to 1"),
    (cache, dict(cache_batch_idx=ones(2)), "cache_batch_idx must have dtype"),
    (cache, dict(k_cache=ones(2, 20, 2, 24)), "k_cache must have q's head_dim"),
    (cache, dict(v_cache=ones(2, 19, 2, 8)), "v_cache must have k_cache's shape"),
    (cache, dict(cu_seqlens_k_new=ones(3)), "cu_seqlens_k_new must have dtype"),
    (pages, dict(cache_seqlens=None), "cache_seqlens"),
    (pages, dict(page_table=int32([[0, 9, 1, 3], [4, 5, 6, 7]])), "page_table must hold"),
    (fp8_attention, dict(cu_seqlens_q=int32([0, 5, 4])), "cu_seqlens_q must never decrease"),
    (fp8_attention, dict(max_seqlen_k=4), "max_seqlen_k must be at least"),
    (fp8_attention, dict(q=ones(9, 4, 16).to(torch.float8_e4m3fn)), "q must be a 16-bit tensor"),
]


def test_the_calls_below_are_valid_when_unchanged():
    for call in FOREIGN:
        call()


@pytest.mark.parametrize("row", BAD, ids=lambda row: f"{row[0].__name__} {' '.join(row[1])}")
def test_name(row):
    call, changes, text = row
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**changes)
    message = str(caught.value)
    assert text in message
    assert not any(re.search(rf"\b{name}", message) for name in FOREIGN[call]), message
    assert caught.type in (TypeError, ValueError)

"""FLASH8_CHECK_INDICES=1: what index tensors hold is checked before a kernel reads them."""

import pytest
import torch

import flash8
from cases import cumulative, int32
from flash8 import backends, fp8
from flash8.backends import index_checks
from flash8.ops import plan_cache

BATCH, HEADS, D = 3, 2, 64


@pytest.fixture
def wanted(monkeypatch):
    """Calls are for kernels, and the variable is set."""
    monkeypatch.setattr(backends, "kernels_wanted", lambda tensor: True)
    monkeypatch.setattr(index_checks, "wanted", lambda: True)


@pytest.fixture
def unread(monkeypatch):
    index_checks.wanted.cache_clear()
    yield monkeypatch
    index_checks.wanted.cache_clear()


@pytest.mark.parametrize("given, set_", [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable(unread, given, set_):
    if given is None:
        unread.delenv("FLASH8_CHECK_INDICES", raising=False)
    else:
        unread.setenv("FLASH8_CHECK_INDICES", given)
    assert index_checks.wanted() == set_
    unread.setenv("FLASH8_CHECK_INDICES", "yes")
    assert index_checks.wanted() == set_  # read once


def test_other_values_are_refused(unread):
    unread.setenv("FLASH8_CHECK_INDICES", "yes")
    with pytest.raises(ValueError, match="FLASH8_CHECK_INDICES is 'yes'; supported are '0' and"):
        index_checks.wanted()


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(*shape, HEADS, D, dtype=dtype)


PACKED = {
    "cu_seqlens_q must start with 0, got 2": {"cu_seqlens_q": int32([2, 5, 9, 9])},
    "cu_seqlens_q must never decrease, got 5 at index 1 and 4": {
        "cu_seqlens_q": int32([0, 5, 4, 9])
    },
    "cu_seqlens_k must end within the 9 rows": {"cu_seqlens_k": int32([0, 5, 9, 10])},
    r"seqused_q must be from 0 to 4 at index 1, got 5": {"seqused_q": int32([5, 5, 0])},
    r"seqused_k.* must be from 0 to 4 at index 1, got -1": {"seqused_k": int32([5, -1, 0])},
    "max_seqlen_k must be at least the longest sequence 5": {"max_seqlen_k": 3},
}


@pytest.mark.parametrize("message", PACKED)
def test_packed(wanted, message):
    offsets = cumulative((5, 4, 0))
    given = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 5}
    given = {**given, "max_seqlen_k": 5, **PACKED[message]}
    with pytest.raises(ValueError, match=message):
        flash8.flash_attn_varlen_func(rows(9), rows(9), rows(9), **given)


CACHE = {
    r"cache_leftpad must be from 0 to 5 at index 1, got 6": {"cache_leftpad": int32([0, 6, 0])},
    r"cache_batch_idx must be from 0 to 3.* at index 2, got 4": {
        "cache_batch_idx": int32([0, 1, 4])
    },
}


@pytest.mark.parametrize("message", CACHE)
def test_cache(wanted, message):
    used = int32([5, 5, 5])
    caches = [rows(4 if "cache_batch_idx" in CACHE[message] else BATCH, 8) for _ in "kv"]
    with pytest.raises(ValueError, match=message):
        flash8.flash_attn_with_kvcache(
            rows(BATCH, 1), *caches, cache_seqlens=used, **CACHE[message]
        )


def test_page_table(wanted):
    table = torch.tensor([[0, 1], [2, 7], [1, -1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"page_table must hold page indices from 0 to 3, got 7"):
        flash8.flash_attn_with_kvcache(
            rows(BATCH, 1),
            rows(4, 16),
            rows(4, 16),
            cache_seqlens=int32([20, 20, 3]),
            page_table=table,
        )


def test_descales(wanted):
    x = rows(1, 4, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="k_descale must be positive and finite"):
        flash8.flash_attn_func(x, x, x, k_descale=torch.tensor(-1.0))


def test_quantization(wanted):
    """The quantizer's op reads the same tensors."""
    with pytest.raises(ValueError, match="cu_seqlens must never decrease"):
        fp8.quantize(rows(9), "head", cu_seqlens=int32([0, 5, 4, 9]))
    with pytest.raises(ValueError, match="seqused must be from 0 to 9 at index 0, got 10"):
        fp8.quantize(rows(1, 9), "head", seqused=int32([10]))


def test_an_append_of_quantized_rows(wanted):
    cache = [rows(BATCH, 8, dtype=torch.float8_e4m3fn) for _ in range(2)]
    new = rows(BATCH, 2)
    with pytest.raises(ValueError, match="at index 1"):
        flash8.flash_attn_with_kvcache(new, *cache, new, new, cache_seqlens=int32([0, 7, 0]))


def test_no_call_is_a_hit_meanwhile(wanted):
    assert not plan_cache.may_launch(rows(1, 4))


def test_nothing_is_read_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr(index_checks, "wanted", lambda: False)
    q = rows(9)
    index_checks.check_quantize(q, int32([0, 5, 4, 9]), None, torch.tensor(-1.0))
    index_checks.check_append(q, q, q, None, None, None, torch.tensor(-1.0))

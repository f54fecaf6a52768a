"""Arguments that public helpers refuse by name: each once got an exception from deep inside."""

import numpy as np
import pytest
import torch

import flash8
from flash8 import fp8, varlen

ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
X = torch.randn(2, 3, 4)


def scheduled(**changes):
    arguments = {"batch_size": 2, "max_seqlen_q": 1, "max_seqlen_k": 40, "num_heads_q": 4}
    arguments |= {"num_heads_kv": 2, "headdim": 64, "cache_seqlens": ENDS[1:]}
    return flash8.get_scheduler_metadata(**(arguments | changes))


REFUSED = {
    "amax: a number": (TypeError, "amax", lambda: fp8.descale_of(2.0)),
    "amax: integers": (TypeError, "amax", lambda: fp8.descale_of(ENDS)),
    "dtype of descale_of": (TypeError, "dtype", lambda: fp8.descale_of(X, -2.0)),
    "dtype of descale_of, wide": (TypeError, "dtype", lambda: fp8.descale_of(X, torch.float32)),
    "dtype of dequantize": (TypeError, "dtype", lambda: fp8.dequantize(fp8.quantize(X[None]), -1)),
    "dtype of dequantize, ''": (
        TypeError,
        "dtype",
        lambda: fp8.dequantize(fp8.quantize(X[None]), ""),
    ),
    "block_offsets of a list": (TypeError, "cu_seqlens", lambda: fp8.block_offsets([0, 1])),
    "block_offsets of numpy": (TypeError, "cu_seqlens", lambda: fp8.block_offsets(np.ones(2))),
    "block_offsets of a scalar": (ValueError, "cu_seqlens", lambda: fp8.block_offsets(ENDS[0])),
    "descale of another granularity": (
        ValueError,
        "descale",
        lambda: fp8.quantize(X[None], "block", descale=torch.ones(2)),
    ),
    "descale of another batch": (
        ValueError,
        "descale",
        lambda: fp8.quantize(X[None].expand(2, 2, 3, 4), "head", descale=torch.ones(1, 3)),
    ),
    "num_heads_q": (ValueError, "num_heads_q", lambda: scheduled(num_heads_q=2**31)),
    "max_seqlen_k": (ValueError, "max_seqlen_k", lambda: scheduled(max_seqlen_k=2**31)),
    "max_seqlen_k_new": (ValueError, "max_seqlen_k_new", lambda: scheduled(max_seqlen_k_new=2**40)),
    "page_size": (ValueError, "page_size", lambda: scheduled(page_size=2**31)),
    "batch of dropout_mask": (
        ValueError,
        "batch",
        lambda: flash8.dropout_mask(0, 10**30, 1, 2, 2, 0.5),
    ),
    "seqlen_k of dropout_mask": (
        ValueError,
        "seqlen_k",
        lambda: flash8.dropout_mask(0, 1, 1, 2, 2**63, 0.5),
    ),
    "unpack a tuple": (TypeError, "packed", lambda: varlen.unpack((), ENDS)),
    "unpack a scalar": (ValueError, "packed", lambda: varlen.unpack(X[0, 0, 0], ENDS)),
    "unpad a sparse tensor": (
        TypeError,
        "hidden_states",
        lambda: varlen.unpad_input(X.to_sparse(), X[..., 0] > 0),
    ),
    "pad a sparse tensor": (
        TypeError,
        "hidden_states",
        lambda: varlen.pad_input(X[0].to_sparse(), ENDS[:2], 2, 3),
    ),
    "quantize by no offsets": (
        ValueError,
        "cu_seqlens",
        lambda: fp8.quantize(X, cu_seqlens=ENDS[:0]),
    ),
    "quantize by offsets that start anywhere": (
        ValueError,
        "cu_seqlens",
        lambda: fp8.quantize(X, cu_seqlens=ENDS[:1] - 2),
    ),
    "quantize by offsets that decrease": (
        ValueError,
        "cu_seqlens",
        lambda: fp8.quantize(X, cu_seqlens=torch.tensor([0, 2, 1])),
    ),
    "quantize more tokens than there are": (
        ValueError,
        "seqused",
        lambda: fp8.quantize(X[None], seqused=torch.tensor([3])),
    ),
    "unpad a list": (TypeError, "hidden_states", lambda: varlen.unpad_input([1], X[..., 0] > 0)),
    "pad a list": (TypeError, "hidden_states", lambda: varlen.pad_input([1], ENDS, 2, 3)),
    "pad to a tensor": (TypeError, "batch", lambda: varlen.pad_input(X[:, 0], ENDS[:2], X, 3)),
    "pad to less than nothing": (
        ValueError,
        "seqlen",
        lambda: varlen.pad_input(X[:, 0], ENDS[:2], 2, -3),
    ),
    "longest of no data": (ValueError, "cu_seqlens", lambda: varlen.max_seqlen_of(ENDS.to("meta"))),
    "positions in nothing": (
        ValueError,
        "cu_seqlens",
        lambda: varlen.position_ids_from_cu_seqlens(ENDS[:0], 2),
    ),
    "positions of too many": (
        ValueError,
        "total",
        lambda: varlen.position_ids_from_cu_seqlens(ENDS, 2**63),
    ),
    "positions of half a token": (
        TypeError,
        "total",
        lambda: varlen.position_ids_from_cu_seqlens(ENDS, 2.5),
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ["q", "softmax_scale", "causal", "num_splits", "s_aux"])
def test_a_nested_tensor_is_refused_by_name(name):
    q = torch.randn(1, 4, 2, 16)
    given = {"q": q, "k": q, "v": q, name: torch.nested.nested_tensor([q[0], q[0, :2]])}
    with pytest.raises(TypeError, match=rf"^{name} must "):
        flash8.flash_attn_func(**given)


@pytest.mark.parametrize("name", ["rotary_cos", "rotary_sin"])
def test_no_append_makes_the_cache_part_of_a_graph(name):
    """It would grow with every step, and the next call would be refused."""
    q, k, v = (torch.randn(1, 1, 2, 32) for _ in "qkv")
    caches = torch.zeros(1, 8, 2, 32), torch.zeros(1, 8, 2, 32)
    tables = {"rotary_cos": torch.rand(8, 16), "rotary_sin": torch.rand(8, 16)}
    tables[name].requires_grad_()
    lengths = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match="has no backward"):
        flash8.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **tables)
    with torch.no_grad():
        flash8.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **tables)
    assert not any(cache.requires_grad for cache in caches) and caches[0][0, 3].any()


def test_places_are_counted_in_pythons_ints():
    padded = varlen.pad_input(torch.ones(1, 3), torch.tensor([300]), np.uint8(6), np.uint8(255))
    assert padded.shape == (6, 255, 3) and padded.sum() == padded[1, 45].sum() == 3


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case):
    error, name, call = REFUSED[case]
    with pytest.raises(error, match=rf"^{name} must "):
        call()

"""out=: untouched by a call that is refused, apart from everything that is read."""

import contextlib

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash8 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def draw(heads=(4, 2, 2)):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(24, n, 64, generator=g) for n in heads]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = int32(0, 10, 24)
BAD_INDICES = {
    "queries that go back": {"cu_seqlens_q": int32(0, 30, 24)},
    "keys that go back": {"cu_seqlens_k": int32(0, 25, 24)},
    "keys that end elsewhere": {"cu_seqlens_k": int32(0, 10, 30)},
    "more used than there are": {"seqused_k": int32(10, 99)},
    "less than none": {"seqused_q": int32(10, -1)},
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_indices_leave_it_as_it_was(name):
    q, k, v = draw()
    indices = {"cu_seqlens_q": GOOD, "cu_seqlens_k": GOOD, **BAD_INDICES[name]}
    out = torch.full_like(q, 7.0)
    with pytest.raises(ValueError, match=r"seqlens|seqused"):
        flash_attn_varlen_func(q, k, v, max_seqlen_q=24, max_seqlen_k=24, out=out, **indices)
    assert (out == 7.0).all()


def test_a_bad_page_of_the_last_sequence_leaves_it_as_it_was():
    q = torch.randn(2, 3, 4, 64)
    k = torch.randn(4, 8, 2, 64)
    out = torch.full_like(q, 7.0)
    pages = int32(0, 1, 2, 99).view(2, 2)
    with pytest.raises(ValueError, match="page"):
        flash_attn_with_kvcache(q, k, k, cache_seqlens=int32(16, 16), page_table=pages, out=out)
    assert (out == 7.0).all()


@pytest.mark.parametrize("num_splits", [1, 3])
def test_no_indices_are_read_again_after_it_is_cleared(num_splits):
    q, k, v = draw()
    out = torch.full_like(q, 7.0)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        flash_attn_varlen_func(
            *(q, k, v, GOOD, int32(0, 25, 24), 24, 24), num_splits=num_splits, out=out
        )
    assert (out == 7.0).all()


def memory(*shape):
    """Two tensors over the same bytes that do not know of each other, as NumPy makes them."""
    array = np.zeros(int(np.prod(shape)) + 4, dtype=np.float32)
    first, second = torch.from_numpy(array[:-4]), torch.from_numpy(array[4:])
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    return first.view(shape), second.view(shape)


def test_memory_shared_by_two_storages_is_shared():
    q, out = memory(2, 8, 4, 64)
    k = torch.zeros(2, 8, 4, 64)
    with pytest.raises(ValueError, match="out must not share memory"):
        flash_attn_func(q, k, k, out=out)


def test_it_shares_memory_with_no_option_either():
    q = torch.zeros(1, 8, 4, 64)
    out = torch.zeros(q.shape)
    with pytest.raises(ValueError, match="out must not share memory"):
        flash_attn_func(q, q, q, out=out, alibi_slopes=out.flatten()[:4])


def test_a_fake_output_shares_memory_with_its_alias_only():
    with FakeTensorMode():
        q = torch.empty(2, 8, 4, 64)
        out = torch.empty_like(q)
        assert flash_attn_func(q, q, q, out=out) is out
        with pytest.raises(ValueError, match="out must not share memory"):
            flash_attn_func(q, q, q, out=q.view(q.shape))


@pytest.mark.parametrize("which", ["out", "q", "both"])
def test_a_subclass_shares_memory_with_its_alias(which):
    odd = type("Odd", (torch.Tensor,), {})
    q = torch.zeros(2, 8, 4, 64)
    out = q.as_subclass(odd) if which != "q" else q
    q = q.as_subclass(odd) if which != "out" else q
    k = torch.zeros(q.shape)
    with pytest.raises(ValueError, match="out must not share memory"):
        flash_attn_func(q, k, k, out=out)


#: Of a buffer (2, 8, 3, 4, 64), what q and out are, and whether they have memory in common.
PARTS = {
    "before it": (lambda x: x[:1, :, 0], lambda x: x[1:, :, 0], False),
    "after it": (lambda x: x[1:, :, 0], lambda x: x[:1, :, 0], False),
    "interlaced": (lambda x: x[:, :, 0], lambda x: x[:, :, 2], False),
    "interlaced channels": (lambda x: x[:, :, 0, :, :32], lambda x: x[:, :, 0, :, 32:], False),
    "the same": (lambda x: x[:, :, 1], lambda x: x[:, :, 1], True),
    "a token later": (lambda x: x[:, :-1, 1], lambda x: x[:, 1:, 1], True),
    "half a head later": (lambda x: x[:, :, 0, :, :33], lambda x: x[:, :, 0, :, 31:], True),
    "interlaced, of other strides": (  # they are apart, which is not looked for
        lambda x: x[:, ::2, 0],
        lambda x: x[:, 1:5, 1],
        True,
    ),
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_one_buffer(name, fake):
    """What lies elsewhere in q's storage may be written."""
    q_of, out_of, meet = PARTS[name]
    with FakeTensorMode() if fake else contextlib.nullcontext():
        buffer = torch.randn(2, 8, 3, 4, 64)
        q, out = q_of(buffer), out_of(buffer)
        k = torch.randn(q.shape)
        if meet:
            with pytest.raises(ValueError, match="out must not share memory with q: "):
                flash_attn_func(q, k, k, out=out)
            return
        want = flash_attn_func(q, k, k)
        found = flash_attn_func(q, k, k, out=out)
        assert found is out and (fake or torch.equal(found, want))


def test_the_argument_is_named_as_the_caller_has_it():
    cache = torch.zeros(1, 32, 4, 64)
    q = torch.zeros(1, 8, 4, 64)
    for name in ("k_cache", "v_cache"):
        caches = {"k_cache": torch.zeros(cache.shape), "v_cache": torch.zeros(cache.shape)}
        with pytest.raises(ValueError, match=f"out must not share memory with {name}: "):
            flash_attn_with_kvcache(q, **caches, cache_seqlens=8, out=caches[name][:, :8])
    lengths = int32(8)
    narrow, keys = q[:, :1, :1, :1], cache[..., :1, :1]
    out = lengths.view(torch.float32).view(narrow.shape)
    with pytest.raises(ValueError, match="out must not share memory with cache_seqlens"):
        flash_attn_with_kvcache(narrow, keys, keys, cache_seqlens=lengths, out=out)


@pytest.mark.parametrize(
    "strides", [(1024, 128, 32, 1), (1024, 64, 64, 1), (8, 256, 64, 1), (2048, 255, 64, 1)]
)
def test_it_does_not_overlap_itself(strides):
    q = torch.zeros(2, 8, 4, 64)
    out = torch.zeros(10_000).as_strided(q.shape, strides)
    with pytest.raises(ValueError, match="out must not overlap itself"):
        flash_attn_func(q, q, q, out=out)


@pytest.mark.parametrize("strides", [(2048, 64, 512, 1), (64, 512, 128, 1), (4096, 512, 64, 1)])
def test_any_order_of_dimensions_is_written(strides):
    q = torch.randn(2, 8, 4, 64)
    out = torch.zeros(10_000).as_strided(q.shape, strides)
    assert torch.equal(flash_attn_func(q, q, q, out=out), flash_attn_func(q, q, q))

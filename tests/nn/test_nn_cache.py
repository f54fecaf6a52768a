"""The caches of flash8.nn: prefill and decode against the full forward, dense, paged and e4m3."""

import pytest
import torch

from flash8 import varlen
from flash8.nn import (
    DenseKVCache,
    OutOfPagesError,
    PageAllocator,
    PagedKVCache,
)
from flash8.tensors.float8 import E4M3
from nn_reference import assert_near, make_mha
from tolerances import FP8_CACHE_TOTAL, rel_l2


def dense_cache(dtype=torch.float32, max_seqlen=64):
    return DenseKVCache(2, 4, max_seqlen, 2, 16, dtype=dtype)


def paged_cache(dtype=torch.float32, max_seqlen=64, num_pages=40, page_size=5):
    return PagedKVCache(2, num_pages, page_size, 4, max_seqlen, 2, 16, dtype=dtype)


CACHE_CASES = {
    "plain": {},
    "rotary": {"rotary_dim": 16},
    "rotary interleaved, window": {
        "rotary_dim": 16,
        "rotary_interleaved": True,
        "window_size": (6, 0),
    },
    "sinks, softcap": {"sinks": True, "softcap": 2.0},
    "alibi": {"alibi": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_cache", [dense_cache, paged_cache])
@pytest.mark.parametrize("case", CACHE_CASES)
@torch.no_grad()
def test_prefill_and_decode_is_the_full_forward(case, make_cache, dtype):
    layers = [make_mha(dtype, causal=True, num_heads_kv=2, **CACHE_CASES[case]) for _ in range(2)]
    cache = make_cache(dtype)
    texts = [torch.randn(n, 64, dtype=dtype) for n in (12, 3, 25)]
    cache.add_sequence()  # an idle row, so rows and batch places differ
    rows = [cache.add_sequence() for _ in texts]
    prefix = [7, 1, 20]

    def run(x, step, **packed):
        for index, layer in enumerate(layers):
            x = layer(x, cache=step.layer(index), **packed)
        step.commit()
        return x

    packed, cu_seqlens, max_seqlen = varlen.pack(
        [text[:n] for text, n in zip(texts, prefix, strict=True)]
    )
    step = cache.prepare(rows, prefix)
    outs = varlen.unpack(
        run(packed, step, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen), cu_seqlens
    )
    outs = [[out] for out in outs]
    positions = list(prefix)
    while alive := [i for i, text in enumerate(texts) if positions[i] < len(text)]:
        x = torch.stack([texts[i][positions[i]][None] for i in alive])
        out = run(x, cache.prepare([rows[i] for i in alive], 1))
        for place, i in enumerate(alive):
            outs[i].append(out[place])
            positions[i] += 1
    for text, parts, row in zip(texts, outs, rows, strict=True):
        assert cache.length(row) == len(text)
        x = text[None]
        for layer in layers:
            x = layer(x)
        assert_near(torch.cat(parts), x[0], dtype)


@pytest.mark.parametrize("make_cache", [DenseKVCache, PagedKVCache])
@pytest.mark.parametrize("rotary_dim", [0, 16])
@torch.no_grad()
def test_e4m3_cache_is_attention_over_what_it_holds(make_cache, rotary_dim):
    mha = make_mha(causal=True, num_heads_kv=2, rotary_dim=rotary_dim)
    sizes = (2, 4, 64, 2, 16) if make_cache is DenseKVCache else (2, 40, 5, 4, 64, 2, 16)
    descales = torch.tensor([[1.0, 1.0], [0.015, 0.03]]), torch.tensor([[1.0, 1.0], [0.01, 0.02]])
    cache = make_cache(*sizes, dtype=E4M3, k_descale=descales[0], v_descale=descales[1])
    wide = make_cache(*sizes, dtype=torch.float32)
    x = torch.randn(2, 17, 64)
    results = []
    for one in (cache, wide):
        step = one.prepare([one.add_sequence(), one.add_sequence()], 12)
        results.append(mha(x[:, :12], cache=step.layer(1)))
        step.commit()
    for name, descale in zip("kv", descales, strict=True):
        held = getattr(cache, name)[1].float() * descale[1][:, None]
        error = rel_l2(held, getattr(wide, name)[1])
        assert 0.005 < error < 0.04, error  # rounded once; a wrong descale saturates or is above
        getattr(wide, name)[1].copy_(held)
    assert 0.001 < rel_l2(results[0], results[1]) < 0.06
    outs = [mha(x[:, 12:], cache=one.prepare([0, 1], 5).layer(1)) for one in (cache, wide)]
    FP8_CACHE_TOTAL.check("out", rel_l2(*outs))


def test_descales_belong_to_an_e4m3_cache():
    with pytest.raises(ValueError, match="k_descale needs a cache of dtype"):
        DenseKVCache(2, 4, 64, 2, 16, dtype=torch.bfloat16, k_descale=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"v_descale must .*\(num_layers, num_heads_kv\)"):
        PagedKVCache(2, 4, 16, 2, 64, 2, 16, dtype=E4M3, v_descale=torch.ones(2, 1))
    with pytest.raises(TypeError, match="k_descale"):
        PagedKVCache(2, 4, 16, 2, 64, 2, 16, dtype=E4M3, k_descale=torch.ones(2, 2).double())


@torch.no_grad()
def test_pages_are_taken_as_a_sequence_grows_and_come_back():
    mha = make_mha(causal=True, num_heads_kv=2)
    cache = paged_cache(num_pages=6, page_size=4, max_seqlen=16)
    first, second = cache.add_sequence(), cache.add_sequence()
    pages_needed = []
    for _ in range(9):
        step = cache.prepare([first], 1)
        mha(torch.randn(1, 1, 64), cache=step.layer(0))
        step.commit()
        pages_needed.append(cache.allocator.num_used)
    assert pages_needed == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    cache.prepare([second], 12).commit()
    assert cache.allocator.num_free == 0
    with pytest.raises(OutOfPagesError, match="1 pages wanted, 0 of 6"):
        cache.prepare([second], 1)
    assert cache.length(second) == 12
    held = cache.pages_of(first)
    assert not set(held) & set(cache.pages_of(second))
    cache.remove_sequence(first)
    assert cache.allocator.num_free == 3
    third = cache.add_sequence()
    cache.prepare([third], 12).commit()
    assert set(cache.pages_of(third)) == set(held)


@torch.no_grad()
def test_used_pages_are_overwritten_not_read():
    """A page that comes back from another sequence, full of NaN, does no harm."""
    mha = make_mha(causal=True, num_heads_kv=2)
    cache = paged_cache(num_pages=3, page_size=4, max_seqlen=12)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    row = cache.add_sequence()
    x = torch.randn(1, 6, 64)
    out = mha(x, cache=cache.prepare([row], 6).layer(0))
    assert_near(out, mha(x))


def test_allocator_refuses_strangers():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    assert sorted(pages) == sorted(set(pages))
    with pytest.raises(ValueError, match="pages must be in use and distinct"):
        allocator.release([pages[0], pages[0]])
    with pytest.raises(ValueError, match="pages must be in use"):
        allocator.release([3])
    allocator.release(pages)
    assert allocator.num_free == 4
    with pytest.raises(OutOfPagesError, match="5 pages wanted, 4 of 4"):
        allocator.allocate(5)


@pytest.mark.parametrize("make_cache", [dense_cache, paged_cache])
def test_bad_cache_calls(make_cache):
    cache = make_cache(max_seqlen=10)
    row = cache.add_sequence()
    with pytest.raises(ValueError, match="would hold 11 tokens, more than max_seqlen = 10"):
        cache.prepare([row], 11)
    with pytest.raises(ValueError, match="rows must be distinct"):
        cache.prepare([row, row], 1)
    with pytest.raises(ValueError, match="rows must be distinct and at least one"):
        cache.prepare([], 1)
    with pytest.raises(ValueError, match="new_tokens must hold 1 numbers, got 2"):
        cache.prepare([row], [1, 2])
    with pytest.raises(ValueError, match="new_tokens must be an integer"):
        cache.prepare([row], -1)
    with pytest.raises(ValueError, match="row must be one that add_sequence returned, got 3"):
        cache.prepare([3], 1)
    with pytest.raises(ValueError, match="got 2"):
        cache.remove_sequence(2)
    for _ in range(3):
        cache.add_sequence()
    with pytest.raises(RuntimeError, match="all max_batch = 4 rows"):
        cache.add_sequence()

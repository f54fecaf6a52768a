"""tree_mask and split_keys of flash_attn_with_kvcache on CPU tensors."""

import pytest
import torch

import flash8
import oracle
from cases import int32
from tolerances import rel_l2

LENGTHS = (70, 0, 3, 41)


def draw(seqlen_q=5, page_size=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(4, seqlen_q, 4, 32, generator=generator, dtype=dtype)
    shape, given = (4, 90), {"cache_seqlens": int32(LENGTHS)}
    if page_size is not None:
        columns = -(-90 // page_size)
        shape = (4 * columns, page_size)
        table = torch.randperm(4 * columns, generator=generator).view(4, columns)
        given["page_table"] = table.int()
    k, v = (torch.randn(*shape, 2, 32, generator=generator, dtype=dtype) for _ in "kv")
    return q, k, v, given


def words(*shape):
    generator = torch.Generator().manual_seed(3)
    own = 1 << torch.arange(shape[-1])
    return (torch.randint(0, 2**32, shape, generator=generator) | own).to(torch.uint32)


def mask_of(word_rows, **masks):
    """What the oracle calls for a mask of one sequence, by the words of its queries."""

    def visible(rows, keys, causal, window, chunk):
        seen = oracle.visible(rows, keys, causal, window, chunk)
        for i in range(rows):
            for n in range(rows):
                if keys - rows + n >= 0 and not int(word_rows[i]) >> n & 1:
                    seen[i, keys - rows + n] = False
        return seen

    return visible


def expected(q, k, v, given, tree, **options):
    results = []
    for b in range(4):
        where = {"seqused_k": given["cache_seqlens"][b : b + 1]}
        if "page_table" in given:
            cache, where["page_table"] = (k, v), given["page_table"][b : b + 1]
        else:
            cache = (k[b : b + 1], v[b : b + 1])
        results.append(
            oracle.attention(q[b : b + 1], *cache, mask_fn=mask_of(tree[b]), **where, **options)
        )
    return (torch.cat(x) for x in zip(*results, strict=True))


OPTIONS = [{}, {"causal": True}, {"window_size": (20, 1)}, {"attention_chunk": 16}]


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_the_oracle(page_size, options):
    q, k, v, given = draw(page_size=page_size)
    tree = words(4, 5)
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        q, k, v, tree_mask=tree, return_softmax_lse=True, **given, **options
    )
    exact, exact_lse = expected(q, k, v, given, tree, **options)
    torch.testing.assert_close(out, exact, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, exact_lse, atol=1e-12, rtol=1e-12)
    plain = flash8.flash_attn_with_kvcache(q, k, v, **given, **options)
    assert rel_l2(plain, exact) > 1e-3


def test_packed_queries_int32_words_and_all_bits():
    q, k, v, given = draw()
    tree = words(4, 5)
    want = flash8.flash_attn_with_kvcache(q, k, v, tree_mask=tree, **given)
    offsets = {"cu_seqlens_q": int32([0, 5, 10, 15, 20]), "max_seqlen_q": 5}
    packed = {"tree_mask": tree.view(torch.int32).reshape(20), **offsets}
    found = flash8.flash_attn_with_kvcache(q.reshape(20, 4, 32), k, v, **packed, **given)
    assert torch.equal(found.reshape(want.shape), want)
    every = torch.full((4, 5), -1, dtype=torch.int32)
    found = flash8.flash_attn_with_kvcache(q, k, v, tree_mask=every, **given)
    torch.testing.assert_close(found, flash8.flash_attn_with_kvcache(q, k, v, **given))


def test_new_keys_and_32_queries():
    """The drafts are appended by the same call, and use all bits."""
    q, k, v, given = draw(32)
    new = [x[:, -32:].clone() for x in (k, v)]
    given["cache_seqlens"] = int32([58, 0, 3, 41])
    tree = words(4, 32)
    copies = [x.clone() for x in (k, v)]
    out = flash8.flash_attn_with_kvcache(q, *copies, *new, tree_mask=tree, **given)
    given["cache_seqlens"] = given["cache_seqlens"] + 32
    exact, _ = expected(q, *copies, given, tree)
    torch.testing.assert_close(out, exact, atol=1e-12, rtol=1e-12)


def test_gradients():
    q, k, v, given = draw()
    tree = words(4, 5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    flash8.flash_attn_with_kvcache(*leaves, tree_mask=tree, **given).sin().sum().backward()
    others = [x.clone().requires_grad_() for x in (q, k, v)]
    next(expected(*others, given, tree)).sin().sum().backward()
    for x, y in zip(leaves, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-11, rtol=1e-11)


REFUSED = {
    "shape": ({"tree_mask": words(4, 4)}, ValueError, r"tree_mask must have shape.*\(4, 4\)"),
    "dtype": ({"tree_mask": torch.ones(4, 5)}, TypeError, "tree_mask .*int32.*float32"),
    "split_keys": ({"split_keys": 100}, ValueError, "split_keys must be a multiple of 64, got 100"),
    "negative": ({"split_keys": -64}, ValueError, "split_keys .*-64"),
    "type": ({"split_keys": 64.0}, TypeError, "split_keys"),
    "max_seqlen_q": ({"tree_mask": words(4, 5), "max_seqlen_q": "3"}, TypeError, "max_seqlen_q"),
    "splits": ({"split_keys": 64, "num_splits": 2}, ValueError, "split_keys cannot be combined"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    more, error, words_of_it = REFUSED[name]
    q, k, v, given = draw()
    with pytest.raises(error, match=words_of_it):
        flash8.flash_attn_with_kvcache(q, k, v, **given, **more)


def test_a_word_has_32_bits():
    q, k, v, given = draw(33)
    with pytest.raises(ValueError, match=r"tree_mask is for up to 32 queries .* q with 33"):
        flash8.flash_attn_with_kvcache(q, k, v, tree_mask=words(4, 33), **given)


@pytest.mark.parametrize("dense", [True, False])
def test_bits_of_a_sequence_are_its_own(dense):
    q, k, v, given = draw(dtype=torch.float32)
    given = {} if dense else given
    out = flash8.flash_attn_with_kvcache(q, k, v, split_keys=64, **given)
    for b in range(4):
        own = {name: x[b : b + 1] for name, x in given.items()}
        row = slice(b, b + 1)
        alone = flash8.flash_attn_with_kvcache(q[row], k[row], v[row], split_keys=64, **own)
        assert torch.equal(alone[0], out[b])

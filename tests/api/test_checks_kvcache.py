"""Bad input to the KV-cache functions; the cache must be as before after every refusal."""

import pytest
import torch

import flash8
from argument_cases import cache, grad, ones, pages, refuses
from cases import int32

FP8 = torch.float8_e4m3fn


def test_the_calls_below_are_valid_when_unchanged():
    cache()
    pages()


no_rotary = dict(rotary_cos=None, rotary_sin=None)
no_new = dict(k=None, v=None)
BAD = [
    (cache, dict(k=None), ValueError, "k", "v", "together", "None"),
    (cache, dict(v=None), ValueError, "k", "v", "together", "None"),
    (cache, dict(cache_seqlens=None), ValueError, "cache_seqlens", "None"),
    (
        cache,
        dict(cache_seqlens=torch.tensor([5, 17], dtype=torch.int16)),
        TypeError,
        "cache_seqlens",
        "int32",
        "int16",
    ),
    (cache, dict(cache_seqlens=torch.tensor([5, 2**32])), ValueError, "cache_seqlens", "0 to 20"),
    (
        cache,
        dict(cache_seqlens=torch.tensor([-(2**32), 5])),
        ValueError,
        "cache_seqlens",
        "0 to 20",
    ),
    (
        pages,
        dict(page_table=torch.tensor([[0, 2**32 + 1, 1, 3], [4, 5, 6, 7]])),
        ValueError,
        "page_table",
        "[0, 1]",
    ),
    (cache, dict(cache_seqlens=int32([5])), ValueError, "cache_seqlens", "(2,)", "(1,)"),
    (cache, dict(cache_seqlens=-1), ValueError, "cache_seqlens", "0", "-1"),
    (cache, dict(cache_seqlens=1.5), TypeError, "cache_seqlens", "integer", "1.5"),
    (cache, dict(cache_seqlens=int32([5, 18])), ValueError, "cache_seqlens", "20", "index 1"),
    (
        cache,
        dict(cache_seqlens=int32([-5, 3]), **no_rotary),
        ValueError,
        "cache_seqlens",
        "index 0",
    ),
    (cache, dict(k_cache=ones(2, 20, 2, 32).half()), TypeError, "k_cache", "float32", "float16"),
    (cache, dict(k_cache=ones(20, 2, 32)), ValueError, "k_cache", "(20, 2, 32)"),
    (cache, dict(v_cache=ones(2, 19, 2, 8)), ValueError, "v_cache", "(2, 19, 2, 8)"),
    (
        cache,
        dict(k_cache=ones(3, 20, 2, 32), v_cache=ones(3, 20, 2, 8)),
        ValueError,
        "k_cache",
        "3",
    ),
    (cache, dict(k=ones(2, 3, 2, 32).half()), TypeError, "k", "float32", "float16"),
    (cache, dict(k=ones(2, 3, 1, 32)), ValueError, "k", "(2, 3, 2, 32)", "(2, 3, 1, 32)"),
    (cache, dict(v=ones(2, 3, 2, 9)), ValueError, "v", "(2, 3, 2, 8)", "(2, 3, 2, 9)"),
    (cache, dict(v=ones(2, 4, 2, 8)), ValueError, "v", "(2, 3, 2, 32)", "(2, 4, 2, 8)"),
    (cache, dict(k=ones(6, 2, 32)), ValueError, "k", "seqlen_new", "(6, 2, 32)"),
    (cache, dict(q=grad(2, 3, 4, 32)), ValueError, "no_grad", "appends"),
    (cache, dict(k=grad(2, 3, 2, 32)), ValueError, "no_grad", "appends"),
    (
        cache,
        dict(k_cache=ones(1, 20, 2, 32).expand(2, 20, 2, 32)),
        ValueError,
        "k_cache",
        "expanded",
    ),
    (cache, dict(v_cache=ones(2, 20, 8, 2).mT), ValueError, "v_cache", "contiguous", "strides"),
    # rotary
    (cache, dict(rotary_cos=None), ValueError, "rotary_cos", "rotary_sin", "None"),
    (cache, dict(rotary_sin=None), ValueError, "rotary_cos", "rotary_sin", "None"),
    (cache, dict(rotary_sin=ones(23, 8)), ValueError, "rotary_sin", "(24, 8)", "(23, 8)"),
    (
        cache,
        dict(rotary_cos=ones(24, 7), rotary_sin=ones(24, 7)),
        ValueError,
        "rotary_cos",
        "16",
        "(24, 7)",
    ),
    (
        cache,
        dict(rotary_cos=ones(24, 24), rotary_sin=ones(24, 24)),
        ValueError,
        "rotary_cos",
        "32",
        "(24, 24)",
    ),
    (
        cache,
        dict(rotary_cos=ones(19, 8), rotary_sin=ones(19, 8)),
        ValueError,
        "rotary_cos",
        "19",
    ),
    (cache, dict(rotary_cos=ones(24, 8).int()), TypeError, "rotary_cos", "float32", "int32"),
    (cache, no_new, ValueError, "rotary_cos", "k", "v", "None"),
    (cache, dict(rotary_seqlens=int32([1])), ValueError, "rotary_seqlens", "(2,)", "(1,)"),
    (cache, dict(rotary_seqlens=int32([1, -2])), ValueError, "rotary_cos", "-2"),
    (cache, dict(rotary_interleaved=1), TypeError, "rotary_interleaved", "bool", "1"),
    # index tensors
    (cache, dict(cache_batch_idx=int32([0, 2])), ValueError, "cache_batch_idx", "0 to 1", "2"),
    (cache, dict(cache_batch_idx=int32([0])), ValueError, "cache_batch_idx", "(2,)", "(1,)"),
    (
        cache,
        dict(cache_batch_idx=torch.tensor([0, 1], dtype=torch.int16)),
        TypeError,
        "cache_batch_idx",
        "int32",
        "int16",
    ),
    (
        cache,
        dict(cache_batch_idx=torch.tensor([0, 2**32])),
        ValueError,
        "cache_batch_idx",
        "0 to 1",
    ),
    (cache, dict(cache_batch_idx=int32([0, -2])), ValueError, "cache_batch_idx", "0 to 1", "-2"),
    # two appends to one place
    (cache, dict(cache_batch_idx=int32([1, 1]), cache_seqlens=5), ValueError, "cache_batch_idx"),
    (
        pages,
        dict(page_table=int32([[0, 8, 1, 3], [4, 8, 6, 3]]), cache_seqlens=13),
        ValueError,
        "page_table",
        "sequences 0 and 1",
    ),
    (
        pages,
        dict(
            page_table=int32([[0, 8, 1, 3], [4, 5, 6, 6]]),
            cache_seqlens=int32([5, 7]),
            k=ones(2, 6, 2, 32),
            v=ones(2, 6, 2, 8),
        ),
        ValueError,
        "page_table",
        "twice",
    ),
    (cache, dict(cache_leftpad=int32([0, 21])), ValueError, "cache_leftpad", "17", "21"),
    (cache, dict(cache_leftpad=int32([0, -1])), ValueError, "cache_leftpad", "0", "-1"),
    (
        pages,
        dict(page_table=int32([[0, 9, 1, 3], [4, 5, 6, 7]])),
        ValueError,
        "page_table",
        "8",
        "9",
    ),
    (pages, dict(cache_seqlens=int32([5, 14])), ValueError, "cache_seqlens", "16", "index 1"),
    (pages, dict(cache_seqlens=None, **no_new), ValueError, "cache_seqlens", "None"),
    (pages, dict(page_table=torch.zeros(2, 4)), TypeError, "page_table", "int32", "float32"),
    # packed queries and new keys
    (
        cache,
        dict(cu_seqlens_q=int32([0, 1, 3])),
        ValueError,
        "max_seqlen_q",
        "cu_seqlens_q",
        "None",
    ),
    (
        cache,
        dict(cu_seqlens_q=int32([0, 4, 3]), max_seqlen_q=3, q=ones(3, 4, 32), **no_rotary),
        ValueError,
        "cu_seqlens_q",
        "decrease",
        "4",
        "3",
    ),
    (cache, dict(cu_seqlens_k_new=int32([0, 1, 3])), ValueError, "k", "total_new", "(2, 3, 2, 32)"),
    (
        cache,
        dict(cu_seqlens_k_new=int32([0, 5, 7]), k=ones(6, 2, 32), v=ones(6, 2, 8), **no_rotary),
        ValueError,
        "cu_seqlens_k_new",
        "6",
        "7",
    ),
    (
        cache,
        dict(cu_seqlens_k_new=int32([0, 3]), **no_new, **no_rotary),
        ValueError,
        "cu_seqlens_k_new",
    ),
    # the rest
    (cache, dict(return_softmax_lse=1), TypeError, "return_softmax_lse", "bool", "1"),
    (cache, dict(num_splits=-1), ValueError, "num_splits", "-1"),
    (cache, dict(out=ones(2, 3, 4, 9)), ValueError, "out", "(2, 3, 4, 8)", "(2, 3, 4, 9)"),
    (cache, dict(scheduler_metadata=ones(5)), TypeError, "scheduler_metadata", "int32", "float32"),
    (cache, dict(scheduler_metadata=int32([1, 2])), ValueError, "scheduler_metadata", "(2,)"),
]


def name_of(row):
    return f"{row[0].__name__} {' '.join(row[1])}"


@pytest.mark.parametrize("row", BAD, ids=name_of)
def test_bad_argument(row):
    refuses(*row)


@pytest.mark.parametrize(
    "new,old",
    [("v", "v_cache"), ("k", "k_cache"), ("k", "v_cache"), ("v", "k_cache"), ("q", "k_cache")],
)
def test_what_overlaps_a_cache_is_refused(new, old):
    """Before K is appended: V would be read out of what K has written."""
    wide = torch.randn(2, 20, 4, 32)
    arguments = {old: wide[:, :, :2], new: wide[:, 1:4] if new == "q" else wide[:, 1:4, 1:3]}
    same = dict(v_cache=torch.randn(2, 20, 2, 32), v=torch.randn(2, 3, 2, 32))
    refuses(cache, {**same, **no_rotary, **arguments}, ValueError, new, old, "share memory")


@pytest.mark.parametrize("shift", [0, 1, 32, 64 * 19])
def test_caches_that_overlap_are_refused(shift):
    buffer = torch.randn(2 * 20 * 64 + 2000)
    k_cache, v_cache = (buffer[n : n + 2 * 1280].view(2, 20, 2, 32) for n in (0, shift))
    changes = dict(k_cache=k_cache, v_cache=v_cache)
    v = dict(v=torch.randn(2, 3, 2, 32))
    refuses(cache, {**v, **changes}, ValueError, "v_cache", "k_cache", "share memory")


@pytest.mark.parametrize("split", ["channels", "heads", "rows", "halves"])
def test_caches_of_one_buffer_may_lie_side_by_side(split):
    dimension, shape = {
        "channels": (3, (2, 20, 2, 64)),
        "heads": (2, (2, 20, 4, 32)),
        "rows": (1, (2, 40, 2, 32)),
        "halves": (0, (4, 20, 2, 32)),
    }[split]
    k_cache, v_cache = torch.randn(shape).chunk(2, dim=dimension)
    both = [x.clone() for x in (k_cache, v_cache)]
    new = torch.randn(2, 3, 2, 64).chunk(2, dim=3)  # k and v of one tensor, which is none of both
    arguments = dict(q=torch.randn(2, 3, 4, 32), k=new[0], v=new[1], **no_rotary)
    expected = cache(**arguments, k_cache=both[0], v_cache=both[1])
    assert torch.equal(cache(**arguments, k_cache=k_cache, v_cache=v_cache), expected)
    assert torch.equal(k_cache, both[0]) and torch.equal(v_cache, both[1])


SIZES = dict(
    batch_size=2,
    max_seqlen_q=3,
    max_seqlen_k=20,
    num_heads_q=4,
    num_heads_kv=2,
    headdim=32,
    cache_seqlens=int32([5, 17]),
    qkv_dtype=torch.float32,
    headdim_v=8,
)


@pytest.mark.parametrize(
    "changes", [dict(batch_size=1, cache_seqlens=int32([5])), dict(causal=True), dict(headdim=64)]
)
def test_metadata_of_another_call_is_refused(changes):
    metadata = flash8.get_scheduler_metadata(**{**SIZES, **changes})
    refuses(cache, dict(scheduler_metadata=metadata), ValueError, "scheduler_metadata", "made for")
    cache(scheduler_metadata=flash8.get_scheduler_metadata(**SIZES))


@pytest.mark.parametrize(
    "changes,error,texts",
    [
        (dict(cache_seqlens=[5, 17]), TypeError, ("cache_seqlens", "[5, 17]")),
        (dict(cache_seqlens=int32([5])), ValueError, ("cache_seqlens", "(2,)", "(1,)")),
        (dict(qkv_dtype=torch.int8), TypeError, ("qkv_dtype", "int8", "bfloat16")),
        (dict(num_heads_q=3), ValueError, ("num_heads_q", "2", "3")),
        (dict(headdim=0), ValueError, ("headdim", "1 to 512", "0")),
        (dict(headdim_v=513), ValueError, ("headdim_v", "512", "513")),
        (dict(page_size=0), ValueError, ("page_size", "1", "0")),
        (dict(max_seqlen_q=-1), ValueError, ("max_seqlen_q", "0", "-1")),
        (dict(num_splits=1000), ValueError, ("num_splits", "256", "1000")),
        (dict(window_size=(-5, 0)), ValueError, ("window_size[0]", "-5")),
        (dict(has_softcap=1), TypeError, ("has_softcap", "bool", "1")),
    ],
)
def test_get_scheduler_metadata(changes, error, texts):
    refuses(flash8.get_scheduler_metadata, {**SIZES, **changes}, error, *texts)


@pytest.mark.parametrize(
    "changes,error,texts",
    [
        (dict(out_partial=ones(3, 2, 5, 4, 8).half()), TypeError, ("out_partial", "float16")),
        (dict(out_partial=ones(3, 2, 8)), ValueError, ("out_partial", "splits", "(3, 2, 8)")),
        (dict(lse_partial=ones(3, 2, 4, 5)), ValueError, ("lse_partial", "(3, 2, 5, 4)")),
        (dict(lse_partial=ones(3, 2, 5, 4).double()), TypeError, ("lse_partial", "float64")),
        (dict(out_dtype=torch.int8), TypeError, ("out_dtype", "int8", "bfloat16")),
        (dict(out_dtype="float32"), TypeError, ("out_dtype", "float32")),
        (dict(out=ones(2, 5, 4, 9)), ValueError, ("out", "(2, 5, 4, 8)", "(2, 5, 4, 9)")),
        (dict(out=ones(2, 5, 4, 8), out_dtype=torch.float16), TypeError, ("out", "float16")),
        (dict(out=ones(2, 5, 4, 8), lse_partial=grad(3, 2, 5, 4)), ValueError, ("out", "grad")),
        (
            dict(out_partial=ones(257, 1, 1, 1, 1), lse_partial=ones(257, 1, 1, 1)),
            ValueError,
            ("out_partial", "1 to 256", "257"),
        ),
        (
            dict(out_partial=ones(0, 2, 5, 4, 8), lse_partial=ones(0, 2, 5, 4)),
            ValueError,
            ("out_partial", "1 to 256", "0"),
        ),
    ],
)
def test_combine(changes, error, texts):
    valid = dict(out_partial=ones(3, 2, 5, 4, 8), lse_partial=ones(3, 2, 5, 4))
    refuses(flash8.flash_attn_combine, {**valid, **changes}, error, *texts)

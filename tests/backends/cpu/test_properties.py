"""Shapes and options that nobody thought of: hypothesis draws the case, the oracle answers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, build, check_backward, check_forward

EDGES = [0, 1, 2, 3, 5, 7, 8, 13, 31, 63, 64, 65, 97, 127, 128, 129, 131, 191, 255, 256, 257, 263]
LENGTH = st.sampled_from(EDGES)
LONG = st.sampled_from([1, 100, 511, 513, 700, 1031])
SHORT = st.sampled_from([n for n in EDGES if n <= 131])
HEADS = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (6, 2)])
HEAD_DIM = st.sampled_from([1, 2, 7, 8, 16, 24, 33])
BOUND = st.one_of(st.just(-1), st.integers(0, 40), st.sampled_from([64, 127, 128, 300]))
DTYPE = st.sampled_from(
    [torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16]
)


@st.composite
def cases(draw, length=LENGTH, max_batch=3, dropout=(0.0, 0.0, 0.25)) -> Case:
    layout = draw(st.sampled_from(["dense", "packed", "packed", "paged"]))
    batch = draw(st.integers(1, max_batch))
    seqlens_q = tuple(draw(length) for _ in range(batch))
    seqlens_k = tuple(draw(length) for _ in range(batch))
    if layout == "dense":
        seqlens_q, seqlens_k = seqlens_q[:1] * batch, seqlens_k[:1] * batch

    def unused(lengths):
        return tuple(draw(st.integers(0, n)) for n in lengths) if draw(st.booleans()) else None

    heads, heads_kv = draw(HEADS)
    return Case(
        seqlens_q,
        seqlens_k,
        unused_q=unused(seqlens_q),
        unused_k=unused(seqlens_k),
        layout=layout,
        page_size=draw(st.sampled_from([1, 3, 16, 64, 100])),
        tail=draw(st.sampled_from([0, 0, 3])) if layout == "packed" else 0,
        heads=heads,
        heads_kv=heads_kv,
        head_dim=draw(HEAD_DIM),
        head_dim_v=draw(HEAD_DIM),
        dtype=draw(DTYPE),
        causal=draw(st.booleans()),
        window_size=(draw(BOUND), draw(BOUND)) if draw(st.booleans()) else (-1, -1),
        attention_chunk=draw(st.sampled_from([0, 0, 0, 1, 5, 64, 200])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        softmax_scale=draw(st.sampled_from([None, None, 0.31])),
        alibi=draw(st.sampled_from([None, None, "h", "bh"])),
        sink=draw(st.booleans()),
        qv=draw(st.sampled_from([False, False, True])),
        dropout_p=draw(st.sampled_from(dropout)),
        num_splits=draw(st.sampled_from([1, 1, 1, 2, 5])),
        poison=True,
    )


@settings(max_examples=600)
@given(case=cases(), seed=st.integers(0, 2**20))
def test_forward(case, seed):
    check_forward(build(case, seed))


@settings(max_examples=40)
@given(case=cases(length=LONG, max_batch=1, dropout=(0.0,)), seed=st.integers(0, 2**20))
def test_forward_over_many_tiles(case, seed):
    check_forward(build(case, seed))


@settings(max_examples=250)
@given(case=cases(length=SHORT), seed=st.integers(0, 2**20))
def test_backward(case, seed):
    check_backward(build(case.with_(num_splits=1), seed))


@settings(max_examples=60)
@given(case=cases(length=SHORT), seed=st.integers(0, 2**20))
def test_splits_and_gradients_together(case, seed):
    check_backward(build(case.with_(num_splits=3, dtype=torch.float64), seed))

"""FlashAttention-2's functions: signatures, and that each argument arrives where it belongs."""

import inspect

import pytest
import torch

import flash8
from flash8.compat import flash_attn
from flash8.compat.flash_attn import flash_attn_interface

OPTIONS = dict(
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
)


def signature(required, **defaults):
    """(name, default) of each argument, in order."""
    return [*((name, inspect.Parameter.empty) for name in required.split()), *defaults.items()]


LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
OF_FORWARD = "dropout_p softmax_scale causal window_size_left window_size_right softcap"
OF_BACKWARD = f"{OF_FORWARD} alibi_slopes deterministic"
TENSORS = "dout q k v out softmax_lse dq dk dv"
SIGNATURES = {
    "flash_attn_func": signature("q k v", **OPTIONS),
    "flash_attn_qkvpacked_func": signature("qkv", **OPTIONS),
    "flash_attn_kvpacked_func": signature("q kv", **OPTIONS),
    "flash_attn_varlen_func": signature(f"q k v {LENGTHS}", **OPTIONS, block_table=None),
    "flash_attn_varlen_qkvpacked_func": signature("qkv cu_seqlens max_seqlen", **OPTIONS),
    "flash_attn_varlen_kvpacked_func": signature(f"q kv {LENGTHS}", **OPTIONS),
    "flash_attn_with_kvcache": signature(
        "q k_cache v_cache",
        k=None,
        v=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        block_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        alibi_slopes=None,
        num_splits=0,
        return_softmax_lse=False,
    ),
    "_flash_attn_forward": signature(f"q k v {OF_FORWARD} alibi_slopes return_softmax"),
    "_flash_attn_varlen_forward": signature(
        f"q k v {LENGTHS} dropout_p softmax_scale causal",
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
        num_splits=0,
    ),
    "_flash_attn_backward": signature(f"{TENSORS} {OF_BACKWARD}", rng_state=None),
    "_flash_attn_varlen_backward": signature(
        f"{TENSORS} {LENGTHS} {OF_BACKWARD}", rng_state=None, zero_tensors=False
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attention_2(name):
    function = getattr(flash_attn_interface, name)
    assert inspect.isfunction(function)  # frameworks ask, and read the signature
    parameters = inspect.signature(function).parameters.values()
    assert [(p.name, p.default) for p in parameters] == SIGNATURES[name]


BATCH, HEADS, HEADS_KV, DIM, LONGEST = 2, 4, 2, 16, 24
CU_SEQLENS = torch.tensor([0, 9, 33], dtype=torch.int32)
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
#: FlashAttention-2's order, every argument another than its default.
POSITIONAL = (0.3, 0.7, True, (5, 0), 2.0, SLOPES, True)
BY_NAME = dict(
    softmax_scale=0.7,
    causal=True,
    window_size=(5, 0),
    softcap=2.0,
    alibi_slopes=SLOPES,
    deterministic=True,
)


def dense(heads_kv=HEADS_KV):
    shapes = [(BATCH, 17, HEADS, DIM)] + [(BATCH, LONGEST, heads_kv, DIM)] * 2
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def packed(heads_kv=HEADS_KV):
    shapes = [(33, HEADS, DIM)] + [(33, heads_kv, DIM)] * 2
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def with_gradients(function, tensors, *arguments, **options):
    torch.manual_seed(5)  # of the dropout
    out, lse, *_ = function(*tensors, *arguments, **options)
    return (out, lse, *torch.autograd.grad(out, tensors, torch.ones_like(out).cumsum(-1)))


def in_one(tensors, first):
    """The tensors with those from `first` on in one, all of them leaves."""
    parts = [x.detach() for x in tensors[first:]]
    return [*tensors[:first], torch.stack(parts, -3).requires_grad_()]


def alike(tensors):
    """Three of the shape of k, for q, k and v in one."""
    return [torch.randn_like(tensors[1]) for _ in range(3)]


LONGESTS = (CU_SEQLENS, CU_SEQLENS, LONGEST, LONGEST)
FUNCTIONS = {
    "flash_attn_func": (dense, ()),
    "flash_attn_varlen_func": (packed, LONGESTS),
    "flash_attn_kvpacked_func": (lambda: in_one(dense(), 1), ()),
    "flash_attn_varlen_kvpacked_func": (lambda: in_one(packed(), 1), LONGESTS),
    "flash_attn_qkvpacked_func": (lambda: in_one(alike(dense(HEADS)), 0), ()),
    "flash_attn_varlen_qkvpacked_func": (
        lambda: in_one(alike(packed(HEADS)), 0),
        (CU_SEQLENS, LONGEST),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_arrives(name):
    make, lengths = FUNCTIONS[name]
    torch.manual_seed(0)
    tensors = make()
    theirs = with_gradients(getattr(flash_attn, name), tensors, *lengths, *POSITIONAL, True)
    ours = with_gradients(
        getattr(flash8, name),
        tensors,
        *lengths,
        **BY_NAME,
        dropout_p=0.3,
        return_attn_probs=True,
    )
    for got, want in zip(theirs, ours, strict=True):
        assert torch.equal(got, want)


def test_without_probabilities_only_the_output_is_returned():
    q, k, v = dense()
    out = flash_attn.flash_attn_func(q, k, v)
    out_, lse, probabilities = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(out, out_) and lse.shape == (BATCH, HEADS, 17)
    assert probabilities.numel() == 0


def test_bounds_and_caps_that_turn_something_off():
    q, k, v = dense()
    want = flash8.flash_attn_func(q, k, v, window_size=(3, -1))
    for window_size in ((3, -7), [3, -1], torch.tensor([3, -1])):
        out = flash_attn.flash_attn_func(q, k, v, window_size=window_size, softcap=-1.0)
        assert torch.equal(out, want)


def from_probabilities(probabilities, v, dropout_p):
    """O of a dense call out of S_dmask."""
    signed = probabilities[:, :, :17, :LONGEST]
    weights = signed.abs() / signed.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    kept = torch.where(signed < 0, 0.0, weights) / (1 - dropout_p)
    v = v.repeat_interleave(HEADS // HEADS_KV, dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", kept, v)


@pytest.mark.parametrize("causal", [False, True])
def test_probabilities_give_the_output(causal):
    q, k, v = dense()
    options = dict(causal=causal, window_size=(6, 2), alibi_slopes=SLOPES)
    out, _, signed = flash_attn.flash_attn_func(q, k, v, 0.25, return_attn_probs=True, **options)
    assert signed.shape == (BATCH, HEADS, 128, 128)
    torch.testing.assert_close(from_probabilities(signed, v, 0.25), out, rtol=1e-5, atol=1e-6)
    dropped = (signed < 0).sum() / (signed != 0).sum()
    assert 0.15 < dropped < 0.35
    largest = signed.abs().amax(-1)[:, :, :17]
    assert ((largest == 0) | (largest == 1)).all()


def test_probabilities_of_packed_sequences_are_padded():
    q, k, v = packed()
    out, _, signed = flash_attn.flash_attn_varlen_func(
        q, k, v, *LONGESTS, 0.25, causal=True, return_attn_probs=True
    )
    for row, (first, last) in enumerate([(0, 9), (9, 33)]):
        n = last - first
        part = signed[row, :, :n, :n]
        weights = part.abs() / part.abs().sum(-1, keepdim=True)
        kept = torch.where(part < 0, 0.0, weights) / 0.75
        values = v[first:last].repeat_interleave(HEADS // HEADS_KV, dim=1)
        want = torch.einsum("hqk,khd->qhd", kept, values)
        torch.testing.assert_close(out[first:last], want, rtol=1e-5, atol=1e-6)
        assert (signed[row, :, n:] == 0).all() and (signed[row, :, :, n:] == 0).all()


def test_wide_probabilities_come_in_parts():
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 700, 1, 8), torch.randn(1, 700, 1, 8)
    out, _, signed = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    part = signed[:, :, :2, :700]
    kept = torch.where(part < 0, 0.0, part.abs() / part.abs().sum(-1, keepdim=True)) * 2
    torch.testing.assert_close(
        kept.transpose(1, 2) @ v.transpose(1, 2)[:, 0, None], out, rtol=1e-5, atol=1e-6
    )


def paged(k, v):
    """Pages of 8 tokens of packed k and v, out of order, and the table."""
    lengths = CU_SEQLENS.diff().tolist()
    table = torch.tensor([[3, 1, 0], [4, 0, 2]], dtype=torch.int32)
    pages = [torch.zeros(5, 8, *k.shape[1:]) for _ in range(2)]
    for row, length in enumerate(lengths):
        first = int(CU_SEQLENS[row])
        for token in range(length):
            page = table[row, token // 8]
            for cache, x in zip(pages, (k, v), strict=True):
                cache[page, token % 8] = x[first + token]
    return *pages, table


def test_block_table_has_lengths_in_cu_seqlens_k():
    q, k, v = (x.detach() for x in packed())
    k_pages, v_pages, table = paged(k, v)
    options = dict(causal=True, return_attn_probs=True)
    want = flash_attn.flash_attn_varlen_func(q, k, v, *LONGESTS, **options)
    got = flash_attn.flash_attn_varlen_func(
        q, k_pages, v_pages, *LONGESTS, block_table=table, **options
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="block_table"):
        flash_attn.flash_attn_varlen_func(
            q, k_pages, v_pages, *LONGESTS, 0.1, block_table=table, return_attn_probs=True
        )


def test_kvcache_by_position():
    q, k, v = (torch.randn(2, 3, heads, DIM) for heads in (HEADS, HEADS_KV, HEADS_KV))
    caches = [torch.randn(4, 32, HEADS_KV, DIM) for _ in range(2)]
    theirs, ours = ([x.clone() for x in caches] for _ in range(2))
    angles = torch.rand(32, DIM // 2)
    used, rows = torch.tensor([4, 20], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    leftpad = torch.tensor([1, 0], dtype=torch.int32)
    rotary = angles.cos(), angles.sin()
    got = flash_attn.flash_attn_with_kvcache(
        q, *theirs, k, v, *rotary, used, rows, leftpad, None, 0.4, True, (9, 0), 3.0, False,
        SLOPES, 1, True,
    )  # fmt: skip
    want = flash8.flash_attn_with_kvcache(
        q,
        *ours,
        k,
        v,
        rotary_cos=rotary[0],
        rotary_sin=rotary[1],
        cache_seqlens=used,
        cache_batch_idx=rows,
        cache_leftpad=leftpad,
        softmax_scale=0.4,
        causal=True,
        window_size=(9, 0),
        softcap=3.0,
        rotary_interleaved=False,
        alibi_slopes=SLOPES,
        num_splits=1,
        return_softmax_lse=True,
    )
    assert len(got) == 2
    for ours_, theirs_ in zip([*got, *theirs], [*want[:2], *ours], strict=True):
        assert torch.equal(ours_, theirs_)


def test_a_longest_length_may_be_a_tensor():
    q, k, v = packed()
    longest = torch.tensor(LONGEST)
    out = flash_attn.flash_attn_varlen_func(q, k, v, CU_SEQLENS, CU_SEQLENS, longest, longest)
    assert torch.equal(out, flash_attn.flash_attn_varlen_func(q, k, v, *LONGESTS))


def test_functions_compile_in_one_graph():
    q, k, v = dense()
    compiled = torch.compile(flash_attn.flash_attn_func, backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v, 0.0, causal=True)
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v, 0.0, causal=True))

"""bert_padding, layers.rotary: against plain loops over tokens."""

import pytest
import torch

from flash8.compat.flash_attn import bert_padding
from flash8.compat.flash_attn.layers import rotary

HEADS, DIM, ROTATED, POSITIONS = 2, 12, 8, 20
ANGLES = torch.rand(POSITIONS, ROTATED // 2, generator=torch.Generator().manual_seed(1)) * 6
COS, SIN = ANGLES.cos(), ANGLES.sin()
CU_SEQLENS = torch.tensor([0, 4, 10], dtype=torch.int32)


def by_hand(token, position, interleaved):
    """(heads, head_dim) of one token, rotated as complex numbers."""
    channels = token[:, :ROTATED]
    first, second = (
        (channels[:, ::2], channels[:, 1::2]) if interleaved else channels.chunk(2, dim=-1)
    )
    turned = torch.complex(first, second) * torch.polar(torch.ones(ROTATED // 2), ANGLES[position])
    parts = (turned.real, turned.imag)
    rotated = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((rotated, token[:, ROTATED:]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([5, 1])])
def test_rotary_of_a_batch(offsets, interleaved):
    x = torch.randn(2, 7, HEADS, DIM)
    starts = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * 2
    want = torch.stack(
        [
            torch.stack([by_hand(t, start + i, interleaved) for i, t in enumerate(row)])
            for row, start in zip(x, starts, strict=True)
        ]
    )
    out = rotary.apply_rotary_emb(x, COS, SIN, interleaved, False, offsets)
    torch.testing.assert_close(out, want)
    if isinstance(offsets, int):
        rows = slice(offsets, offsets + 7)
        out = rotary.apply_rotary_emb_torch(x, COS[rows], SIN[rows], interleaved)
        torch.testing.assert_close(out, want)
        halves = rotary.rotate_half(x[..., :ROTATED], interleaved)
        cos, sin = (
            table[rows].repeat_interleave(2, -1) if interleaved else table[rows].repeat(1, 2)
            for table in (COS, SIN)
        )
        again = x[..., :ROTATED] * cos[:, None] + halves * sin[:, None]
        torch.testing.assert_close(again, want[..., :ROTATED])


def test_rotary_of_packed_sequences():
    x = torch.randn(10, HEADS, DIM)
    positions = [*range(4), *range(6)]
    want = torch.stack([by_hand(t, p, False) for t, p in zip(x, positions, strict=True)])
    out = rotary.apply_rotary_emb_func(x, COS, SIN, cu_seqlens=CU_SEQLENS, max_seqlen=6)
    torch.testing.assert_close(out, want)


def test_rotary_in_place():
    x = torch.randn(1, 5, HEADS, DIM)
    want = rotary.apply_rotary_emb(x, COS, SIN)
    same = x.clone()
    assert rotary.apply_rotary_emb(same, COS, SIN, inplace=True) is same
    assert torch.equal(same, want)
    leaf, upstream = x.clone().requires_grad_(), torch.randn_like(x)
    (gradient,) = torch.autograd.grad(
        rotary.apply_rotary_emb(leaf, COS, SIN, inplace=True), leaf, upstream
    )
    assert torch.equal(leaf.detach(), x)  # autograd knows of no write
    # The gradient turns back.
    torch.testing.assert_close(gradient, rotary.apply_rotary(upstream, COS, SIN, conjugate=True))


@pytest.mark.parametrize("grouped", [False, True])
def test_rotary_of_packed_heads(grouped):
    torch.manual_seed(0)
    qkv = torch.randn(1, 5, 4, DIM) if grouped else torch.randn(1, 5, 3, HEADS, DIM)
    kept = qkv.clone().requires_grad_()
    options = dict(num_heads_q=2) if grouped else {}
    cos_k, sin_k = COS * 0.5, SIN * 0.5
    out = rotary.apply_rotary_emb_qkv_(kept, COS, SIN, cos_k, sin_k, seqlen_offsets=2, **options)
    q, k, v = (x.clone() for x in (qkv.split((2, 1, 1), 2) if grouped else qkv.unbind(2)))
    want = (
        rotary.apply_rotary_emb(q, COS, SIN, seqlen_offsets=2),
        rotary.apply_rotary_emb(k, cos_k, sin_k, seqlen_offsets=2),
        v,
    )
    want = torch.cat(want, 2) if grouped else torch.stack(want, 2)
    assert torch.equal(out, want) and torch.equal(kept.detach(), qkv)
    assert torch.autograd.grad(out.sum(), kept)[0].shape == qkv.shape
    with torch.no_grad():
        out = rotary.apply_rotary_emb_qkv_(qkv, COS, SIN, cos_k, sin_k, False, 2, **options)
    assert out is qkv and torch.equal(qkv, want)
    if grouped:
        with pytest.raises(ValueError, match="num_heads_q must be given"):
            rotary.apply_rotary_emb_qkv_(qkv, COS, SIN)


def test_rotary_embedding_keeps_its_tables():
    module = rotary.RotaryEmbedding(ROTATED, base=100.0)
    assert module.state_dict() == {}
    kv = torch.randn(1, 5, 2, HEADS, DIM)
    q = torch.randn(1, 5, HEADS, DIM)
    angles = torch.outer(torch.arange(9.0), 100.0 ** -(torch.arange(0, ROTATED, 2) / ROTATED))
    tables = angles.cos(), angles.sin()
    want_q = rotary.apply_rotary_emb(q, *tables, seqlen_offsets=4)
    want_k = rotary.apply_rotary_emb(kv[:, :, 0], *tables, seqlen_offsets=4)
    want_v = kv[:, :, 1].clone()
    out_q, out_kv = module(q, kv, seqlen_offset=4)
    torch.testing.assert_close(out_q, want_q)
    torch.testing.assert_close(out_kv, torch.stack((want_k, want_v), 2))
    assert module._seq_len_cached == 9
    kept = module._cos_cached
    module(q, kv, seqlen_offset=torch.tensor([1]))
    assert module._cos_cached is kept
    fresh = rotary.RotaryEmbedding(ROTATED)
    with pytest.raises(ValueError, match="max_seqlen must be given"):
        fresh(q, kv, seqlen_offset=torch.tensor([1]))
    fresh(q, kv, seqlen_offset=torch.tensor([1]), max_seqlen=9)


def test_xpos_scores_decay_with_distance():
    module = rotary.RotaryEmbedding(ROTATED, scale_base=4.0)
    qkv = torch.ones(1, 6, 3, 1, ROTATED)
    q, k, _ = module(qkv).unbind(2)
    scores = torch.einsum("bqhd,bkhd->qk", q, k)
    plain = rotary.RotaryEmbedding(ROTATED)(torch.ones(1, 6, 3, 1, ROTATED))
    q, k, _ = plain.unbind(2)
    unscaled = torch.einsum("bqhd,bkhd->qk", q, k)
    torch.testing.assert_close(scores.diagonal(), unscaled.diagonal())
    near, far = (scores / unscaled)[1, 0], (scores / unscaled)[2, 0]
    assert 0 < far < near < 1


def test_positions_past_the_tables_are_refused():
    with pytest.raises(ValueError, match="must reach position 20, got 20 rows"):
        rotary.apply_rotary_emb(torch.randn(1, 1, 1, 8), COS, SIN, seqlen_offsets=20)


def test_rows_by_index():
    x = torch.randn(6, 3, requires_grad=True)
    indices = torch.tensor([4, 0])
    picked = bert_padding.index_first_axis(x, indices)
    assert torch.equal(picked, x[indices])
    back = bert_padding.index_put_first_axis(picked, indices, 6)
    assert torch.equal(back[indices], picked) and (back[[1, 2, 3, 5]] == 0).all()
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert gradient[:, 0].tolist() == [1, 0, 0, 0, 1, 0]
    assert torch.equal(bert_padding.index_first_axis_residual(x, indices)[0], picked)


def test_padding_goes_and_comes_back():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    x = torch.randn(2, 3, 4)
    hidden, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(bert_padding.pad_input(hidden, indices, 2, 3), x * mask[..., None])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 2, 4], 2, [2, 2])


def test_rows_of_several_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4)
    hidden, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, lengths
    )
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(hidden, x.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)

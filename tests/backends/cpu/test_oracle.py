"""The oracle itself, against published vectors, torch, and pictures drawn by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle

# Random123's kat_vectors, philox4x32: rounds, counter, key, result.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN_ANSWERS = [
    (7, (0,) * 6, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 6, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("rounds,inputs,expected", KNOWN_ANSWERS)
def test_philox_known_answers(rounds, inputs, expected):
    counter = np.array(inputs[:4], dtype=np.uint64)
    assert tuple(oracle.philox4x32(counter, inputs[4:], rounds).tolist()) == expected


def test_dropout_element_by_element():
    seed, heads, p = 0x123456789ABCDEF0, 3, 0.37
    keep = oracle.dropout_keep(seed, 2, heads, 5, 19, p)
    for head, row, col in [(0, 0, 0), (2, 4, 18), (1, 3, 7), (1, 3, 8), (2, 0, 13)]:
        counter = np.array([col // 8, row, 2 * heads + head, 0], dtype=np.uint64)
        word = int(oracle.philox4x32(counter, (0x9ABCDEF0, 0x12345678), 7)[(col % 8) // 2])
        value = word >> 16 if col % 2 else word & 0xFFFF
        assert bool(keep[head, row, col]) == (value >= round(p * 65536))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [1, 2, 4])
def test_matches_torch_sdpa(causal, heads_kv):
    q = torch.randn(2, 11, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 11, heads_kv, 8, dtype=torch.float64) for _ in range(2))
    out, lse = oracle.attention(q, k, v, causal=causal)
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(4 // heads_kv, 2)) * 8**-0.5
    if causal:
        s = s.masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(lse, s.logsumexp(-1), rtol=1e-12, atol=1e-12)


PICTURES = [
    (dict(seqlen_q=2, seqlen_k=5, causal=True), ["11110", "11111"]),
    (dict(seqlen_q=5, seqlen_k=2, causal=True), ["00", "00", "00", "10", "11"]),
    (dict(seqlen_q=3, seqlen_k=4, window_size=(1, 0)), ["1100", "0110", "0011"]),
    (dict(seqlen_q=3, seqlen_k=3, window_size=(-1, 1)), ["110", "111", "111"]),
    (dict(seqlen_q=3, seqlen_k=3, window_size=(1, -1)), ["111", "111", "011"]),
    (dict(seqlen_q=3, seqlen_k=3, window_size=(1, 2), causal=True), ["100", "110", "011"]),
    (dict(seqlen_q=4, seqlen_k=4, attention_chunk=3), ["1110", "1110", "1110", "0001"]),
    (dict(seqlen_q=3, seqlen_k=2, attention_chunk=2), ["00", "11", "11"]),
]


@pytest.mark.parametrize("arguments,picture", PICTURES)
def test_masks_by_hand(arguments, picture):
    rows = ["".join("01"[int(x)] for x in row) for row in oracle.visible(**arguments)]
    assert rows == picture


def test_alibi_bias_by_hand():
    q = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    k = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    v = torch.eye(3, dtype=torch.float64).reshape(1, 3, 1, 3)
    out, _ = oracle.attention(q, k, v, alibi_slopes=torch.tensor([0.5], dtype=torch.float64))
    bias = torch.tensor([[-0.5, 0.0, -0.5], [-1.0, -0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(out[0, :, 0], bias.softmax(-1))


def test_sink_takes_mass_and_has_no_value():
    q, k, v = (torch.zeros(1, 1, 1, 2, dtype=torch.float64) for _ in range(3))
    v += 1.0
    out, lse = oracle.attention(q, k, v, s_aux=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(out, torch.full_like(out, 0.5))
    torch.testing.assert_close(lse, torch.full_like(lse, 2.0).log())
    empty, lse = oracle.attention(q, k[:, :0], v[:, :0], s_aux=torch.tensor([1.25]).double())
    assert (empty == 0).all() and (lse == 1.25).all()


def test_rows_that_see_nothing():
    q = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    out, lse = oracle.attention(q, k, k, causal=True)
    assert (out[0, :2] == 0).all() and torch.isneginf(lse[0, :, :2]).all()
    grads = torch.autograd.grad([out, lse], [q, k], [torch.ones_like(out), torch.ones_like(lse)])
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][0, :2] == 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_complex_product(interleaved):
    x = torch.randn(5, 2, 10, dtype=torch.float64)
    angle = torch.rand(9, 3, dtype=torch.float64) * 6
    positions = torch.tensor([0, 8, 3, 3, 1])
    y = oracle.rotate(x, angle.cos(), angle.sin(), positions, interleaved)
    pick = (
        (lambda t: (t[..., 0:6:2], t[..., 1:6:2]))
        if interleaved
        else (lambda t: (t[..., :3], t[..., 3:6]))
    )
    turn = torch.exp(1j * angle[positions])[:, None, :]
    torch.testing.assert_close(torch.complex(*pick(y)), torch.complex(*pick(x)) * turn)
    assert torch.equal(y[..., 6:], x[..., 6:])


def test_paged_and_packed_layouts_agree():
    q = torch.randn(7, 2, 4, dtype=torch.float64)
    k = torch.randn(9, 1, 4, dtype=torch.float64)
    cu_q, cu_k = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 5, 5, 9])
    packed = oracle.attention(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True)
    pages = torch.full((6, 2, 1, 4), float("nan"), dtype=torch.float64)
    table = torch.tensor([[4, 0, 2], [0, 0, 0], [5, 1, 3]])
    for b, (start, end) in enumerate([(0, 5), (5, 5), (5, 9)]):
        for t in range(end - start):
            pages[table[b, t // 2], t % 2] = k[start + t]
    paged = oracle.attention(
        q,
        pages,
        pages,
        cu_seqlens_q=cu_q,
        seqused_k=torch.tensor([5, 0, 4]),
        page_table=table,
        causal=True,
    )
    for a, b in zip(packed, paged, strict=True):
        torch.testing.assert_close(a, b)


def test_combine_is_attention_over_the_pieces():
    q = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    k = torch.randn(1, 10, 2, 4, dtype=torch.float64)
    whole, lse = oracle.attention(q, k, k)
    parts = [oracle.attention(q, k[:, a:b], k[:, a:b]) for a, b in [(0, 4), (4, 4), (4, 10)]]
    out, merged = oracle.combine(
        torch.stack([o for o, _ in parts]), torch.stack([x.transpose(1, 2) for _, x in parts])
    )
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(merged.transpose(1, 2), lse)


def test_a_hidden_page_may_have_any_number_and_a_visible_one_may_not():
    q, cache = torch.randn(1, 1, 1, 4), torch.randn(3, 2, 1, 4)
    lengths = torch.tensor([4])

    def windowed(table: list[int], left: int):
        table = torch.tensor([table])
        return oracle.attention(
            q, cache, cache, page_table=table, seqused_k=lengths, window_size=(left, 0)
        )

    for a, b in zip(windowed([2, 1], 1), windowed([-7, 1], 1), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(AssertionError, match="does not exist"):
        windowed([-7, 1], 2)


def test_a_row_without_work():
    q, cache = torch.randn(2, 1, 1, 4), torch.randn(2, 3, 1, 4)
    rows = torch.tensor([1, -1])
    step = oracle.CacheStep(torch.tensor([1, 1]), cache_batch_idx=rows, k=q, v=q)
    out, lse, k_after, _ = step.attention(q, cache, cache, s_aux=torch.zeros(1))
    assert not out[1].any() and lse[1].item() == float("-inf") and out[0].any()
    assert torch.equal(k_after[0], cache[0]) and not torch.equal(k_after[1], cache[1])

"""flash_attn_combine: merging partial results over disjoint keys."""

import pytest
import torch

import flash8
import oracle
from tolerances import check_absolute, check_fa3

MINUS_INF = float("-inf")


def partials(splits, batch=3, seqlen=17, heads=2, d=24, dtype=torch.float32):
    out = torch.randn(splits, batch, seqlen, heads, d, dtype=dtype)
    return out, torch.randn(splits, batch, seqlen, heads, dtype=dtype) * 3


@pytest.mark.parametrize("splits", [1, 2, 3, 17, 133, 256])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_against_the_oracle(splits, out_dtype):
    out_partial, lse_partial = partials(splits)
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial, out_dtype=out_dtype)
    reference, reference_lse = oracle.combine(out_partial, lse_partial)
    assert out.dtype == (out_dtype or torch.float32) and out.shape == reference.shape
    assert lse.shape == (3, 17, 2)
    check_absolute("LSE", lse, reference_lse, 1e-5)
    if out.dtype == torch.float32:
        check_absolute("O", out, reference, 1e-5)
    else:
        check_fa3("O", out, reference, reference.to(out.dtype))


def test_float64():
    out_partial, lse_partial = partials(5, dtype=torch.float64)
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial)
    reference, reference_lse = oracle.combine(out_partial, lse_partial)
    check_absolute("O", out, reference, 1e-13)
    check_absolute("LSE", lse, reference_lse, 1e-13)


def test_without_a_batch_dimension():
    out_partial, lse_partial = partials(4, batch=1)
    packed, packed_lse = flash8.flash_attn_combine(out_partial[:, 0], lse_partial[:, 0])
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial)
    assert torch.equal(packed, out[0]) and torch.equal(packed_lse, lse[0])


def test_strided_partials():
    out_partial = torch.randn(8, 3, 2, 17, 24).transpose(2, 3)[::2]
    lse_partial = torch.randn(4, 3, 4, 17).transpose(-1, -2)[..., :2]
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial)
    reference, reference_lse = oracle.combine(out_partial, lse_partial)
    check_absolute("O", out, reference, 1e-5)
    check_absolute("LSE", lse, reference_lse, 1e-5)


def test_splits_that_saw_nothing_weigh_nothing_even_with_nan_in_them():
    out_partial, lse_partial = partials(4)
    lse_partial[2:, 1] = MINUS_INF
    out_partial[2:, 1] = float("nan")
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial)
    reference, reference_lse = oracle.combine(out_partial, lse_partial)
    check_absolute("O", out, reference, 1e-5)
    check_absolute("LSE", lse, reference_lse, 1e-5)


def test_rows_that_no_split_saw():
    out_partial, lse_partial = partials(3)
    lse_partial[:, 0, 5] = MINUS_INF
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial)
    assert (out[0, 5] == 0).all() and torch.isneginf(lse[0, 5]).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[1:]).all()


def test_out_is_filled():
    out_partial, lse_partial = partials(3)
    expected, _ = flash8.flash_attn_combine(out_partial, lse_partial, out_dtype=torch.bfloat16)
    out = torch.full_like(expected, float("nan"))
    returned, _ = flash8.flash_attn_combine(out_partial, lse_partial, out=out)
    assert returned is out and torch.equal(out, expected)


def test_huge_lse_do_not_overflow():
    out_partial, lse_partial = partials(3)
    shifted, shifted_lse = flash8.flash_attn_combine(out_partial, lse_partial + 1000)
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial)
    torch.testing.assert_close(shifted, out, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shifted_lse - 1000, lse, rtol=1e-3, atol=1e-3)


def test_gradcheck():
    out_partial, lse_partial = partials(3, batch=2, seqlen=2, d=3, dtype=torch.float64)
    lse_partial[1, 0] = MINUS_INF
    assert torch.autograd.gradcheck(
        lambda o, x: flash8.flash_attn_combine(o, x.masked_fill(lse_partial == MINUS_INF, -1e30)),
        (out_partial.requires_grad_(), torch.randn_like(lse_partial).requires_grad_()),
    )


def test_gradients_stay_finite_where_a_split_saw_nothing():
    out_partial, lse_partial = partials(3, dtype=torch.float64)
    lse_partial[1, 0], lse_partial[:, 1] = MINUS_INF, MINUS_INF
    out_partial.requires_grad_(), lse_partial.requires_grad_()
    out, lse = flash8.flash_attn_combine(out_partial, lse_partial)
    grads = torch.autograd.grad(
        [out, lse], [out_partial, lse_partial], [torch.ones_like(out), torch.ones_like(lse)]
    )
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][1, 0] == 0).all() and (grads[0][:, 1] == 0).all()


def test_attention_in_pieces_is_attention():
    q = torch.randn(2, 9, 4, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 70, 2, 16, dtype=torch.float64)
    pieces = [
        flash8.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True)
        for a, b in [(0, 1), (1, 40), (40, 40), (40, 70)]
    ]
    out, lse = flash8.flash_attn_combine(
        torch.stack([o for o, _ in pieces]),
        torch.stack([x.transpose(1, 2).contiguous() for _, x in pieces]),
    )
    whole, whole_lse = flash8.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse.transpose(1, 2), whole_lse)

"""Dropout: the public mask is the published generator, and exactly what attention drops."""

import math

import pytest
import torch

import flash8
import oracle
from cases import (
    Case,
    as_leaves,
    build,
    check_backward,
    check_forward,
    gradients,
    run_flash8,
    run_oracle,
    upstream,
)

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 19), (1, 2, 130, 257), (3, 1, 64, 8)]


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_is_the_published_generator(shape, p):
    batch, heads, seqlen_q, seqlen_k = shape
    seed = 0x0123456789ABCDEF
    mask = flash8.dropout_mask(seed, *shape, p)
    assert mask.dtype == torch.bool and mask.shape == shape
    for b in range(batch):
        expected = oracle.dropout_keep(seed, b, heads, seqlen_q, seqlen_k, p)
        assert torch.equal(mask[b], torch.from_numpy(expected))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63)])
def test_all_64_bits_of_the_seed_count(seed):
    mask = flash8.dropout_mask(seed, 1, 2, 9, 40, 0.5)
    expected = oracle.dropout_keep(seed, 0, 2, 9, 40, 0.5)
    assert torch.equal(mask[0], torch.from_numpy(expected))
    assert not torch.equal(mask, flash8.dropout_mask(seed ^ (1 << 40), 1, 2, 9, 40, 0.5))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(p):
    keep = flash8.dropout_mask(7, 4, 4, 256, 256, p).double()
    n = keep.numel()
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs(keep.mean().item() - (1 - p)) < 5 * sigma + 2**-17
    centred = keep - keep.mean()
    for dim in range(4):  # neighbours along every dimension are uncorrelated
        a = centred.narrow(dim, 0, keep.shape[dim] - 1)
        b = centred.narrow(dim, 1, keep.shape[dim] - 1)
        assert abs((a * b).mean().item()) < 5 * p * (1 - p) / math.sqrt(a.numel())
    for dim in range(4):  # no slice is special
        rate = keep.mean(dim=[d for d in range(4) if d != dim])
        spread = math.sqrt(p * (1 - p) * keep.shape[dim] / n)
        assert (rate - (1 - p)).abs().max() < 6 * spread


CASES = {
    "plain": {},
    "causal": dict(causal=True),
    "gqa": dict(heads=4, heads_kv=2),
    "sink": dict(sink=True),
    "window softcap": dict(window_size=(20, 5), softcap=2.0),
    "packed": dict(layout="packed", seqlens_q=(7, 0, 70), seqlens_k=(9, 4, 140), causal=True),
    "paged": dict(layout="paged", page_size=5, seqlens_q=(7, 3), seqlens_k=(9, 140)),
    "many tiles": dict(seqlens_q=(270, 270), seqlens_k=(1101, 1101)),
    "splits": dict(num_splits=3, seqlens_k=(1300, 1300)),
}


def case(name, **changes) -> Case:
    default = dict(seqlens_q=(45, 45), seqlens_k=(67, 67), dropout_p=0.3)
    return Case(**{**default, **CASES[name], **changes})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_forward_drops_what_the_mask_says(name, dtype):
    check_forward(build(case(name, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in CASES if n != "splits"])
def test_backward_uses_the_same_mask(name, dtype):
    check_backward(build(case(name, dtype=dtype)))


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.999, 0.99998])
def test_the_scale_makes_up_for_what_the_mask_drops(p):
    """Not for p, of which the mask has 16 bits."""
    q, k = (torch.randn(1, 9, 1, 16, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(9, dtype=torch.float64)[None, :, None, :]
    leaves = [x.requires_grad_() for x in (q, k, eye)]
    whole = flash8.flash_attn_func(*leaves)
    seed = next(s for s in range(100000) if flash8.dropout_mask(s, 1, 1, 9, 9, p).any())
    left = flash8.flash_attn_func(*leaves, dropout_p=p, dropout_seed=seed)
    keep = flash8.dropout_mask(seed, 1, 1, 9, 9, p)[0, 0]
    right = torch.where(keep, whole[0, :, 0] / (1.0 - round(65536 * p) / 65536), 0.0)
    torch.testing.assert_close(left[0, :, 0], right, rtol=1e-12, atol=0.0)
    weights = torch.randn_like(right)
    found = torch.autograd.grad((left[0, :, 0] * weights).sum(), leaves)
    expected = torch.autograd.grad((right * weights).sum(), leaves[:2])
    expected += ((right.detach().T @ weights)[None, :, None, :],)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13 * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_everything_may_be_dropped(dtype):
    wide = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    leaves = [torch.randn(1, 20, 2, 32, dtype=wide).requires_grad_() for _ in range(3)]
    attend = flash8.fp8.fp8_attention if dtype != wide else flash8.flash_attn_func
    for p in (1.0 - 2**-18, 1.0 - 2**-53):
        out, lse = attend(*leaves, dropout_p=p, return_attn_probs=True)
        assert not out.any() and lse.isfinite().all()
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert not any(x.any() for x in found)


def test_lse_knows_nothing_of_dropout():
    problem = build(case("plain"))
    _, lse = run_flash8(problem)
    _, plain = run_flash8(build(case("plain", dropout_p=0.0)))
    assert torch.equal(lse, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_same_seed_replays_and_another_does_not(dtype):
    q, k, v = (torch.randn(2, 30, 2, 16, dtype=dtype) for _ in range(3))
    runs = [
        flash8.flash_attn_func(q, k, v, dropout_p=0.4, dropout_seed=seed)
        for seed in (5, 5, torch.tensor([5]), torch.tensor(5), 6)
    ]
    assert all(torch.equal(runs[0], x) for x in runs[1:4])
    assert not torch.equal(runs[0], runs[4])


def test_manual_seed_replays_and_calls_differ():
    q = torch.randn(1, 40, 2, 16)

    def twice():
        torch.manual_seed(123)
        return [flash8.flash_attn_func(q, q, q, dropout_p=0.4) for _ in range(2)]

    (a, b), (c, d) = twice(), twice()
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b)


def test_backward_replays_a_drawn_seed():
    """With dropout_seed=None the mask can still be read off: dV = P_dropped^T dO."""
    problem = build(case("plain", dropout_p=0.0))
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    eye = torch.eye(67, dtype=torch.float64)[None, :, None, :].expand(2, 67, 1, 67)
    out = flash8.flash_attn_func(leaves[0], leaves[1], eye.requires_grad_(), dropout_p=0.5)
    d_out = torch.randn_like(out)
    (d_eye,) = torch.autograd.grad(out, [eye], [d_out])
    dropped = out.detach()  # (b, i, h, j): P with V = identity
    torch.testing.assert_close(d_eye[:, :, 0], torch.einsum("bihj,bihn->bjn", dropped, d_out))
    assert (dropped == 0).double().mean() == pytest.approx(0.5, abs=0.05)


def test_p_zero_is_no_dropout_and_ignores_the_seed():
    q = torch.randn(1, 20, 1, 8)
    assert torch.equal(
        flash8.flash_attn_func(q, q, q),
        flash8.flash_attn_func(q, q, q, dropout_p=0.0, dropout_seed=9),
    )


def test_p_zero_does_not_touch_the_generator():
    q = torch.randn(1, 4, 1, 8)
    before = torch.get_rng_state()
    flash8.flash_attn_func(q, q, q)
    assert torch.equal(before, torch.get_rng_state())


def test_the_mean_over_seeds_is_attention_without_dropout():
    q, k, v = (torch.randn(1, 8, 1, 8, dtype=torch.float64) for _ in range(3))
    runs = torch.stack(
        [flash8.flash_attn_func(q, k, v, dropout_p=0.2, dropout_seed=s) for s in range(400)]
    )
    error = (runs.mean(0) - flash8.flash_attn_func(q, k, v)).abs()
    assert (error < 5 * runs.std(0) / 400**0.5 + 1e-12).all()


def test_fp8_drops_the_same_elements():
    q, k, _v = (torch.randn(1, 30, 1, 32).to(torch.float8_e4m3fn) for _ in range(3))
    eye = torch.eye(30)[None, :, None, :].to(torch.float8_e4m3fn)
    out = flash8.flash_attn_func(q, k, eye, dropout_p=0.5, dropout_seed=3)
    keep = flash8.dropout_mask(3, 1, 1, 30, 30, 0.5)
    assert torch.equal(out[0, :, 0] != 0, keep[0, 0])


def test_a_wrong_seed_would_be_caught():
    problem = as_leaves(build(case("plain")))
    d_out, d_lse = upstream(problem)
    found = gradients(problem, run_flash8, d_out, d_lse)
    problem.seed += 1
    other = gradients(problem, run_oracle, d_out, d_lse)
    assert (found["v"] - other["v"]).abs().max() > 0.1

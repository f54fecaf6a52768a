"""smooth_k: dQ from K without its mean, on CPU tensors and in front of every backend."""

import functools

import pytest
import torch

import flash8
import tolerances
from cases import Case, as_leaves, build, gradients, run_flash8, upstream
from flash8.nn import FlashMHA, FlashSelfAttention

DENSE = Case((33, 33), (47, 47), heads=4, heads_kv=2, sink=True)
CASES = {
    "dense": DENSE,
    "causal, one KV head": DENSE.with_(causal=True, heads_kv=1),
    "window, ALiBi, no sink": DENSE.with_(window_size=(7, 3), alibi="h", sink=False),
    "packed": DENSE.with_(layout="packed", seqlens_q=(9, 0, 21), seqlens_k=(13, 5, 0), tail=3),
    "used lengths": DENSE.with_(unused_q=(3, 33), unused_k=(11, 47), poison=True),
    "pages": DENSE.with_(layout="paged", unused_k=(11, 2), poison=True),
    "qv and dropout": DENSE.with_(qv=True, dropout_p=0.3),
    "many keys": DENSE.with_(seqlens_k=(700, 700)),
}


@pytest.mark.parametrize("name", CASES)
def test_in_float64_every_gradient_is_what_it_was(name):
    problem = build(CASES[name])
    d_out, d_lse = upstream(problem)
    want = gradients(as_leaves(problem), run_flash8, d_out, d_lse)
    found = gradients(as_leaves(problem), run_flash8, d_out, d_lse, smooth_k=True)
    for leaf, x in found.items():
        torch.testing.assert_close(x, want[leaf], rtol=1e-10, atol=1e-12)
        assert leaf == "q" or torch.equal(x, want[leaf])


def biased(dtype=torch.bfloat16, strength=32.0):
    """Keys whose channels have means up to `strength`; float64 tensors of the same values."""
    g = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, 150, heads, 64, generator=g) for heads in (4, 2, 2, 4))
    k += torch.linspace(-strength, strength, 64)
    return [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (q, k, v)], dout.to(dtype)


def dq(dtype, **options):
    leaves, dout = biased(dtype)
    out = flash8.flash_attn_func(*leaves, causal=True, **options)
    return torch.autograd.grad(out, leaves, dout.to(torch.bfloat16).to(dtype))[0]


def test_a_bias_of_keys_costs_dq_nothing():
    exact = dq(torch.float64)
    assert tolerances.rel_l2(dq(torch.bfloat16), exact) > 2e-2
    assert tolerances.rel_l2(dq(torch.bfloat16, smooth_k=True), exact) < 4e-3


def test_output_and_lse_are_what_they_were():
    leaves, _ = biased()
    call = functools.partial(flash8.flash_attn_func, *leaves, return_attn_probs=True)
    for x, y in zip(call(), call(smooth_k=True), strict=True):
        assert torch.equal(x, y)


def test_packed_functions_and_modules_hand_it_on():
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(2, 40, 3, 2, 32, generator=g).bfloat16()
    qkv[:, :, 1] += 20.0 * torch.randn(32, generator=g).bfloat16()

    def gradient(call):
        leaf = qkv.clone().requires_grad_()
        return torch.autograd.grad(call(leaf).float().sin().sum(), leaf)[0]

    plain, smooth = (
        gradient(lambda x, s=s: flash8.flash_attn_func(*x.unbind(2), smooth_k=s))
        for s in (False, True)
    )
    assert not torch.equal(plain, smooth)
    assert torch.equal(
        smooth, gradient(lambda x: flash8.flash_attn_qkvpacked_func(x, smooth_k=True))
    )
    assert torch.equal(smooth, gradient(FlashSelfAttention(smooth_k=True)))


def test_a_module_hands_it_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "flash8.nn.mha.flash_attn_func", lambda q, k, v, **given: seen.append(given) or q
    )
    FlashMHA(32, 2, smooth_k=True)(torch.randn(1, 5, 32))
    assert seen[0]["smooth_k"] is True


def test_transforms_and_compilation_see_it():
    leaves, _ = biased()
    call = functools.partial(flash8.flash_attn_func, causal=True, smooth_k=True)

    def dq_of(q, k, v):
        return torch.func.grad(lambda x: call(x, k, v).float().sum())(q)

    want = dq_of(*leaves)
    assert torch.equal(want, torch.vmap(dq_of)(*(x[:, None] for x in leaves))[:, 0])
    compiled = torch.compile(lambda *x: call(*x).float().sum(), fullgraph=True, backend="eager")
    assert torch.equal(torch.autograd.grad(compiled(*leaves), leaves)[0], want)
    on_meta = [x.detach().to("meta").requires_grad_() for x in leaves]
    assert torch.autograd.grad(call(*on_meta).sum(), on_meta)[0].shape == leaves[0].shape


def test_tangents_are_what_they_were():
    leaves, _ = biased(torch.float64)
    primals = tuple(x.detach() for x in leaves)
    tangents = tuple(torch.randn_like(x) for x in primals)
    found, want = (
        torch.func.jvp(functools.partial(flash8.flash_attn_func, smooth_k=s), primals, tangents)
        for s in (True, False)
    )
    assert torch.equal(found[1], want[1])

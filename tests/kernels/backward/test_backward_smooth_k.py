"""smooth_k of the public functions on the kernels of the simulated device: the mean of the keys is
made there, and dQ is as precise as without a bias."""

import pytest
import torch

import flash8
import tolerances
from cases import Case, as_leaves, build, gradients, run_flash8, upstream
from defaults import by_default
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import key_mean
from flash8.backends.hopper.verify import trust
from flash8.call.options import Options
from forward_cases import device
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

DENSE = Case(
    *((70, 70), (150, 150)), heads=4, heads_kv=2, head_dim=128, head_dim_v=128, causal=True
).with_(dtype=torch.bfloat16)
CASES = {
    "sinks": DENSE.with_(sink=True),
    "packed": DENSE.with_(seqlens_q=(70, 0, 33), seqlens_k=(90, 33, 130), layout="packed", tail=5),
    "used lengths": DENSE.with_(unused_q=(0, 7), unused_k=(60, 150), poison=True),
    "one KV head": DENSE.with_(heads=4, heads_kv=1, sink=True),
    "head_dim 72": DENSE.with_(head_dim=72, head_dim_v=72, seqlens_q=(40,), seqlens_k=(60,)),
    "window": DENSE.with_(head_dim=64, head_dim_v=64, causal=False, window_size=(37, 21)),
    "256 channels": DENSE.with_(head_dim=256, head_dim_v=256),
}


def biased(case: Case):
    """A problem whose keys have channels with means from -32 to 32."""
    problem = build(case)
    bias = torch.linspace(-32.0, 32.0, case.head_dim)
    problem.k = (problem.k.float() + bias).to(case.dtype)
    return problem


def behind(problem):
    """Gradients of O and LSE. What LSE's adds to dQ is exact either way, and would be large."""
    d_out, d_lse = upstream(problem)
    return d_out, 0.02 * d_lse


def served(monkeypatch, problem, *, smooth_k: bool):
    """The gradients of kernels, which are given a mean or not."""
    d_out, d_lse = behind(problem)
    launch, seen = hopper.launch, []

    def seeing(planned, stream):
        seen.append(planned.call.k_mean[0] != 0)
        launch(planned, stream)

    with device().serving_cpu_tensors(monkeypatch, seed=3), monkeypatch.context() as patch:
        patch.setattr(hopper, "launch", seeing)
        found = gradients(as_leaves(problem), run_flash8, d_out, d_lse, smooth_k=smooth_k)
    assert seen == [smooth_k]
    return found


def exact(problem):
    """In float64, on the portable code."""
    leaves = as_leaves(problem)
    for name in ("q", "k", "v", "s_aux"):
        x = getattr(leaves, name)
        if x is not None:
            setattr(leaves, name, x.detach().double().requires_grad_())
    d_out, d_lse = behind(problem)
    return gradients(leaves, run_flash8, d_out.double(), d_lse.double())


@pytest.mark.parametrize("name", by_default(CASES, ["sinks", "packed", "used lengths"]))
def test_a_bias_of_keys_costs_dq_nothing(name, monkeypatch):
    problem = biased(CASES[name])
    want = exact(problem)
    rough = served(monkeypatch, problem, smooth_k=False)
    found = served(monkeypatch, problem, smooth_k=True)
    assert tolerances.rel_l2(found["q"], want["q"]) < 4e-3
    assert tolerances.rel_l2(rough["q"], want["q"]) > 2e-2
    for leaf in ("k", "v"):
        assert tolerances.rel_l2(found[leaf], want[leaf]) < 6e-3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by_kernels", [True, False])
def test_the_mean_is_that_of_the_used_keys(packed, by_kernels, monkeypatch):
    g = torch.Generator().manual_seed(5)
    k = torch.randn(2, 300, 2, 72, generator=g).bfloat16()
    used = torch.tensor([211, 0], dtype=torch.int32)
    k[0, 211:], k[1] = torch.nan, torch.inf
    options = Options(seqused_k=used)
    want = torch.zeros(2, 2, 72)
    want[0] = k[0, :211].float().mean(dim=0)
    if packed:
        k = k.flatten(0, 1)
        options = options._replace(cu_seqlens_k=torch.tensor([0, 300, 600], dtype=torch.int32))
    if not by_kernels:
        monkeypatch.setattr(trust, "is_trusted", lambda *_: False)
    with device().serving_cpu_tensors(monkeypatch):
        found = key_mean.key_mean(k, options)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_calls_have_equal_bits(monkeypatch):
    """The mean is made in one order, and dQ is where that is asked for."""
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 40, heads, 128, generator=g).bfloat16() for heads in (2, 1, 1))
    k = k.repeat(1, 6, 1, 1) + 8.0
    v = v.repeat(1, 6, 1, 1)
    found = []
    for seed in range(3):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with device().serving_cpu_tensors(monkeypatch, seed=seed):
            out = flash8.flash_attn_func(*leaves, causal=True, deterministic=True, smooth_k=True)
            found.append(torch.autograd.grad(out.float().sin().sum(), leaves))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))

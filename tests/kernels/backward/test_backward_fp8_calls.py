"""`fp8_attention` trained on the kernels of the simulated device: forward and backward, O and LSE
of an FP8 forward, and every recipe whose backward is in 16 bits."""

import functools
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch

import oracle
import tolerances
from flash8 import fp8
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import backward_fp8
from flash8.call.options import Options
from flash8.tensors.float8 import E4M3
from forward_cases import device, packed
from simulated_device import missing_compiler
from tolerances import rel_l2

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16 = torch.bfloat16
LENGTHS = (70, 0, 130, 1)


@contextmanager
def served(monkeypatch, *, seed: int = 0, fp8_inputs: tuple[bool, ...] = (True,)):
    """Inside, kernels serve; so many backwards have to be launched, of FP8 inputs or of 16-bit
    ones."""
    seen = []
    with device().serving_cpu_tensors(monkeypatch, seed=seed), monkeypatch.context() as patch:
        launch = hopper.launch
        patch.setattr(hopper, "launch", lambda *args: seen.append(args[0].call) or launch(*args))
        yield
    assert tuple(call.q16 != 0 for call in seen) == fp8_inputs


@functools.cache
def drawn(*, bias: float = 0.0, mean_v: float = 0.0, rows: int = 150, seed: int = 0):
    """q, k, v and dO, (batch, seqlen, heads, 128)."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((1, rows, 4, 128), (1, rows, 2, 128), (1, rows, 2, 128), (1, rows, 4, 128))
    q, k, v, dout = (torch.randn(shape, generator=g) for shape in shapes)
    k = k + bias * torch.linspace(-1, 1, 128)
    return [x.to(BF16) for x in (q, k, v + mean_v, dout)]


def grads(call, tensors, dout):
    leaves = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(call(*leaves), leaves, dout)


def dequantized(recipe, tensors, cu_seqlens=None):
    """What the forward computes with, in float64."""
    for name, x in zip("qkv", tensors, strict=True):
        yield fp8.dequantize(recipe.quantize(name, x, cu_seqlens), torch.float32).double()


def expected(recipe, tensors, dout, **options):
    leaves = [x.requires_grad_() for x in dequantized(recipe, tensors, options.get("cu_seqlens_q"))]
    options.pop("max_seqlen_q", None), options.pop("max_seqlen_k", None)
    out, _ = oracle.attention(*leaves, **options)
    return torch.autograd.grad(out, leaves, dout.double())


def check(found, wanted):
    for bound, name, x, y in zip(
        tolerances.FP8_GRADIENTS_DEQUANTISED, ("dQ", "dK", "dV"), found, wanted, strict=True
    ):
        bound.check(name, rel_l2(x, y))


RECIPES = {
    "head": fp8.CurrentScaling(),
    "tensor": fp8.CurrentScaling(granularity="tensor"),
    "block": fp8.BlockScaling(),
    "means": fp8.CurrentScaling(smooth_k=True, smooth_v=True),
    "rotated": fp8.BlockScaling(hadamard=True, smooth_k=True),
    "delayed": fp8.DelayedScaling().eval(),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, monkeypatch):
    recipe = RECIPES[name]
    *tensors, dout = drawn(bias=1.0, mean_v=0.5)
    call = functools.partial(fp8.fp8_attention, recipe=recipe, causal=True)
    with served(monkeypatch, seed=1):
        found = grads(call, tensors, dout)
    check(found, expected(recipe, tensors, dout, causal=True))


@pytest.mark.parametrize("recipe", ["head", "means"])
def test_a_large_bias_of_keys(recipe, monkeypatch):
    """O is of an FP8 product: D does not cancel, and K without its mean keeps dQ from that."""
    *tensors, dout = drawn(bias=10.0)
    call = functools.partial(fp8.fp8_attention, recipe=RECIPES[recipe], causal=True)
    with served(monkeypatch):
        found = grads(call, tensors, dout)
    check(found, expected(RECIPES[recipe], tensors, dout, causal=True))


def packed_model(recipe):
    """A layer on packed sequences, one of them empty, and its input."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), 64, generator=g)
    weights = [0.2 * torch.randn(64, n * 128, generator=g) for n in (2, 1, 1)]
    offsets = packed(LENGTHS)

    def loss(*weights):
        q, k, v = ((x @ w).to(BF16).unflatten(-1, (-1, 128)) for w in weights)
        lengths = {"max_seqlen_q": 130, "max_seqlen_k": 130}
        out = fp8.fp8_attention(
            *(q, k, v, recipe), cu_seqlens_q=offsets, cu_seqlens_k=offsets, causal=True, **lengths
        )
        return out.float().square().mean()

    return loss, weights


@pytest.mark.parametrize("name", ["head", "block", "delayed"])
def test_a_packed_model_trains(name, monkeypatch):
    """Four steps: the losses are those of the portable code, and they fall."""
    losses = []
    for where in ("kernels", "portable"):
        recipe = fp8.DelayedScaling() if name == "delayed" else RECIPES[name]
        loss, weights = packed_model(recipe)
        weights = [w.clone().requires_grad_() for w in weights]
        optimizer = torch.optim.SGD(weights, lr=5.0)
        seen = []
        kernels = served(monkeypatch, fp8_inputs=(True,) * 4)
        with kernels if where == "kernels" else nullcontext():
            for _ in range(4):
                optimizer.zero_grad()
                value = loss(*weights)
                value.backward()
                optimizer.step()
                if name == "delayed":
                    recipe.step()
                seen.append(value.item())
        losses.append(torch.tensor(seen))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=0.0)


def test_the_gradient_of_one_forward_is_that_of_the_portable_code(monkeypatch):
    """The same O, LSE and FP8 inputs, with and without the kernels: to 16-bit rounding, and to what
    D has of O's, which the portable code makes of P instead."""
    *tensors, dout = drawn(bias=1.0)
    recipe = RECIPES["head"]
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = fp8.fp8_attention(*leaves, recipe, causal=True)
    want = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    with served(monkeypatch):
        found = torch.autograd.grad(out, leaves, dout)
    for x, y in zip(found, want, strict=True):
        assert rel_l2(x, y.double()) < 1e-2


def test_a_head_wider_than_the_kernels_takes_the_16_bit_ones(monkeypatch):
    q = torch.randn(1, 20, 1, 256).to(BF16)
    q8, out = q.to(E4M3), q
    reason = backward_fp8.refusal(q8, q8, q8, out, Options())
    assert reason is not None and "head_dim is 256" in reason
    narrow = q[..., :128]
    for name in ("v_channel_descale", "page_table", "leftpad_k"):
        given = Options(**{name: torch.zeros(1)})
        found = backward_fp8.refusal(*[narrow.to(E4M3)] * 3, narrow, given)
        assert found is not None and name in found
    assert "torch.float32 gradients" in str(
        backward_fp8.refusal(*[narrow.to(E4M3)] * 3, narrow.float(), Options())
    )


def test_what_is_refused_is_served_dequantized(monkeypatch):
    """Rows of 120 bytes are none that TMA reads; in 16 bits they are."""
    *tensors, dout = (x[..., :120].contiguous() for x in drawn(rows=40))
    call = functools.partial(fp8.fp8_attention, recipe=RECIPES["head"], causal=True)
    with warnings.catch_warnings(action="ignore"), served(monkeypatch, fp8_inputs=(False,)):
        found = grads(call, tensors, dout)
    check(found, expected(RECIPES["head"], tensors, dout, causal=True))

"""The FP8 ops as torch sees them, their edge cases, and zero as an answer to every bound."""

import pytest
import torch

import flash8
import tolerances
from cases import cumulative
from flash8 import fp8
from flash8.call.options import Options
from flash8.fp8.recipes import BACKWARDS

SINK = torch.tensor([0.5, -1.0])


def arguments(recipe, requires_grad, dtype=torch.bfloat16):
    """Those of flash8::fp8_forward for one small call."""
    q, k, v = (torch.randn(2, 20, h, 32).to(dtype) for h in (2, 1, 1))
    scaled = [recipe.quantize(name, x, None) for name, x in zip("qkv", (q, k, v), strict=True)]
    descales = {f"{n}_descale": x.descale for n, x in zip("qkv", scaled, strict=True)}
    options = Options(causal=True, window_right=0, k_mean=scaled[1].mean, **descales)
    wide = [x.requires_grad_(requires_grad) for x in (q, k, v)]
    products = BACKWARDS.index(recipe.backward) and 5
    how = (products, recipe.gradient_dtype, recipe.gradient_descale(), recipe.gradient_amax())
    return (*wide, SINK, *(x.data for x in scaled), None, *how, *options)


@pytest.mark.parametrize(
    "recipe", [fp8.CurrentScaling(smooth_k=True), fp8.BlockScaling(backward="fp8")]
)
def test_opcheck(recipe):
    # "test_schema" compares arguments with torch.allclose, which float8 lacks.
    forward = torch.ops.flash8.fp8_forward.default
    tests = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(forward, arguments(recipe, True), test_utils=tests)
    inputs = arguments(recipe, False)
    out, lse = forward(*inputs)
    rest = (*inputs[4:7], SINK, out, lse, 5, recipe.gradient_dtype, None, *inputs[12:])
    backward = torch.ops.flash8.fp8_backward.default
    checked = "test_faketensor"
    torch.library.opcheck(backward, (torch.randn_like(out), None, *rest), test_utils=checked)
    torch.library.opcheck(backward, (None, torch.randn_like(lse), *rest), test_utils=checked)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("sink", [None, SINK])
def test_rows_that_see_nothing_have_no_gradients(backward, sink):
    """Causal with more queries than keys: the first 30 see nothing, or only the sink."""
    recipe = fp8.CurrentScaling(backward=backward, smooth_k=True, smooth_v=True)
    q, k, v = (torch.randn(1, s, h, 32, requires_grad=True) for s, h in ((50, 2), (20, 1), (20, 1)))
    out, lse = fp8.fp8_attention(q, k, v, recipe, causal=True, s_aux=sink, return_attn_probs=True)
    finite = torch.where(torch.isinf(lse), 0.0, lse)
    (out.sum() + finite.sum()).backward()
    # The sink's weight is 1 up to the rounding of LSE.
    assert (out[:, :30] == 0).all()
    assert q.grad[:, :30].abs().max() <= (0.0 if sink is None else 1e-6)
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v)) and (q.grad[:, 31:] != 0).any()


@pytest.mark.parametrize("backward", BACKWARDS)
def test_no_keys_and_no_queries(backward):
    recipe = fp8.BlockScaling(backward=backward, smooth_k=True)
    for seqlen_q, seqlen_k in ((5, 0), (0, 5), (0, 0)):
        shapes = ((seqlen_q, 2), (seqlen_k, 1), (seqlen_k, 1))
        q, k, v = (torch.randn(2, s, h, 32, requires_grad=True) for s, h in shapes)
        out = fp8.fp8_attention(q, k, v, recipe)
        out.sum().backward()
        assert (out == 0).all() and all((x.grad == 0).all() for x in (q, k, v))
    cu = cumulative((0, 0))
    q = torch.randn(0, 2, 32, requires_grad=True)
    k = torch.randn(0, 1, 32)
    lengths = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=0, max_seqlen_k=0)
    fp8.fp8_attention(q, k, k, recipe, **lengths).sum().backward()


@pytest.mark.parametrize("d", [24, 40, 96, 256])
def test_odd_head_dimensions(d):
    recipe = fp8.CurrentScaling(hadamard=True, backward="fp8")
    q, k = (torch.randn(1, 60, 2, d, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 60, 2, 17, requires_grad=True)
    out = fp8.fp8_attention(q, k, v, recipe)
    out.sum().backward()
    exact = flash8.flash_attn_func(q, k, v)
    tolerances.FP8_UNQUANTISED.check("O", tolerances.rel_l2(out, exact))


BOUNDS = {
    name: bound
    for name, bound in vars(tolerances).items()
    if name.startswith("FP8_") and isinstance(bound, (tolerances.Bound, tuple))
}


@pytest.mark.parametrize("name", BOUNDS)
def test_zero_fails_every_bound(name):
    reference = torch.randn(50, 16)
    bounds = BOUNDS[name] if isinstance(BOUNDS[name], tuple) else (BOUNDS[name],)
    for bound in bounds:
        with pytest.raises(AssertionError, match="above"):
            bound.check(name, tolerances.rel_l2(torch.zeros_like(reference), reference))

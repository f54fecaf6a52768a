"""The portable scaled product against fp64, and what its promotion is worth."""

import pytest
import torch

from flash8 import fp8
from flash8.backends.cpu import gemm as portable
from flash8.backends.cpu.gemm import fused_multiply_add
from flash8.call.scaled_mm import BLOCK
from gemm_cases import GRANULARITIES, make, values
from tolerances import rel_l2

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
SIZES = [(1, 1, 16), (127, 129, 144), (53, 131, 272), (7, 300, 1040)]


def reference(product):
    """In fp64."""
    m, n, k = product.sizes
    scale_a, scale_b = product.scale_a.double(), product.scale_b.double()
    if product.has_blocks:
        rows = BLOCK if scale_a.shape[0] < m else 1
        scale_a = scale_a.repeat_interleave(rows, 0)[:m].repeat_interleave(BLOCK, 1)[:, :k]
        scale_b = scale_b.repeat_interleave(BLOCK, 0)[:k].repeat_interleave(BLOCK, 1)[:, :n]
    a, b = product.a.float().double() * scale_a, product.b.float().double() * scale_b
    return a @ b + (0.0 if product.bias is None else product.bias.double())


def multiply(product):
    m, n, _ = product.sizes
    out = torch.full((m, n), torch.nan, dtype=product.out_dtype)
    portable.scaled_mm(product, out)
    return out


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_against_fp64(granularity, sizes):
    product = make(*sizes, granularity, bias=FP32)
    assert rel_l2(multiply(product), reference(product)) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [(BF16, 3e-3), (FP16, 4e-4)])
def test_outputs_are_rounded_once(dtype, limit):
    product = make(40, 50, 272, out_dtype=dtype, bias=BF16)
    assert rel_l2(multiply(product), reference(product)) < limit
    wide = multiply(product._replace(out_dtype=FP32))
    assert torch.equal(multiply(product), wide.to(dtype))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_e4m3_output_is_scaled_rounded_once_and_saturated(granularity):
    product = make(40, 50, 272, granularity, out_dtype=E4M3, bias=BF16)
    wide = multiply(product._replace(out_dtype=FP32, scale_result=None))
    scaled = wide * product.scale_result
    found = multiply(product).float()
    assert torch.equal(found, scaled.clamp(-448.0, 448.0).to(E4M3).float())
    assert 0 < (found.abs() == 448.0).sum() < 0.5 * found.numel()
    inside = scaled.abs() <= 448.0
    assert rel_l2(found[inside], scaled[inside]) < 0.03
    assert rel_l2(found[inside], wide[inside]) > 0.1  # which is not scaled


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_promoted_sums_stay_exact_in_long_products(granularity):
    """By the tensor core's arithmetic: the error of K = 8192 is that of a block of 128. In one long
    sum, as with fast accumulation, it is many times as large."""
    product = make(16, 24, 8192, granularity)
    want = reference(product)
    with fp8.study(accumulation="hopper"):
        promoted = rel_l2(multiply(product), want)
        assert promoted < 5e-4
        if not product.has_blocks:
            assert rel_l2(multiply(product._replace(fast_accum=True)), want) > 3 * promoted


def test_products_of_no_element_and_of_no_sum():
    for m, n, k in ((0, 5, 16), (5, 0, 16), (3, 4, 0)):
        for granularity in ("tensor", "row"):
            product = make(m, n, k, granularity, bias=FP32)
            found = multiply(product)
            assert found.shape == (m, n)
            assert k or torch.equal(found, product.bias.expand(m, n))


def test_a_fused_product_and_sum_is_rounded_once():
    """Against integers: 2^24 - 1 squared, and what two roundings get wrong."""
    x = torch.tensor([2.0**24 - 1, 1.0 + 2.0**-23, 1.0 + 2.0**-12, torch.inf, 3.0, torch.nan])
    y = torch.tensor([2.0**24 - 1, 1.0 - 2.0**-23, 1.0 + 2.0**-12, 1.0, 5.0, 1.0])
    z = torch.tensor([-(2.0**48), -1.0, 2.0**-60, 1.0, -torch.inf, 0.0])
    want = torch.tensor([-(2.0**25), -(2.0**-46), 1.0 + 2.0**-11 + 2.0**-23, torch.inf])
    found = fused_multiply_add(x, y, z)
    assert torch.equal(found[:4], want)
    assert found[4] == -torch.inf and found[5].isnan()


def test_a_fused_product_and_sum_agrees_with_fractions():
    from fractions import Fraction

    x, y, z = values(3, 300, seed=5).unbind()
    z = z * torch.exp2(values(300, seed=6) * 20.0)
    found = fused_multiply_add(x, y, z)
    for a, b, c, got in zip(x.tolist(), y.tolist(), z.tolist(), found, strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        below, above = (torch.nextafter(got, torch.tensor(to)) for to in (-torch.inf, torch.inf))
        error = abs(Fraction(got.item()) - exact)
        assert error <= min(abs(Fraction(x.item()) - exact) for x in (below, above))

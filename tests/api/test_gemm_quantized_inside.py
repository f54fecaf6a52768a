"""`gemm.scaled_mm` of a 16-bit a, which it quantizes: what `gemm.quantize` and the product give."""

import pytest
import torch

from flash8 import gemm
from flash8.ops.gemm import is_for_kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(m=5, n=140, k=272, dtype=BF16):
    w8, scale_w = gemm.quantize(draw(n, k, seed=1), "128x128")
    return draw(m, k).to(dtype), w8.t(), scale_w.t()


@pytest.mark.parametrize("m", [0, 1, 64, 65])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_bits_of_quantize_and_the_product(dtype, m):
    a, b, scale_b = operands(m, dtype=dtype)
    bias = draw(140, seed=2)
    a8, scale_a = gemm.quantize(a, "1x128")
    want = gemm.scaled_mm(a8, b, scale_a, scale_b, bias=bias, out_dtype=FP32)
    assert torch.equal(gemm.scaled_mm(a, b, scale_b=scale_b, bias=bias, out_dtype=FP32), want)
    out = torch.zeros(m, 140)
    assert gemm.scaled_mm(a, b, None, scale_b, bias=bias, out=out) is out
    assert torch.equal(out, want)


def test_near_the_wide_product():
    a, b, scale_b = operands(9)
    scale = scale_b.repeat_interleave(128, 0)[:272].repeat_interleave(128, 1)[:, :140]
    want = a.double() @ (b.double() * scale.double())
    found = gemm.scaled_mm(a, b, scale_b=scale_b, out_dtype=FP32).double()
    assert (found - want).norm() < 0.04 * want.norm()


def test_compiled_whole():
    a, b, scale_b = operands()
    call = torch.compile(
        lambda *x: gemm.scaled_mm(x[0], x[1], None, x[2]), fullgraph=True, backend="eager"
    )
    assert torch.equal(call(a, b, scale_b), gemm.scaled_mm(a, b, None, scale_b))


BAD = {
    "scales by tensor": (
        lambda a, b, s: (a, b, None, torch.ones(())),
        ValueError,
        r"scale_b must have shape \(ceil\(K / 128\), ceil\(N / 128\)\)",
    ),
    "a scale too many": (lambda a, b, s: (a, b, torch.ones(1), s), TypeError, "a must have dtype"),
    "a of fp32": (lambda a, b, s: (a.float(), b, None, s), TypeError, "a must have dtype"),
    "e4m3 without a scale": (
        lambda a, b, s: (a.to(E4M3), b, None, s),
        TypeError,
        "scale_a must be",
    ),
    "K of 17": (lambda a, b, s: (a[:, :17], b[:17], None, s), ValueError, "multiple of 16, got 17"),
    "column-major": (
        lambda a, b, s: (a.t().contiguous().t(), b, None, s),
        ValueError,
        "a must be row-major",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        gemm.scaled_mm(*change(*operands()))


def test_fast_accumulation_is_refused():
    a, b, scale_b = operands()
    with pytest.raises(ValueError, match="use_fast_accum must be False"):
        gemm.scaled_mm(a, b, None, scale_b, use_fast_accum=True)


def test_it_has_no_derivative():
    a, b, scale_b = operands()
    with pytest.raises(RuntimeError, match="has no derivative"):
        gemm.scaled_mm(a.requires_grad_(), b, None, scale_b)
    with torch.no_grad():
        gemm.scaled_mm(a, b, None, scale_b)


def test_cpu_tensors_take_the_portable_code():
    from flash8.call.scaled_mm import Product

    a, b, scale_b = operands()
    assert not is_for_kernels(Product(a, b, None, scale_b, None, BF16))

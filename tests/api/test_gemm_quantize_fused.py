"""`flash8.gemm.quantize_rms_norm` and `quantize_silu_mul` against float64: within a rounding."""

import pytest
import torch

from flash8 import gemm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRANULARITIES = ("row", "1x128")
both = pytest.mark.parametrize("granularity", GRANULARITIES)
sizes = pytest.mark.parametrize("size", [(1, 16), (5, 1), (37, 300), (3, 7168), (2, 17000)])


def draw(m, k, dtype=BF16, seed=0):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m + k + seed))
    return (x * torch.exp2(torch.arange(m) % 9 - 4.0)[:, None]).to(dtype)


def normed(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()


def silu_mul(gate, up):
    gate = gate.double()
    return gate / (1.0 + (-gate).exp()) * up.double()


def assert_quantized(found, want, granularity):
    """Scales to the last places of fp32, values to half a step of e4m3."""
    data, scale = found
    m, k = want.shape
    assert data.dtype == torch.float8_e4m3fn and data.shape == (m, -(-k // 16) * 16)
    assert not data[:, k:].view(torch.uint8).any()
    blocks = torch.nn.functional.pad(want, (0, -k % 128)).view(m, -1, 128).abs().amax(2)
    amax = blocks.amax(1, keepdim=True) if granularity == "row" else blocks
    assert scale.dtype == FP32 and scale.shape == amax.shape
    torch.testing.assert_close(scale.double() * 448.0, amax, rtol=1e-6, atol=0.0)
    wide = scale.double().expand(-1, blocks.shape[1]).repeat_interleave(128, 1)[:, :k]
    off = (data[:, :k].float() * wide - want).abs()
    assert (off <= (2.0**-4 + 1e-6) * want.abs() + 2.0**-10 * wide).all()


@both
@sizes
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rms_norm(granularity, size, dtype):
    x, weight = draw(*size, dtype), draw(1, size[1], FP32, seed=1)[0]
    found = gemm.quantize_rms_norm(x, weight, eps=1e-3, granularity=granularity)
    assert_quantized(found, normed(x, weight, 1e-3), granularity)


@both
@sizes
def test_rms_norm_of_a_residual(granularity, size):
    x, residual, weight = draw(*size), draw(*size, seed=3), draw(1, size[1], seed=1)[0]
    before = x.clone(), residual.clone()
    *found, summed = gemm.quantize_rms_norm(x, weight, granularity=granularity, residual=residual)
    assert torch.equal(summed, x + residual) and summed.dtype == x.dtype
    assert_quantized(found, normed(summed, weight, 1e-6), granularity)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@both
@sizes
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_silu_mul(granularity, size, dtype):
    gate, up = draw(*size, dtype), draw(*size, dtype, seed=5)
    found = gemm.quantize_silu_mul(gate, up, granularity=granularity)
    assert_quantized(found, silu_mul(gate, up), granularity)
    halves = torch.cat([gate, up], 1).chunk(2, 1)
    again = gemm.quantize_silu_mul(*halves, granularity=granularity)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("size", [(0, 32), (4, 0)])
def test_sizes_of_zero(size):
    x = draw(*size)
    for found in (gemm.quantize_silu_mul(x, x), gemm.quantize_rms_norm(x, draw(1, size[1])[0])):
        assert found[0].shape == size and found[1].shape == (size[0], -(-size[1] // 128))


def test_in_a_traced_function():
    x, weight, residual = draw(5, 300), draw(1, 300)[0], draw(5, 300, seed=9)

    def layer(x, weight, residual):
        a = gemm.quantize_rms_norm(x, weight, residual=residual)
        return *a, *gemm.quantize_silu_mul(x, residual, granularity="row")

    want = layer(x, weight, residual)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, weight, residual), want, strict=True):
        assert torch.equal(a.float(), b.float())


def test_there_is_no_derivative():
    x, weight = draw(3, 32, FP32).requires_grad_(), draw(1, 32, FP32)[0].requires_grad_()
    found = (*gemm.quantize_rms_norm(x, weight, residual=x), *gemm.quantize_silu_mul(x, x))
    assert not any(y.requires_grad for y in found)


X, WEIGHT = draw(3, 32), draw(1, 32)[0]
REFUSALS = [
    (ValueError, r"x must have 2 dimensions \(M, K\)", {"x": X[0]}),
    (TypeError, "x must have dtype .*float64", {"x": X.double()}),
    (TypeError, "weight must be a torch.Tensor, got None", {"weight": None}),
    (ValueError, r"weight must have shape \(K,\) = \(32,\), got \(16,\)", {"weight": WEIGHT[:16]}),
    (TypeError, "eps must be a number, got '1'", {"eps": "1"}),
    (ValueError, "granularity must be 'row' or '1x128', got 'tensor'", {"granularity": "tensor"}),
    (TypeError, "residual must have dtype torch.bfloat16, got torch.fl", {"residual": X.float()}),
    (ValueError, r"residual must have shape \(M, K\) = \(3, 32\)", {"residual": X[:2]}),
]


@pytest.mark.parametrize(("error", "match", "changes"), REFUSALS)
def test_refusals_of_rms_norm(error, match, changes):
    with pytest.raises(error, match=match):
        gemm.quantize_rms_norm(**{"x": X, "weight": WEIGHT, **changes})


def test_refusals_of_silu_mul():
    with pytest.raises(ValueError, match=r"up must have shape \(M, K\) = \(3, 32\)"):
        gemm.quantize_silu_mul(X, X[:2])
    with pytest.raises(TypeError, match=r"up must have dtype torch\.bfloat16"):
        gemm.quantize_silu_mul(X, X.float())
    with pytest.raises(ValueError, match="granularity must be 'row' or '1x128', got 'block'"):
        gemm.quantize_silu_mul(X, X, granularity="block")

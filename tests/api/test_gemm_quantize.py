"""`flash8.gemm.quantize`: blocks of matrices, against `flash8.fp8.quantize` where that has them."""

import pytest
import torch

from flash8 import fp8, gemm
from tolerances import rel_l2

GRANULARITIES = ("tensor", "row", "1x128", "128x128")
SIZES = [(1, 16), (37, 300), (128, 128), (260, 272), (0, 32), (5, 0)]


def draw(m, n, dtype=torch.float32):
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(m + n))
    return (x * torch.exp2(torch.arange(m) % 9)[:, None]).to(dtype)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_shapes_and_values(granularity, sizes):
    m, k = sizes
    x = draw(m, k)
    data, scale = gemm.quantize(x, granularity)
    rows, columns = -(-m // 128), -(-k // 128)
    shapes = {"tensor": (1, 1), "row": (m, 1), "1x128": (m, columns), "128x128": (rows, columns)}
    assert scale.shape == shapes[granularity] and scale.dtype == torch.float32
    assert data.shape == (m, -(-k // 16) * 16) and data.dtype == torch.float8_e4m3fn
    assert not data[:, k:].float().any()
    wide = scale
    if "128" in granularity:
        wide = wide.repeat_interleave(128, 1)[:, :k]
        wide = wide.repeat_interleave(128, 0)[:m] if granularity == "128x128" else wide
    if x.numel():
        assert rel_l2(data[:, :k].float() * wide, x) < 0.03
        assert data.float().abs().max() == 448.0


@pytest.mark.parametrize("sizes", [(128, 256), (40, 512), (37, 300)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_transpose_of_a_matrix(granularity, sizes):
    """An operand has its K contiguous, however x lies."""
    x = draw(*sizes)
    lying = x.t().contiguous().t()
    found, want = gemm.quantize(lying, granularity), gemm.quantize(x, granularity)
    assert found[0].stride(1) == 1 and torch.equal(found[0].float(), want[0].float())
    assert torch.equal(found[1], want[1])


def test_as_fp8_quantize_has_them():
    x = draw(300, 256, torch.bfloat16)
    heads = x.view(1, 300, 2, 128)
    for granularity, name in (("tensor", "tensor"), ("128x128", "block")):
        data, scale = gemm.quantize(x, granularity)
        other = fp8.quantize(heads, name)
        assert torch.equal(data.float(), other.data.view(300, 256).float())
        assert torch.equal(scale, other.descale.view(-1, scale.shape[0]).t())
    data, scale = gemm.quantize(x, "1x128")
    other = fp8.quantize(x.view(300, 1, 2, 128), "page")
    assert torch.equal(data.float(), other.data.view(300, 256).float())
    assert torch.equal(scale, other.descale[..., 0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_nan_and_infinity(granularity):
    x = torch.zeros(3, 32)
    data, scale = gemm.quantize(x, granularity)
    assert (scale == 1.0).all() and not data.float().any()
    x[0, 0], x[1, 1], x[2, 2], x[2, 3] = 2.0, torch.nan, -torch.inf, 2.0
    data, scale = gemm.quantize(x, granularity)
    assert scale.min() == torch.tensor(2.0 / 448.0)
    assert data[1, 1].float().isnan() and data[2, 2].float() == -448.0
    assert data[0, 0].float() == 448.0


@pytest.mark.parametrize("granularity", ["tensor", "row", "1x128"])
def test_are_operands_of_scaled_mm(granularity):
    x, weight = draw(37, 300), draw(140, 300)
    of_b = "128x128" if granularity == "1x128" else granularity
    (a, scale_a), (b, scale_b) = gemm.quantize(x, granularity), gemm.quantize(weight, of_b)
    out = gemm.scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=torch.float32)
    assert rel_l2(out, x.double() @ weight.double().t()) < 0.042


def test_refusals():
    with pytest.raises(ValueError, match=r"granularity must be one of .*, got 'block'"):
        gemm.quantize(draw(3, 4), "block")
    with pytest.raises(ValueError, match=r"x must have 2 dimensions \(M, K\)"):
        gemm.quantize(draw(3, 4)[0])
    with pytest.raises(TypeError, match="x must have dtype"):
        gemm.quantize(draw(3, 4).double())

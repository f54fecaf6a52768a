"""The GEMM kernel on the simulated device against the emulated tensor core, bit by bit."""

import pytest
import torch

from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.gemm_variants import SHIPPED_GEMMS
from gemm_cases import GRANULARITIES, assert_same, device, emulated, make, on_kernel, variant
from simulated_device import missing_compiler
from sparse_tensors import sparse

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
SLOW = pytest.mark.slow
FOR_MANY_ROWS = [variant for variant in SHIPPED_GEMMS if not variant.small_m]
#: Ends of tiles and of blocks of K, one row, one column, primes; more blocks than stages.
SIZES = [
    pytest.param((1, 1, 16), id="one element"),
    pytest.param((127, 129, 144), id="ends of tiles"),
    pytest.param((53, 131, 272), id="primes"),
    pytest.param((129, 64, 1168), marks=SLOW, id="more blocks than stages"),
    pytest.param((257, 263, 400), marks=SLOW, id="several tiles"),
    pytest.param((1, 300, 128), marks=SLOW, id="one row"),
    pytest.param((300, 1, 128), marks=SLOW, id="one column"),
]
OUTPUTS = [(FP32, None), (BF16, BF16), (FP16, FP32), (BF16, FP16), (E4M3, None), (E4M3, BF16)]


def check(monkeypatch, product, kernel=None, *, seed=0):
    assert_same(on_kernel(monkeypatch, product, kernel, seed=seed), emulated(product))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sizes(monkeypatch, granularity, sizes):
    check(monkeypatch, make(*sizes, granularity))
    assert device().report()["kernel"] == "flash8_gemm"


@pytest.mark.parametrize("n", [48, 41])
@pytest.mark.parametrize("out_dtype, bias", OUTPUTS)
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_outputs(monkeypatch, granularity, out_dtype, bias, n):
    """Stored by 16 bytes, and by elements."""
    check(monkeypatch, make(70, n, 160, granularity, out_dtype=out_dtype, bias=bias))


@pytest.mark.parametrize("out_dtype", [BF16, E4M3])
@pytest.mark.parametrize("granularity", ["tensor", "1x128"])
def test_rows_of_a_wider_output(monkeypatch, granularity, out_dtype):
    """What lies between the rows is left alone; its strides do not fit 16 bytes."""
    product = make(5, 48, 32, granularity, out_dtype=out_dtype)
    wide = torch.zeros(5, 53, dtype=out_dtype)
    with device().serving_cpu_tensors(monkeypatch):
        hopper.scaled_mm(product, wide[:, 3:51])
    assert_same(wide[:, 3:51], emulated(product))
    beside = wide.view(torch.uint8) if out_dtype == E4M3 else wide
    assert not beside[:, :3].any() and not beside[:, 51:].any()


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_what_lies_beyond_k_is_not_read(monkeypatch, granularity):
    """Rows of wider matrices, whose other columns are NaN."""
    product = make(9, 24, 144, granularity)
    a, b = (torch.full((rows, 288), torch.nan).to(product.a.dtype) for rows in (9, 24))
    a[:, :144], b[:, 144:] = product.a, product.b.t()
    check(monkeypatch, product._replace(a=a[:, :144], b=b[:, 144:].t()))


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_addresses_beyond_2_to_the_31_elements(monkeypatch, granularity):
    """Rows of A and of the output, and scales, stand so far apart that 32 bits cannot count it."""
    step, product = 2**30 + 256, make(3, 140, 272, granularity, out_dtype=BF16)
    a = sparse((3, 272), (step, 1), product.a.dtype)
    a.view(torch.uint8).copy_(product.a.view(torch.uint8))
    scale_a = sparse(product.scale_a.shape, (4 * step, step), FP32).copy_(product.scale_a)
    of_b = (4, 2**25) if granularity == "row" else (step, 4 * step)
    scale_b = sparse(product.scale_b.shape, of_b, FP32).copy_(product.scale_b)
    out = sparse((3, 140), (step, 1), BF16)
    with device().serving_cpu_tensors(monkeypatch):
        spread = product._replace(a=a, scale_a=scale_a, scale_b=scale_b)
        hopper.launch(variant(product), spread, out)
    assert_same(out, emulated(product))


@pytest.mark.parametrize("n", [40, 41])
def test_beyond_the_range_of_float16(monkeypatch, n):
    product = make(20, n, 160, "row", out_dtype=FP16)
    product.scale_a[::2] *= 2.0**12
    found = on_kernel(monkeypatch, product)
    assert_same(found, emulated(product))
    assert found[::2].isinf().any() and found[1::2].isfinite().all()


@pytest.mark.parametrize("n", [48, 41])
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_beyond_the_range_of_e4m3(monkeypatch, granularity, n):
    """Saturated, infinity too; NaN stays NaN. Without a scale of the result, too."""
    product = make(20, n, 160, granularity, out_dtype=E4M3)
    product.scale_a[::4] *= 2.0**12
    product.scale_a[1] = torch.inf
    product.scale_a[2, -1] = torch.nan
    product.scale_a[3] = 2.0**-20
    found = on_kernel(monkeypatch, product)
    assert_same(found, emulated(product))
    magnitude = found.float().abs()
    assert (magnitude[::4] == 448.0).sum() > 3 * n and magnitude[2].isnan().all()
    assert (magnitude[3] < 2.0**-6).all()
    for scale in (None, torch.tensor(torch.nan), torch.tensor([[-(2.0**-9)]])):
        check(monkeypatch, product._replace(scale_result=scale))


def test_views_that_tma_cannot_read(monkeypatch):
    product = make(9, 24, 64)
    a = torch.zeros(9, 71).to(product.a.dtype)
    a[:, 3:67] = product.a
    check(monkeypatch, product._replace(a=a[:, 3:67]))


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_nan_and_infinity(monkeypatch, granularity):
    """In operands, scales and bias: where the emulated tensor core has them, and nowhere else."""
    product = make(40, 50, 272, granularity, bias=FP32)
    product.a.view(torch.uint8)[3, 200] = 0x7F  # NaN
    product.b.view(torch.uint8)[100, 7] = 0xFF
    product.scale_a[11, -1] = torch.nan
    product.scale_a[12, 0] = torch.inf
    product.bias[20] = -torch.inf
    product.bias[21] = torch.nan
    found = on_kernel(monkeypatch, product)
    assert_same(found, emulated(product))
    assert found[3].isnan().all() and found[:, 7].isnan().all() and found[11].isnan().all()
    assert not found[:3, :7].isnan().any()


def test_values_at_the_ends_of_the_range(monkeypatch):
    """448 and subnormal numbers: sums whose terms the 14 bits of an accumulator drop."""
    product = make(20, 30, 256, "1x128")
    a = product.a.view(torch.uint8)
    a[:, ::7], a[:, 1::5], a[:, 2::11] = 0x7E, 0x01, 0xFE
    check(monkeypatch, product)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_other_schedules(monkeypatch, granularity):
    product = make(130, 70, 400, granularity, out_dtype=BF16, seed=7)
    want = emulated(product)
    for seed in range(1, 6):
        assert_same(on_kernel(monkeypatch, product, seed=seed), want)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FOR_MANY_ROWS, ids=lambda v: v.name)
def test_every_shipped_tile(monkeypatch, kernel):
    granularity = "1x128" if kernel.scales == "block" else "row"
    for m, n, k in ((1, 1, 16), (300, 263, 656), (513, 40, 272)):
        product = make(m, n, k, granularity, out_dtype=BF16, bias=FP32, fast=kernel.fast_accum)
        check(monkeypatch, product, kernel, seed=m)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", FOR_MANY_ROWS, ids=lambda v: v.name)
def test_no_false_alarm_in_100_seeds(monkeypatch, kernel):
    granularity = "128x128" if kernel.scales == "block" else "tensor"
    product = make(140, 150, 784, granularity, fast=kernel.fast_accum)
    want = emulated(product)
    for seed in range(100):
        assert_same(on_kernel(monkeypatch, product, kernel, seed=seed), want)


@pytest.mark.parametrize("granularity", ["1x128", "128x128"])
@pytest.mark.parametrize("block_n", [160, pytest.param(192, marks=SLOW)])
def test_columns_of_a_tile_with_two_scales(monkeypatch, block_n, granularity):
    """Tiles that begin at every place between two scales of B; the last has one, and one column."""
    product = make(70, 641, 272, granularity)
    check(monkeypatch, product, variant(product, block_n=block_n), seed=3)


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_a_cta_walks_many_tiles(monkeypatch, granularity):
    """3 x 5 tiles of five CTAs: a band of two rows of tiles, and one of one."""
    product = make(300, 520, 144, granularity, out_dtype=BF16)
    check(monkeypatch, product, seed=2)

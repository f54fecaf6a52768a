"""The GEMM kernel for few rows on the simulated device: the emulated tensor core's bits, as the
kernel for many rows has them."""

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.gemm_variants import (
    SHIPPED_GEMMS,
    GemmVariant,
    choose_variant,
)
from flash8.call.split_k import SMALL_M
from gemm_cases import GRANULARITIES, assert_same, device, emulated, make, on_kernel
from simulated_device import missing_compiler
from sparse_tensors import sparse

needs_a_compiler = pytest.mark.skipif(
    missing_compiler() is not None, reason=str(missing_compiler())
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
SLOW = pytest.mark.slow
BLOCK = GemmVariant("block", 16, 64, small_m=True)
OUTER = GemmVariant("outer", 64, 64, small_m=True)
VARIANTS = [variant for variant in SHIPPED_GEMMS if variant.small_m and variant.a == "e4m3"]
#: Ends of tiles and of blocks of K; an odd and an even number of blocks.
SIZES = [(1, 1, 16), (7, 65, 128), (8, 131, 272), (9, 130, 400), (16, 200, 656)]
MORE_ROWS = [(33, 70, 144), (64, 127, 272)]
OUTPUTS = [(FP32, None), (BF16, BF16), (FP16, FP32), (BF16, FP16), (E4M3, None), (E4M3, BF16)]


def of(granularity):
    return BLOCK if "128" in granularity else OUTER


def check(monkeypatch, product, kernel, *, seed=0):
    assert kernel.small_m
    found = on_kernel(monkeypatch, product, kernel, seed=seed)
    assert_same(found, emulated(product))
    assert device().report()["kernel"] == "flash8_gemm_small_m"
    return found


@needs_a_compiler
@pytest.mark.parametrize("sizes", [*SIZES, *MORE_ROWS], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sizes(monkeypatch, granularity, sizes):
    """More rows than a tile has are several tiles of rows."""
    check(monkeypatch, make(*sizes, granularity), of(granularity))


@needs_a_compiler
@pytest.mark.parametrize("variant", by_default(VARIANTS, [BLOCK, OUTER]), ids=lambda v: v.name)
def test_more_blocks_than_stages(monkeypatch, variant):
    """An odd number, and tiles in turn."""
    granularity = "1x128" if variant.scales == "block" else "row"
    k = 128 * 26 + 16
    for m, n in ((variant.block_m, 330), (1, 40)):
        check(monkeypatch, make(m, n, k, granularity, out_dtype=BF16), variant, seed=m)


@needs_a_compiler
@pytest.mark.parametrize("out_dtype, bias", OUTPUTS)
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_outputs(monkeypatch, granularity, out_dtype, bias):
    for n in (41, 48):
        product = make(11, n, 160, granularity, out_dtype=out_dtype, bias=bias)
        check(monkeypatch, product, of(granularity))


@needs_a_compiler
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_the_kernel_for_many_rows_has_the_same_bits(monkeypatch, granularity):
    """A row does not depend on how many there are."""
    product = make(9, 70, 400, granularity, bias=BF16, out_dtype=BF16)
    many = make(140, 70, 400, granularity, bias=BF16, out_dtype=BF16)
    scale_a = many.scale_a.clone()
    scale_a[:9] = product.scale_a
    a = torch.cat((product.a.float(), many.a[9:].float())).to(E4M3)
    many = product._replace(a=a, scale_a=scale_a)
    found = on_kernel(monkeypatch, product, of(granularity))
    assert_same(found, on_kernel(monkeypatch, many)[:9])


@needs_a_compiler
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_rows_of_wider_tensors(monkeypatch, granularity):
    """What lies beyond K is NaN; what lies between the rows of the output is left alone."""
    product = make(5, 48, 144, granularity, out_dtype=BF16)
    a, b = (torch.full((rows, 288), torch.nan).to(E4M3) for rows in (5, 48))
    a[:, :144], b[:, 144:] = product.a, product.b.t()
    spread = product._replace(a=a[:, :144], b=b[:, 144:].t())
    wide = torch.zeros(5, 53, dtype=BF16)
    with device().serving_cpu_tensors(monkeypatch):
        hopper.launch(of(granularity), spread, wide[:, 3:51])
    assert_same(wide[:, 3:51], emulated(product))
    assert not wide[:, :3].any() and not wide[:, 51:].any()


@needs_a_compiler
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_addresses_beyond_2_to_the_31_elements(monkeypatch, granularity):
    step, product = 2**30 + 256, make(3, 140, 272, granularity, out_dtype=BF16)
    a = sparse((3, 272), (step, 1), E4M3)
    a.view(torch.uint8).copy_(product.a.view(torch.uint8))
    scale_a = sparse(product.scale_a.shape, (4 * step, step), FP32).copy_(product.scale_a)
    of_b = (4, 2**25) if granularity == "row" else (step, 4 * step)
    scale_b = sparse(product.scale_b.shape, of_b, FP32).copy_(product.scale_b)
    out = sparse((3, 140), (step, 1), BF16)
    with device().serving_cpu_tensors(monkeypatch):
        spread = product._replace(a=a, scale_a=scale_a, scale_b=scale_b)
        hopper.launch(of(granularity), spread, out)
    assert_same(out, emulated(product))


@needs_a_compiler
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_nan_and_infinity(monkeypatch, granularity):
    """In operands, scales and bias: where the emulated tensor core has them, and nowhere else."""
    product = make(14, 50, 272, granularity, bias=FP32)
    product.a.view(torch.uint8)[3, 200] = 0x7F  # NaN
    product.b.view(torch.uint8)[100, 7] = 0xFF
    product.scale_a[11, -1] = torch.nan
    product.scale_a[12, 0] = torch.inf
    product.bias[20] = -torch.inf
    product.bias[21] = torch.nan
    found = check(monkeypatch, product, of(granularity))
    assert found[3].isnan().all() and found[:, 7].isnan().all() and found[11].isnan().all()
    assert not found[:3, :7].isnan().any()


@needs_a_compiler
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_beyond_the_range_of_e4m3(monkeypatch, granularity):
    """Saturated, infinity too; NaN stays NaN. Without a scale of the result, too."""
    product = make(10, 41, 160, granularity, out_dtype=E4M3)
    product.scale_a[::4] *= 2.0**12
    product.scale_a[1] = torch.inf
    product.scale_a[2, -1] = torch.nan
    product.scale_a[3] = 2.0**-20
    for scale in (product.scale_result, None, torch.tensor(torch.nan)):
        check(monkeypatch, product._replace(scale_result=scale), of(granularity))


@needs_a_compiler
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_other_schedules(monkeypatch, granularity):
    product = make(16, 140, 784, granularity, out_dtype=BF16, seed=7)
    want = emulated(product)
    for seed in range(1, 6):
        assert_same(on_kernel(monkeypatch, product, of(granularity), seed=seed), want)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_shipped_tile(monkeypatch, variant):
    granularity = "1x128" if variant.scales == "block" else "row"
    for m in (1, 7, 8, 9, 16, 33, 64):
        product = make(m, 203, 784, granularity, out_dtype=BF16, bias=FP32)
        check(monkeypatch, product, variant, seed=m)


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_no_false_alarm_in_100_seeds(monkeypatch, variant):
    granularity = "128x128" if variant.scales == "block" else "tensor"
    product = make(40, 150, 784, granularity)
    want = emulated(product)
    for seed in range(100):
        assert_same(on_kernel(monkeypatch, product, variant, seed=seed), want)


@pytest.mark.parametrize(
    ("m", "n", "fast", "name"),
    [
        (1, 4096, False, "gemm_small_m_block_16x64"),
        (16, 28672, False, "gemm_small_m_block_16x128"),
        (17, 4096, False, "gemm_small_m_block_64x64"),
        (64, 14336, False, "gemm_small_m_block_64x128"),
        (65, 4096, False, "gemm_block_128x128"),
        (16, 4096, True, "gemm_outer_fast_128x128"),
    ],
)
def test_which_is_chosen(m, n, fast, name):
    assert choose_variant("outer" if fast else "block", fast, m, n, 132).name == name


@pytest.mark.parametrize(("m", "tile"), [(1, "16x64"), (17, "64x64")])
def test_a_split_product_has_the_narrow_tile(m, tile):
    for n in (2048, 28672):
        name = choose_variant("block", False, m, n, 132, splits=2).name
        assert name == f"gemm_small_m_block_{tile}"


def test_the_largest_m_is_a_tile():
    assert max(variant.block_m for variant in VARIANTS) == SMALL_M

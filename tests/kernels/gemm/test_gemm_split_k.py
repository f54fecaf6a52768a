"""Split-K of the GEMM kernel for few rows on the simulated device: the CTAs of a cluster have the
bits of the emulated tensor core, whose partial sums are added in the order of K."""

import pytest
import torch

from defaults import by_default
from flash8 import _native, gemm
from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.gemm_variants import SHIPPED_GEMMS, GemmVariant
from flash8.call.scaled_mm import SPLITS
from gemm_cases import GRANULARITIES, assert_same, device, emulated, make, on_kernel, values
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
BLOCK = GemmVariant("block", 16, 64, small_m=True)
OUTER = GemmVariant("outer", 64, 64, small_m=True)
BFLOAT = GemmVariant("block", 16, 64, small_m=True, a="bf16")
VARIANTS = [variant for variant in SHIPPED_GEMMS if variant.splits]
FEW_ROWS = [variant for variant in SHIPPED_GEMMS if variant.small_m]
KEPT = [BLOCK, OUTER, BFLOAT]
#: Ends of tiles and of blocks of K; as many blocks as CTAs, multiples of these and other numbers.
SIZES = [(1, 1, 272), (7, 65, 1040), (8, 40, 1024), (16, 130, 656), (9, 64, 2064)]
MORE_ROWS = [(33, 70, 1296), (64, 127, 912)]
DTYPES = {"bf16": BF16, "fp16": FP16}


def of(granularity):
    return BLOCK if "128" in granularity else OUTER


def check(monkeypatch, product, kernel, *, seed=0):
    found = on_kernel(monkeypatch, product, kernel, seed=seed)
    assert_same(found, emulated(product))
    return found


def split(m, n, k, granularity, splits, **options):
    return make(m, n, k, granularity, **options)._replace(split_k=splits)


def wide(product, dtype, seed=5):
    """The same with an A of 16 bits."""
    m, _, k = product.sizes
    return product._replace(a=values(m, k, seed=seed).to(dtype), scale_a=None)


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sizes(monkeypatch, granularity, splits):
    """With 16 rows of a tile more rows are several tiles."""
    for sizes in (*SIZES, *MORE_ROWS):
        check(monkeypatch, split(*sizes, granularity, splits), of(granularity))


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_more_ctas_than_blocks(monkeypatch, granularity):
    """Those without a block send zeros. No call comes to that: it splits less, with these bits."""
    monkeypatch.setattr(hopper, "splits_of", lambda product: 8)
    for blocks in (1, 3, 7):
        product = split(11, 70, 128 * blocks - 16, granularity, 8)
        check(monkeypatch, product, of(granularity), seed=blocks)


@pytest.mark.parametrize("variant", by_default(VARIANTS, KEPT), ids=lambda v: v.name)
def test_more_blocks_than_stages(monkeypatch, variant):
    """In each CTA, which comes back to its stages."""
    granularity = "1x128" if variant.scales == "block" else "row"
    product = split(11, 70, 128 * 51, granularity, 2, out_dtype=BF16, bias=FP32)
    if variant.a in DTYPES:
        product = wide(product, DTYPES[variant.a])
    check(monkeypatch, product, variant, seed=3)


@pytest.mark.parametrize("out_dtype", [BF16, FP16, E4M3])
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_outputs(monkeypatch, granularity, out_dtype):
    """Scales of rows, the bias and the output's scale are applied once, to the whole sum."""
    for splits in (2, 8):
        product = split(13, 41, 1168, granularity, splits, out_dtype=out_dtype, bias=BF16)
        check(monkeypatch, product, of(granularity))


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_a_row_depends_on_no_other(monkeypatch, granularity):
    many = split(40, 70, 1296, granularity, 4)
    few = many._replace(a=many.a[:9], scale_a=many.scale_a[:9])
    found = on_kernel(monkeypatch, few, of(granularity))
    assert_same(found, on_kernel(monkeypatch, many, of(granularity))[:9])
    whole = on_kernel(monkeypatch, few._replace(split_k=1), of(granularity))
    assert (found - whole).norm() < 1e-6 * whole.norm()
    if granularity == "1x128":  # without scales these sums are exact
        assert not torch.equal(found, whole)


@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_nan_and_infinity(monkeypatch, granularity):
    """In the range of one CTA: where the emulated tensor core has them, and nowhere else."""
    product = split(14, 50, 1168, granularity, 8, bias=FP32)
    product.a.view(torch.uint8)[3, 1100] = 0x7F  # NaN
    product.b.view(torch.uint8)[130, 7] = 0xFF
    product.scale_a[11, -1] = torch.nan
    product.scale_a[12, 0] = torch.inf
    found = check(monkeypatch, product, of(granularity))
    assert found[3].isnan().all() and found[:, 7].isnan().all() and found[11].isnan().all()
    assert not found[:3, :7].isnan().any()


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("kernel", KEPT, ids=lambda v: v.name)
def test_other_schedules(monkeypatch, kernel, splits):
    """Whoever comes first: the order of the sum is that of the ranks."""
    granularity = "1x128" if kernel.scales == "block" else "tensor"
    product = split(16, 140, 1296, granularity, splits, out_dtype=FP32, seed=7)
    product = wide(product, BF16) if kernel.a == "bf16" else product
    want = emulated(product)
    for seed in range(1, 6):
        assert_same(on_kernel(monkeypatch, product, kernel, seed=seed), want)


@pytest.mark.parametrize("variant", by_default(FEW_ROWS, KEPT), ids=lambda v: v.name)
def test_which_kernels_split(variant):
    """What the variant says is what the kernel does."""
    kernel = _native.Library(device().driver, device().ptx(variant)).kernel()
    assert kernel.info.max_splits == (max(SPLITS) if variant.splits else 1)


def test_a_call_takes_one_launch(monkeypatch):
    product = split(9, 50, 1040, "1x128", 4, out_dtype=BF16)
    given = {name: getattr(product, name) for name in ("a", "b", "scale_a", "scale_b", "split_k")}
    with device().serving_cpu_tensors(monkeypatch, seed=2):
        found = gemm.scaled_mm(**given)
        assert hopper.choose(product) == BLOCK
        assert device().report()["kernel"] == "flash8_gemm_small_m"
    assert_same(found, emulated(product))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_tile_that_splits(monkeypatch, variant):
    granularity = "1x128" if variant.scales == "block" else "row"
    for splits in (2, 4, 8):
        for m in (1, 7, 8, 9, 16, 33, 64):
            product = split(m, 203, 1296, granularity, splits, out_dtype=BF16, bias=FP32)
            if variant.a in DTYPES:
                product = wide(product, DTYPES[variant.a])
            check(monkeypatch, product, variant, seed=m)


@pytest.mark.slow
@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_no_false_alarm_in_60_seeds(monkeypatch, variant, splits):
    granularity = "1x128" if variant.scales == "block" else "tensor"
    product = split(40, 150, 1296, granularity, splits)
    if variant.a in DTYPES:
        product = wide(product, DTYPES[variant.a])
    want = emulated(product)
    for seed in range(60):
        assert_same(on_kernel(monkeypatch, product, variant, seed=seed), want)

"""The GEMM kernel that quantizes its few rows of A itself, on the simulated device: the bits of
`gemm.quantize` by 1x128 and the emulated tensor core."""

import pytest
import torch

from defaults import by_default
from flash8 import gemm
from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.gemm_variants import SHIPPED_GEMMS, GemmVariant, choose_variant
from gemm_cases import assert_same, device, emulated, make, on_kernel, values
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
VARIANTS = [variant for variant in SHIPPED_GEMMS if variant.a != "e4m3"]
BFLOAT = GemmVariant("block", 16, 64, small_m=True, a="bf16")
HALF = GemmVariant("block", 64, 64, small_m=True, a="fp16")
DTYPES = {"bf16": BF16, "fp16": FP16}
SIZES = [(1, 1, 16), (7, 65, 128), (8, 131, 272), (9, 130, 400), (16, 200, 656), (33, 70, 144)]


def wide(m, n, k, dtype, *, seed=0, **options):
    """A's rows, and groups of a row, of other magnitudes: those of subnormal numbers, too."""
    product = make(m, n, k, "1x128", seed=seed, **options)
    a = values(m, k, seed=seed) * torch.exp2(values(m, 1, seed=seed + 9) * 4.0)
    a[:, ::3] *= 2.0**-7
    return product._replace(a=a.to(dtype), scale_a=None)


def quantized(product):
    data, scale = gemm.quantize(product.a, "1x128")
    return product._replace(a=data, scale_a=scale)


def check(monkeypatch, product, kernel, *, seed=0):
    found = on_kernel(monkeypatch, product, kernel, seed=seed)
    assert_same(found, emulated(quantized(product)))
    assert_same(found, emulated(product))
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kernel", by_default(VARIANTS, [BFLOAT]), ids=lambda v: v.name)
def test_sizes(monkeypatch, kernel, sizes):
    check(monkeypatch, wide(*sizes, DTYPES[kernel.a]), kernel)


@pytest.mark.parametrize("kernel", by_default(VARIANTS, [BFLOAT]), ids=lambda v: v.name)
def test_more_blocks_than_stages(monkeypatch, kernel):
    """And tiles in turn, whose bits no schedule changes."""
    product = wide(kernel.block_m, 330, 128 * 19 + 16, DTYPES[kernel.a], out_dtype=BF16, bias=FP32)
    for seed in range(3):
        check(monkeypatch, product, kernel, seed=seed)


@pytest.mark.parametrize("kernel", by_default(VARIANTS, [BFLOAT]), ids=lambda v: v.name)
def test_values_that_have_no_finite_scale(monkeypatch, kernel):
    """Groups of zeros; NaN and infinities, which do not count for a scale; subnormal and the
    largest numbers."""
    dtype = DTYPES[kernel.a]
    product = wide(14, 70, 400, dtype)
    a = product.a
    a[0], a[1, :128], a[2, 5], a[3, 140], a[4, 7] = 0.0, 0.0, torch.nan, -torch.inf, torch.inf
    a[4, 9], a[5, 256:384], a[6, 3] = torch.nan, torch.inf, torch.finfo(dtype).max
    subnormal = torch.finfo(dtype).smallest_normal / 4.0
    a[7], a[9, ::3] = max(subnormal, 2.0**-100), subnormal  # scales that are normal in fp32
    a[8, 1] = -torch.finfo(dtype).max
    found = check(monkeypatch, product, kernel)
    assert found[2].isnan().all() and found[4].isnan().all() and (found[0] == 0.0).all()
    assert found[3].isfinite().all() and not found[[1, 6, 8]].isnan().any()


@pytest.mark.parametrize("kernel", by_default(VARIANTS, [BFLOAT]), ids=lambda v: v.name)
def test_rows_of_a_wider_tensor(monkeypatch, kernel):
    """What lies beyond K is NaN; an address that TMA cannot read."""
    product = wide(9, 24, 144, DTYPES[kernel.a])
    for first in (0, 8, 3):
        a = torch.full((9, 160), torch.nan, dtype=product.a.dtype)
        a[:, first : first + 144] = product.a
        check(monkeypatch, product._replace(a=a[:, first : first + 144]), kernel)


@pytest.mark.parametrize("out_dtype", [FP16, E4M3])
def test_outputs(monkeypatch, out_dtype):
    check(monkeypatch, wide(11, 41, 160, BF16, out_dtype=out_dtype, bias=BF16), BFLOAT)


def test_a_call_takes_one_kernel_for_few_rows(monkeypatch):
    product = wide(9, 50, 272, BF16, out_dtype=BF16)
    with device().serving_cpu_tensors(monkeypatch):
        found = gemm.scaled_mm(product.a, product.b, scale_b=product.scale_b)
        assert hopper.choose(product) == BFLOAT
        assert device().report()["kernel"] == "flash8_gemm_small_m"
    assert_same(found, emulated(product))


def test_which_is_chosen():
    assert choose_variant("block", False, 64, 14336, 132, "bf16").name.endswith("_bf16_64x64")
    assert choose_variant("block", False, 16, 28672, 132, "fp16").name.endswith("_fp16_16x128")

"""Sound GEMM kernels pass their check, and serve; wrong ones fail it and do not."""

import pytest
import torch

import flash8
from defaults import by_default
from flash8.backends.hopper.gemm_variants import SHIPPED_GEMMS, GemmVariant
from flash8.backends.hopper.verify import gemm as check
from flash8.backends.hopper.verify import trust
from gemm_cases import assert_same, changed_text, emulated, make
from gemm_cases import device as gemm_device
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
OUTER, BLOCK = GemmVariant("outer", 128, 128), GemmVariant("block", 128, 128)
SMALL_M = GemmVariant("block", 16, 64, small_m=True)


def multiply(product, **options):
    a, b, scale_a, scale_b, bias, *_ = product
    return flash8.gemm.scaled_mm(a, b, scale_a, scale_b, bias=bias, **options)


@pytest.mark.parametrize("variant", by_default(SHIPPED_GEMMS, [OUTER, BLOCK, SMALL_M]))
def test_a_sound_kernel_passes(variant, checked):
    with checked():
        assert trust.find_fault(variant, CPU) is None


@pytest.mark.parametrize("variant", by_default(SHIPPED_GEMMS, [OUTER, BLOCK]))
def test_what_a_gpu_is_given_walks_many_tiles(variant, monkeypatch):
    """With 5 multiprocessors, as `gemm_cases` has them."""
    product = check.Draw(variant, CPU).of_more_tiles(5)
    m, n, _ = product.sizes
    assert -(-m // variant.block_m) * -(-n // variant.block_n) > 5
    with gemm_device().serving_cpu_tensors(monkeypatch):
        assert check.find_fault_of(variant, product) is None


@pytest.mark.parametrize(
    ("granularity", "m", "n", "kernel"),
    [
        ("row", 70, 50, "flash8_gemm"),
        ("1x128", 70, 50, "flash8_gemm"),
        ("1x128", 9, 50, "flash8_gemm_small_m"),
    ],
)
def test_a_sound_kernel_serves(granularity, m, n, kernel, checked):
    product = make(m, n, 400, granularity, bias=torch.bfloat16)
    want = emulated(product)
    with checked():
        found, said = told(lambda: multiply(product, out_dtype=torch.float32))
        assert device().report()["kernel"] == kernel
        out = torch.zeros(m, n)
        multiply(product, out=out)
    assert not said
    assert_same(found, want)
    assert_same(out, want)


#: Edits of the PTX, of the kernel that must not pass.
WRONG = {
    "a block is not scaled": (
        BLOCK,
        r"fma\.rn\.ftz\.f32\s+(%f\d+), %f\d+, (%f\d+), (%f\d+);",
        r"add.f32 \1, \2, \3;",
    ),
    "a bias too many": (OUTER, r"(add\.ftz\.f32|add\.rn\.ftz\.f32)", "sub.f32"),
    "a trap": (OUTER, r"\bret;", "trap; ret;"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_fails_and_the_portable_code_serves(name, checked):
    variant, pattern, new = WRONG[name]
    text = changed_text(variant, pattern, new)
    product = make(70, 50, 400, "1x128" if variant == BLOCK else "row", bias=torch.bfloat16)
    want = multiply(product)
    with checked(lambda _: text):
        have, said = told(lambda: multiply(product))
        _, again = told(lambda: multiply(product))
    assert len(said) == 1 and not again
    assert f"its kernel {variant.name} on cpu: " in said[0]
    assert torch.equal(have, want)

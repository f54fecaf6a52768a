"""Sound grouped GEMM kernels pass their check, and serve; wrong ones fail it and do not."""

import pytest
import torch

import flash8
from defaults import by_default
from flash8.backends.hopper.gemm_variants import SHIPPED_GROUPED_GEMMS, GemmVariant
from flash8.backends.hopper.verify import grouped_gemm as check
from flash8.backends.hopper.verify import trust
from gemm_cases import changed_text
from gemm_cases import device as gemm_device
from grouped_gemm_cases import assert_same, emulated, make, make_along_k
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
BLOCK = GemmVariant("block", 128, 128, grouped=True)
OUTER = GemmVariant("outer", 128, 128, grouped=True)
ALONG_K = GemmVariant("block", 128, 128, grouped_k=True)


def multiply(product, **options):
    a, b, scale_a, scale_b, offs, *_ = product
    return flash8.gemm.grouped_scaled_mm(a, b, scale_a, scale_b, offs, **options)


@pytest.mark.parametrize("variant", by_default(SHIPPED_GROUPED_GEMMS, [BLOCK, OUTER, ALONG_K]))
def test_a_sound_kernel_passes(variant, checked):
    with checked():
        assert trust.find_fault(variant, CPU) is None


OF_ROWS = [variant for variant in SHIPPED_GROUPED_GEMMS if variant.grouped]


@pytest.mark.parametrize("variant", by_default(OF_ROWS, [BLOCK]))
def test_what_a_gpu_is_given_walks_many_tiles(variant, monkeypatch):
    """With 5 multiprocessors, as `gemm_cases` has them."""
    product = check.Draw(variant, CPU).of_more_tiles_in_groups(5)
    groups, _, n, _ = product.sizes
    assert groups * -(-n // variant.block_n) > 5
    with gemm_device().serving_cpu_tensors(monkeypatch):
        assert check.find_fault_of(variant, product) is None


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_a_sound_kernel_serves(granularity, checked):
    product = make([3, 0, 37], 50, 400, granularity, beyond=2)
    want = emulated(product)
    with checked():
        found, said = told(lambda: multiply(product, out_dtype=torch.float32))
        assert device().report()["kernel"] == "flash8_gemm"
        out = torch.zeros(42, 50)
        multiply(product, out=out)
    assert not said
    assert_same(found, want)
    assert_same(out, want)


def test_a_sound_kernel_serves_groups_along_k(checked):
    product = make_along_k([3, 0, 37], 50, 40)
    want = emulated(product)
    with checked():
        found, said = told(lambda: multiply(product, out_dtype=torch.float32))
        assert device().report()["kernel"] == "flash8_gemm"
    assert not said
    assert_same(found, want)


#: Edits of the PTX, of the kernel that must not pass.
WRONG = {
    "the B of another group": (
        r"(cp\.async\.bulk\.tensor\.5d[^;]*\{%r\d+, %r\d+, (%r\d+), %r\d+), %r\d+\}",
        r"\1, \2}",
    ),
    "a block is not scaled": (
        r"fma\.rn\.ftz\.f32\s+(%f\d+), %f\d+, (%f\d+), (%f\d+);",
        r"add.f32 \1, \2, \3;",
    ),
    "a trap": (r"\bret;", "trap; ret;"),
}


#: The same with groups along K.
WRONG_ALONG_K = {
    "K of another group": (r"\bst\.shared\.v4\.u32\s+\[[^;]*;", ""),
    "a trap": (r"\bret;", "trap; ret;"),
}


@pytest.mark.parametrize("name", WRONG_ALONG_K)
def test_a_wrong_kernel_along_k_fails(name, checked):
    text = changed_text(ALONG_K, *WRONG_ALONG_K[name])
    with checked(lambda _: text):
        assert trust.find_fault(ALONG_K, CPU) is not None


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_fails_and_the_portable_code_serves(name, checked):
    text = changed_text(BLOCK, *WRONG[name])
    product = make([3, 0, 37], 50, 400)
    want = multiply(product)
    with checked(lambda _: text):
        have, said = told(lambda: multiply(product))
        _, again = told(lambda: multiply(product))
    assert len(said) == 1 and not again
    assert f"its kernel {BLOCK.name} on cpu: " in said[0]
    assert torch.equal(have, want)

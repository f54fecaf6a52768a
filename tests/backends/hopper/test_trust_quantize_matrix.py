"""Sound kernels that make operands of products pass their check; wrong ones fail it."""

import pytest
import torch

from defaults import by_default
from flash8 import gemm
from flash8.backends.hopper.quantize_matrix_variants import (
    SHIPPED_MATRIX_QUANTIZERS,
    QuantizeMatrixVariant,
)
from flash8.backends.hopper.verify import trust
from matrix_quantizer_cases import draw
from simulated_device import missing_compiler
from trust_cases import changed_quantizers, told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
KEPT = [QuantizeMatrixVariant("bf16", prologue) for prologue in ("none", "rms_norm", "silu_mul")]


@pytest.mark.parametrize("variant", by_default(SHIPPED_MATRIX_QUANTIZERS, KEPT))
def test_a_sound_kernel_passes(variant, checked):
    with checked():
        assert trust.find_fault(variant, CPU) is None


#: Edits of the prologues' arithmetic.
WRONG = {
    "none": ("matrix_row.cuh", "finite_magnitude(y[chunk][i])", "finite_magnitude(y[chunk][0])"),
    "rms_norm": ("matrix.cu", "add(mean, params.norm_eps)", "mean"),
    "silu_mul": ("matrix_row.cuh", "kLog2E = 1.44269504f", "kLog2E = 1.44f"),
}


@pytest.mark.slow
@pytest.mark.parametrize("prologue", WRONG)
def test_a_wrong_kernel_fails_and_the_portable_code_serves(prologue, checked, tmp_path):
    x, weight = draw(5, 136), draw(136)
    calls = {
        "none": lambda: gemm.quantize(x, "row"),
        "rms_norm": lambda: gemm.quantize_rms_norm(x, weight, granularity="row"),
        "silu_mul": lambda: gemm.quantize_silu_mul(x, x, granularity="row"),
    }
    want = calls[prologue]()
    with checked(changed_quantizers(tmp_path, *WRONG[prologue])):
        have, said = told(calls[prologue])
        _, again = told(calls[prologue])
    assert len(said) == 1 and not again
    assert f"its kernel {QuantizeMatrixVariant('bf16', prologue).name} on cpu: " in said[0]
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

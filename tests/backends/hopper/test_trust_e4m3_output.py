"""Kernels with an e4m3 output: sound ones pass their check, and wrong ones are told about."""

import re
from dataclasses import replace

import pytest
import torch

from defaults import by_default
from e4m3_output_cases import BF16, EPILOGUE, FP8, LARGEST_OF_TWO_LANES, ROW
from flash8 import gemm
from flash8.backends.hopper.verify import trust
from fp8_forward_cases import changed_ptx
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import changed_image, told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
OTHERS = (
    replace(FP8, pack_gqa=True),
    replace(FP8, scales="block", mask="none"),
    replace(FP8, head_dim=256, head_dim_v=256),
    replace(BF16, paged=True),
    replace(BF16, cache="e4m3"),
    replace(BF16, mask="none", cluster=True),
)


@pytest.mark.parametrize("variant", by_default(OTHERS, []))
def test_a_sound_kernel_passes(variant, checked):
    """Those that ship are among the others of test_trust.py."""
    with checked():
        assert trust.find_fault(variant, CPU) is None


SCALES = "head * E4m3Row<Config>::kScales"
EDITS = {
    "scales of the first head": ((EPILOGUE, SCALES, "0"), "DriverError"),  # a race
    "a scale twice as large": (
        (ROW, "scales[n] = scale;", "scales[n] = 2.0f * scale;"),
        "O is off",
    ),
    "chunks of another lane": ((ROW, "(first + lane)", "(first + (lane ^ 1))"), "O is off"),
    "the given scale multiplies": (
        (
            ROW,
            "quantize::reciprocal(checked_descale(*out_scale.given))",
            "checked_descale(*out_scale.given)",
        ),
        "O is off",
    ),
}


def image_of(name, tmp_path):
    if name == "an output of 16 bits":
        return lambda _: device().ptx(replace(BF16, out="wide"))
    if name == "the largest of two lanes":
        return lambda _: changed_ptx(BF16, *LARGEST_OF_TWO_LANES)
    return changed_image(tmp_path, EDITS[name][0])


WORDS = {
    "an output of 16 bits": "out_scale is given; this kernel writes o of 16 bits",
    "the largest of two lanes": "scales are not the largest value of their row by 448|O is off",
    **{name: words for name, (_, words) in EDITS.items()},
}


@pytest.mark.parametrize("name", by_default(WORDS, [x for x in WORDS if x not in EDITS]))
def test_a_wrong_kernel_fails_and_the_portable_code_serves(name, checked, tmp_path):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 70, 2, 128, generator=g).bfloat16() for _ in "qkv")

    def call():
        data, scale = gemm.quantize_attention(q, k, v, causal=True)
        return data.view(torch.uint8), scale

    want = call()
    with checked(image_of(name, tmp_path)):
        have, said = told(call)
        _, again = told(call)
    assert len(said) == 1 and not again
    assert f"its kernel {BF16.name} on cpu: " in said[0]
    assert re.search(WORDS[name], said[0]), said[0]
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_a_sound_kernel_serves(checked):
    q, k, v = (torch.randn(1, 20, 2, 128).bfloat16() for _ in "qkv")
    with checked():
        _, said = told(lambda: gemm.quantize_attention(q, k, v, causal=True))
        assert device().report()["kernel"] == "flash8_forward" and not said
        assert trust.has_passed(BF16)

"""Descales of 2^-126 on the FP8 forward kernel, on the simulated device. Their product is 0 in
fp32: every score is 0, and a hidden one is not NaN."""

from dataclasses import replace

import pytest
import torch

from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import check
from fp8_forward_cases import dense_call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

DENSE = ForwardVariant("e4m3", 128, 128, scales="head")
CAUSAL = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")


@pytest.mark.parametrize("variant", [DENSE, CAUSAL], ids=lambda v: v.mask)
def test_tiny_descales(variant):
    """More queries than keys where the mask is causal: some see none."""
    call = dense_call(variant, 1, 70, 40, 1, 1)
    tiny = {f"{x}_descale": torch.full_like(call.descales[f"{x}_descale"], 2.0**-126) for x in "qk"}
    check(variant, replace(call, descales={**call.descales, **tiny}), seeds=(0,))

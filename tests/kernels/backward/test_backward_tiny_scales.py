"""Scales near the smallest normal number, 2^-126, and below it: the device takes subnormal numbers
for 0, and 0 times the -inf of a hidden score would be NaN."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import backward_fp8_cases
from backward_cases import Problem, compare, draw, expected, launch, saved
from backward_launch import Gradients
from flash8.backends.hopper.backward_variants import BackwardVariant
from fp8_forward_cases import changed_sources
from simulated_device import missing_compiler
from tolerances import rel_l2

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal")
FP8 = replace(CAUSAL, fp8=True)
CAPPED = replace(CAUSAL, softcap=True)
SHAPE = (140, 150, 2, 1)  # ragged on both sides
SINKS = torch.tensor([0.5, -1.0])


def check(problem: Problem, got: Gradients) -> None:
    """dV is as with other scales, and dQ and dK are as small as they must be."""
    exact = expected(problem)
    assert rel_l2(got.dv, exact.dv) < 6e-3
    for name in ("dq", "dk"):
        assert getattr(got, name).double().abs().max() <= 2 * getattr(exact, name).abs().max()


def scaled(softmax_scale: float) -> Problem:
    options = {"softmax_scale": softmax_scale, "s_aux": SINKS, "with_dlse": True}
    return draw(CAUSAL, *SHAPE, batch=1, **options)


@pytest.mark.parametrize("softmax_scale", [1e-38, 2.0**-149])
def test_softmax_scale(softmax_scale):
    problem = scaled(softmax_scale)
    check(problem, launch(CAUSAL, saved(problem)))


@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
def test_descales(names):
    """The product of two descales and the scale is below 2^-149."""
    drawn = backward_fp8_cases.draw(FP8, *SHAPE, batch=1, means=False)
    descales = {
        name: torch.full_like(x, 2.0**-126) if name[0] in names else x
        for name, x in drawn.call.descales.items()
    }
    call = replace(drawn.call, descales=descales)
    problem = replace(drawn, call=call, wide=backward_fp8_cases.widened(call))
    check(problem, launch(FP8, saved(problem)))


@pytest.mark.slow
def test_the_least_softcap_of_a_call():
    problem = draw(CAPPED, *SHAPE, batch=1, softcap=1e-30)
    compare(problem, launch(CAPPED, saved(problem)))


@pytest.mark.slow
def test_scaling_hidden_scores_would_be_found(tmp_path: Path):
    """The mask before the scale."""
    scale = "subtract_lse(rows, shared, lse, first_query, scale, slope);"
    mask = "if constexpr (kMasked) {\n            hide(rows, shared, first_query);\n        }"
    edit = ("backward/probabilities.cuh", f"{scale}\n        {mask}", f"{mask}\n        {scale}")
    problem = scaled(1e-39)
    got = launch(CAUSAL, saved(problem), root=changed_sources(tmp_path, edit))
    with pytest.raises(AssertionError):
        check(problem, got)

"""flash8.distributed.attention with FP8 recipes on two and four processes."""

from dataclasses import replace

import pytest
import torch

from distributed_cases import RECIPES, Case, differences, expected, found_by, single
from distributed_faults import FP8_FAULTS
from process_group import Processes

#: Longer than a block, and windows that begin inside of one.
LENGTHS = (201, 0, 1, 147, 5)
CASES = [
    Case("head", recipe="head", sink=True),
    Case("head-four", recipe="head", ranks=4, layout="contiguous"),
    Case("tensor", recipe="tensor", ranks=4, window=(40, 0)),
    Case("smooth", recipe="smooth", bias=3.0),
    Case("block-window", recipe="block", window=(40, 0)),
    Case("block-smooth", recipe="block-smooth", ranks=4, bias=3.0, causal=False),
    Case("delayed", recipe="delayed", bias=1.0),
]
CASES = [replace(case, lengths=LENGTHS) for case in CASES]
ULYSSES = [
    replace(case, name=f"ulysses-{case.name}", method="ulysses", layout="zigzag") for case in CASES
]
RING = [
    replace(case, name=f"ring-{case.name}", method="ring", recipe=recipe)
    for case, recipe in zip(
        CASES, ("head", "head", "tensor16", "smooth", "block", "smooth", "delayed"), strict=True
    )
]
BOTH = [
    replace(case, name=f"both-{case.name}", method="ulysses+ring", ranks=4)
    for case in RING
    if case.recipe != "block"
]
MIXED = [
    Case("ulysses-mixed", recipe="head", method="ulysses", lengths=LENGTHS, mixed=True),
    Case("both-mixed", recipe="head", method="ulysses+ring", ranks=4, lengths=LENGTHS, mixed=True),
]
#: Rank 0 attends with some of its queries, rank 1 with all of them.
FLOAT64 = Case("ring-float64", recipe="head", method="ring", lengths=(1, 8), layout="contiguous")
FLOAT64 = replace(FLOAT64, dtype=torch.float64)
WIDE = [FLOAT64, replace(FLOAT64, name="both-float64", method="ulysses+ring", ranks=4)]


@pytest.fixture(scope="module")
def processes():
    started = Processes(4)
    yield started
    started.close()


@pytest.mark.parametrize("case", [*CASES, *ULYSSES, *RING, *BOTH, *MIXED, *WIDE], ids=str)
def test_the_error_is_that_of_one_process(processes, case):
    reference = expected(case)
    here = differences(found_by(processes, case), reference)
    there = differences(single(case), reference)
    assert all(here[name] <= 1.2 * there[name] + 1e-6 for name in here), (here, there)


@pytest.mark.parametrize("case", [case for case in ULYSSES if not case.bias], ids=str)
def test_scales_are_those_of_one_process(processes, case):
    """All tokens meet in one call, with the same e4m3 and the same descales. A mean that is taken
    off is summed in another order, which may round an element otherwise."""
    measured = differences(found_by(processes, case), single(case))
    assert all(value <= 1e-5 for value in measured.values()), measured


PLANTED = [
    (CASES[0], "amax not agreed on"),
    (ULYSSES[0], "amax not agreed on"),
    (RING[0], "scales stay behind"),
    (RING[3], "mean left out of dq"),
]


@pytest.mark.parametrize(("case", "fault"), PLANTED, ids=str)
def test_a_planted_fault_is_found(processes, case, fault):
    case = replace(case, fault=fault)
    reference = expected(case)
    here = differences(found_by(processes, case), reference)
    there = differences(single(case), reference)
    assert any(here[name] > 1.5 * there[name] for name in here), (here, there)


def test_every_recipe_and_fault_has_a_case():
    assert {fault for _, fault in PLANTED} == {*FP8_FAULTS}
    assert {case.recipe for case in [*CASES, *RING]} == {*RECIPES}

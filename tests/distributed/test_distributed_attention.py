"""flash8.distributed.attention on two and four processes against one, forward and backward."""

import pytest
import torch

from distributed_cases import (
    RAGGED,
    Case,
    attend,
    differences,
    expected,
    joined,
    single,
    with_dtype,
)
from distributed_faults import FAULTS
from process_group import Processes

#: |found - oracle| / |oracle|. The faults below are far beyond them.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}

SHAPES = [
    Case("packed"),
    Case("packed-four", ranks=4),
    Case("packed-contiguous", layout="contiguous"),
    Case("packed-contiguous-four", layout="contiguous", ranks=4),
    Case("dense", lengths=None, seqlen=40),
    Case("dense-odd", lengths=None, seqlen=29, ranks=4, layout="contiguous"),
    Case("one-token", lengths=(1,), ranks=4),
    Case("nothing", lengths=(0, 0, 5)),
]
OPTIONS = [
    Case("full", causal=False, ranks=4),
    Case("window-left", window=(9, 0)),
    Case("window-both", causal=False, window=(6, 4), ranks=4),
    Case("window-both-contiguous", causal=False, window=(20, 3), layout="contiguous"),
    Case("window-right-only", causal=False, window=(-1, 5), ranks=4),
    Case("window-left-only", causal=False, window=(3, -1)),
    Case("softcap", softcap=3.0),
    Case("sink", sink=True, ranks=4),
    Case("sink-window-mqa", sink=True, window=(12, 0), heads_kv=1),
    Case("head-dim-v", head_dim_v=24, heads_kv=4),
]
CASES = [*SHAPES, *OPTIONS]
SIXTEEN = [Case("packed"), Case("sink-window", sink=True, window=(12, 0), ranks=4)]


@pytest.fixture(scope="module")
def processes():
    started = Processes(4)
    yield started
    started.close()


def found_by(processes, case):
    return joined(case, processes.run(attend, case.ranks, case))


def assert_close(found, reference, tolerance):
    measured = differences(found, reference)
    assert all(value <= tolerance for value in measured.values()), measured


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_find_what_the_oracle_does(processes, case):
    found, reference = found_by(processes, case), expected(case)
    assert_close(found, reference, TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", SIXTEEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_lose_no_more_than_one_process_does(processes, case, dtype):
    case = with_dtype(case, dtype)
    reference = expected(case)
    here = differences(found_by(processes, case), reference)
    there = differences(single(case), reference)
    assert all(here[name] <= 1.5 * there[name] + 1e-6 for name in here), (here, there)


def test_float64_is_exact(processes):
    case = with_dtype(Case("float64", ranks=4, sink=True, window=(30, 0)), torch.float64)
    assert_close(found_by(processes, case), expected(case), TOLERANCES[torch.float64])


PLANTED = {
    "zigzag order swapped": Case("", fault="zigzag order swapped"),
    "dk not summed": Case("", fault="dk not summed"),
    "window not moved": Case("", causal=False, window=(6, 4), fault="window not moved"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(processes, fault):
    case = PLANTED[fault]
    found, reference = found_by(processes, case), expected(case)
    assert max(differences(found, reference).values()) > 1e3 * TOLERANCES[case.dtype]


def test_lengths_are_as_hostile_as_they_are_said_to_be():
    assert {0, 1, 2, 3, 37, 23} < {*RAGGED}

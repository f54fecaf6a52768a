"""flash8.distributed.attention on two and four processes against one, forward and backward."""

from dataclasses import replace

import pytest
import torch

from distributed_cases import (
    RAGGED,
    Case,
    differences,
    expected,
    found_by,
    random_case,
    single,
    with_dtype,
)
from distributed_faults import DECODE_FAULTS, FAULTS, FP8_FAULTS
from flash8.distributed.layout import Batch
from flash8.distributed.plan import ring_steps
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
RING = [
    Case("packed"),
    Case("packed-four", ranks=4, sink=True),
    Case("packed-contiguous-four", layout="contiguous", ranks=4),
    Case("dense-four", lengths=None, seqlen=29, ranks=4),
    Case("one-token", lengths=(1,), ranks=4, sink=True),
    Case("full", causal=False, ranks=4),
    Case("window-near", lengths=(64, 41), window=(9, 0), layout="contiguous", ranks=4),
    Case("window-left", window=(9, 0), ranks=4),
    Case("window-both", causal=False, window=(6, 4), ranks=4, sink=True),
    Case("window-both-contiguous", causal=False, window=(20, 3), layout="contiguous"),
    Case("window-right-only", causal=False, window=(-1, 5)),
    Case("window-left-only", causal=False, window=(3, -1), ranks=4),
    Case("softcap-mqa", softcap=3.0, heads_kv=1, head_dim_v=24),
    Case("large-logits", logits=400.0, dtype=torch.float64),
]
RING = [replace(case, name=f"ring-{case.name}", method="ring") for case in RING]
ULYSSES = [
    Case("packed"),
    Case("packed-four-sink", ranks=4, sink=True),  # two ranks share a KV head
    Case("contiguous-mqa", layout="contiguous", ranks=4, heads_kv=1, head_dim_v=24),
    Case("dense", lengths=None, seqlen=29),
    Case("one-token", lengths=(1,), ranks=4),
    Case("window-both", causal=False, window=(6, 4), ranks=4, softcap=3.0),
    Case("mixed-sink", sink=True, mixed=True),
]
ULYSSES = [replace(case, name=f"ulysses-{case.name}", method="ulysses") for case in ULYSSES]
BOTH = [
    Case("packed-sink", sink=True),
    Case("contiguous-mqa", layout="contiguous", heads_kv=1),
    Case("dense-window", lengths=None, seqlen=29, window=(9, 0)),
    Case("one-token", lengths=(1,), heads_kv=4),
    Case("full-softcap", causal=False, softcap=3.0),
    Case("mixed", mixed=True),
]
BOTH = [replace(case, name=f"both-{case.name}", method="ulysses+ring", ranks=4) for case in BOTH]
CASES = [*SHAPES, *OPTIONS, *RING, *ULYSSES, *BOTH]
SIXTEEN = [
    Case("packed"),
    Case("sink-window", sink=True, window=(12, 0), ranks=4),
    Case("ring", method="ring", ranks=4),
    Case("ring-sink-window", method="ring", sink=True, window=(12, 0)),
    Case("ulysses", method="ulysses", ranks=4),
    Case("both", method="ulysses+ring", ranks=4, sink=True),
]


@pytest.fixture(scope="module")
def processes():
    started = Processes(4)
    yield started
    started.close()


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
    """But for LSE's last bits: where a CPU has products of 16 bits, torch's exponentials of a part
    have 20, and only a whole with a sink is made of fp32."""
    case = with_dtype(case, dtype)
    reference = expected(case)
    here = differences(found_by(processes, case), reference)
    there = differences(single(case), reference)
    assert all(here[name] <= 1.5 * there[name] + 1e-5 for name in here), (here, there)


def test_float64_is_exact(processes):
    case = with_dtype(Case("float64", ranks=4, sink=True, window=(30, 0)), torch.float64)
    assert_close(found_by(processes, case), expected(case), TOLERANCES[torch.float64])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_any_call_is_right(processes, seed):
    case = random_case(seed)
    assert_close(found_by(processes, case), expected(case), 1e-10)


PLANTED = {
    "zigzag order swapped": Case("", fault="zigzag order swapped"),
    "dk not summed": Case("", fault="dk not summed"),
    "merged without maximum": Case(
        "", method="ring", logits=400.0, dtype=torch.float64, fault="merged without maximum"
    ),
    "sink applied twice": Case("", method="ring", sink=True, fault="sink applied twice"),
    "dk does not go home": Case("", method="ring", fault="dk does not go home"),
    "tokens by rank": Case("", method="ulysses", fault="tokens by rank"),
    "window not moved": Case("", causal=False, window=(6, 4), fault="window not moved"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(processes, fault):
    case = PLANTED[fault]
    found, reference = found_by(processes, case), expected(case)
    assert max(differences(found, reference).values()) > 1e3 * TOLERANCES[case.dtype]


def test_a_ring_with_a_window_takes_few_steps():
    near = next(case for case in RING if case.name == "ring-window-near")
    assert ring_steps(Batch(near.lengths, near.layout), near.ranks, near.window) == 2
    batch = Batch((64,), "contiguous")
    assert [ring_steps(batch, 4, (left, 0)) for left in (0, 1, 16, 17, 32, 33, 64)] == [
        *(1, 2, 2, 3, 3, 4, 4)
    ]
    assert ring_steps(batch, 4, (-1, 0)) == ring_steps(batch, 4, (1, 1)) == 4
    assert ring_steps(Batch((64,), "zigzag"), 4, (1, 0)) == 4


def test_every_fault_is_planted():
    assert {*PLANTED, *FP8_FAULTS, *DECODE_FAULTS} == {*FAULTS}


def test_lengths_are_as_hostile_as_they_are_said_to_be():
    assert {0, 1, 2, 3, 37, 23} < {*RAGGED}

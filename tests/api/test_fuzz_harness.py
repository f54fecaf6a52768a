"""A slice of the fuzzed calls of `tests/support/fuzz`; `make fuzz` makes a hundred thousand."""

import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch

import flash8
from fuzz import cpu, driver, harness
from repository import SUPPORT
from simulated_device import missing_compiler

RUN = SUPPORT / "run_fuzz.py"


def fuzz(*arguments: str) -> str:
    """What the command prints. In a process of its own, which has a limit of memory."""
    command = [sys.executable, str(RUN), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("leg", ["cpu", "driver"])
def test_a_slice_ends_right_or_refused(leg):
    said = fuzz("--leg", leg, "--calls", "600", "--seed", "70000000")
    assert "600 calls from seed 70000000" in said and " 0 faults" in said
    assert "hostile refused" in said and "hostile returned" in said


def test_a_fault_is_told_with_the_command_that_repeats_it():
    def odd(seed: int) -> str:
        assert seed % 2 == 0, f"{seed} is odd"
        return "even"

    tally = harness.run({"parity": (1.0, odd)}, range(10), most_faults=3)
    assert tally.verdicts == {"parity: even": 3, "parity: fault": 3}
    assert "python tests/support/run_fuzz.py --leg parity --seed 5 --calls 1" in str(
        tally.faults[-1]
    )


def test_a_call_that_hangs_is_a_fault(monkeypatch):
    monkeypatch.setattr(harness, "SLOW", 1)
    tally = harness.run({"endless": (1.0, lambda seed: time.sleep(30))}, range(1))
    assert "takes more than 1 seconds" in tally.faults[0].text


# ---- what the harness itself catches ----


def repeat(function, arguments):
    for argument in arguments:
        function(argument)


def raises(error):
    def function(x):
        raise error

    return function


@pytest.mark.parametrize("error", [RuntimeError("x"), OverflowError("x"), KeyError("x")])
def test_an_exception_that_is_not_documented_is_a_fault(error):
    with pytest.raises(AssertionError, match="function is not to raise this; x=3"):
        harness.attempt(raises(error), {"x": 3})


def test_a_documented_exception_and_a_lack_of_memory_are_none():
    assert harness.attempt(raises(ValueError("x")), {"x": 3})[0] == "refused"
    assert harness.attempt(lambda x: torch.empty(2**60), {"x": 3})[0] == "out of memory"


def test_a_refused_call_that_writes_is_a_fault():
    def function(x):
        x.zero_()
        raise ValueError("too late")

    with pytest.raises(AssertionError, match=r"it has changed \['x'\]"):
        harness.attempt(function, {"x": torch.ones(2)})


def test_bits_tell_zeros_and_types_apart():
    zero = torch.zeros(2)
    assert harness.bits(zero) != harness.bits(-zero) != harness.bits(zero.half())
    assert harness.bits(zero) == harness.bits(zero.clone())
    nan = torch.full((1, 3), torch.nan).t()
    assert harness.bits(nan) == harness.bits(nan.clone())


def test_another_result_of_a_correct_call_is_a_fault(monkeypatch):
    rng = random.Random(0)
    cpu.expect_right_bits(rng)
    attention = flash8.flash_attn_func

    def worse(*arguments, **options):
        found = attention(*arguments, **options)
        return tuple(x + 1e-6 for x in found) if isinstance(found, tuple) else found + 0.01

    monkeypatch.setattr(flash8, "flash_attn_func", worse)
    with pytest.raises(AssertionError, match="no longer gives the right bits"):
        repeat(cpu.expect_right_bits, [rng] * 30)


def test_another_launch_of_a_correct_call_is_a_fault():
    leg = driver.leg()
    right = dict(leg._right)
    try:
        for name, launches in right.items():
            (entry, parameters), *others = launches
            changed = bytes([parameters[0] ^ 1]) + parameters[1:]
            leg._right[name] = [(entry, changed), *others]
        with pytest.raises(AssertionError, match="launches something else after flash_attn"):
            repeat(leg, range(20))
    finally:
        leg._right.update(right)


def test_a_process_that_dies_is_a_fault(tmp_path):
    """A crash, too, names the call that it came from."""
    (tmp_path / "sitecustomize.py").write_text(
        "import random, os\n"
        "choices = random.Random.choices\n"
        "seen = []\n"
        "def dying(self, *given, **options):\n"
        "    seen.append(1)\n"
        "    return choices(self, *given, **options) if len(seen) < 40 else os._exit(9)\n"
        "random.Random.choices = dying\n"
    )
    command = [sys.executable, str(RUN), "--leg", "driver", "--calls", "99"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(
        r"driver \d+: the process ended with 9\n  python tests/support/run_fuzz", done.stdout
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_kernels_stand_what_no_host_has_looked_at():
    said = fuzz("--leg", "device", "--calls", "500")
    assert "hostile launched" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_groups_stand_what_no_host_has_looked_at():
    """Each product has the bits of the emulated tensor core."""
    said = fuzz("--leg", "groups", "--calls", "200")
    assert "groups: hostile launched" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_calls():
    """`make fuzz` makes ten times as many."""
    fuzz("--calls", "10000")

"""A slice of the fuzzed calls of `tests/fuzz`; `make fuzz` makes a hundred thousand."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "fuzz" / "run.py"


def fuzz(*arguments: str) -> str:
    """What the command prints. In a process of its own, which has a limit of memory."""
    command = [sys.executable, "-P", str(RUN), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("leg", ["cpu", "driver"])
def test_a_slice_ends_right_or_refused(leg):
    said = fuzz("--leg", leg, "--calls", "600", "--seed", "70000000")
    assert "600 calls from seed 70000000" in said and " 0 faults" in said
    assert "hostile refused" in said and "hostile returned" in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_calls():
    fuzz("--calls", "100000", "--workers", "2")

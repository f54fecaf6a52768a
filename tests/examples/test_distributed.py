"""The scripts of examples/distributed, each in two processes on the CPU."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from repository import ROOT

EXAMPLES = ROOT / "examples" / "distributed"
DOCUMENT = ROOT / "docs" / "training.md"
SCRIPTS = ("ddp", "fsdp2", "context_parallel", "megatron_thd", "ulysses")
#: Scripts that need a package which the tests do not install.
WITH_PACKAGES = {"deepspeed_ulysses": "deepspeed"}
RUN_SCRIPTS = """
import runpy, sys
folder, *scripts = sys.argv[1:]
sys.path.insert(0, folder)
for script in scripts:
    runpy.run_path(f"{folder}/{script}.py", run_name="__main__")
"""


def test_two_processes_do_what_one_does():
    """The scripts compare their results with one process and fail if they differ. One interpreter
    runs them all, for importing torch is most of the work."""
    told = run_scripts(SCRIPTS)
    falls = re.findall(r"loss (\S+) -> (\S+) under (\S+), two processes", told)
    assert [name for *_, name in falls] == ["DDP", "FSDP2", "FSDP2+CP"]


@pytest.mark.parametrize("script", WITH_PACKAGES)
def test_scripts_with_packages(script):
    if importlib.util.find_spec(WITH_PACKAGES[script]) is None:
        pytest.skip(f"{WITH_PACKAGES[script]} is not installed")
    run_scripts([script])


def run_scripts(scripts):
    """What they print, of which each tells how far it is from one process."""
    command = [sys.executable, "-c", RUN_SCRIPTS, str(EXAMPLES), *scripts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    differences = re.findall(r"largest difference from one process.*: \d", result.stdout)
    assert len(differences) == len(scripts)
    return result.stdout


def test_every_script_is_listed():
    runnable = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert runnable == {*SCRIPTS, *WITH_PACKAGES}
    assert all(f"{name}.py" in DOCUMENT.read_text() for name in runnable)

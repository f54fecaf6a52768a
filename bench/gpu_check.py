"""Everything that a Hopper GPU can tell about this checkout, in one command: `make gpu-check`.

Needs a GPU, nvcc and a Python with torch, pytest, numpy, cmake, pybind11 and scikit-build-core;
no network; the kernels want the CUTLASS headers in FLASH8_CUTLASS, unless pip has brought them.
Builds flash8 from the checkout into build/gpu, checks every shipped kernel against the portable
code (`flash8 check`), runs the GPU tests, with FLASH8_KERNELS off, auto and on, runs
compute-sanitizer on the small CUDA programs and on small calls of the kernels, settles the hardware
facts, and measures ceilings and attention beside every peer found. Each step leaves its own JSON;
the summary, with the outcome and seconds of every step and the table of the check, is
bench/results/gpu_check.json. A step that fails does not stop the others.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import environment
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
RESULTS = ROOT / "bench" / "results"
_ALL = 1000  # lines: `flash8 check` prints one for each kernel
_SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: GPU tests of one launch or two, for tools that slow kernels down a hundredfold.
_SMALL_TESTS = "packed_sequences or 113-203-True or (fp8_matches and 64-)"


@dataclass(frozen=True)
class Step:
    """One command and how it ended."""

    name: str
    command: list[str]
    status: int
    seconds: float
    tail: str


def run(name: str, *command: str, lines: int = 30, **variables: str) -> Step:
    """`lines`: how many of its last lines are kept."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    environ = {**os.environ, "PYTHONPATH": str(BUILD), "PYTHONUNBUFFERED": "1", **variables}
    start = time.monotonic()
    result = subprocess.run(
        command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    step = Step(
        name,
        list(command),
        result.returncode,
        round(time.monotonic() - start, 1),
        "\n".join(result.stdout.splitlines()[-lines:]),
    )
    print(step.tail, f"-- {name}: status {step.status}, {step.seconds} s", sep="\n", flush=True)
    return step


def steps() -> list[Step]:
    python = sys.executable
    facts = [python, "bench/hopper_facts/facts.py"]
    tests = [python, "-P", "-m", "pytest", "-q", "-m", "gpu", "tests"]
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    done = [
        run("build", *pip, "--no-build-isolation", "--upgrade", "--target", str(BUILD), "."),
        run("check", python, "-m", "flash8", "check", lines=_ALL),
        run("gpu tests on the portable code", *tests, FLASH8_KERNELS="off"),
        run("gpu tests", *tests, FLASH8_KERNELS="auto"),
        run("gpu tests on kernels", *tests, FLASH8_KERNELS="on"),
        run("hopper facts", *facts),
    ]
    if shutil.which("compute-sanitizer"):
        for tool in _SANITIZER_TOOLS:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *facts]
            done.append(run(f"compute-sanitizer {tool}", *command, "--quick"))
        small = [python, "-P", "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
        for tool in ("memcheck", "racecheck", "synccheck"):  # torch's own kernels fail initcheck
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *small]
            label = f"compute-sanitizer {tool} on kernels"
            done.append(run(label, *command, "-k", _SMALL_TESTS, FLASH8_KERNELS="on"))
    done.append(run("ceilings", python, "bench/bench_ceilings.py"))
    for name in ("attention", "quantize", "choices"):
        done.append(run(name, python, f"bench/bench_{name}.py", FLASH8_KERNELS="on"))
    return done


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 1
    done = steps()
    summary = {"environment": environment.describe(), "steps": [asdict(step) for step in done]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu_check.json").write_text(json.dumps(summary, indent=2) + "\n")
    for step in done:
        print(f"{'ok    ' if step.status == 0 else 'FAILED'} {step.name} ({step.seconds} s)")
    return int(any(step.status != 0 for step in done))


if __name__ == "__main__":
    sys.exit(main())

"""The steps of `make gpu-check`, what decides most first.

1. every shipped kernel against the portable code, each in a process of its own: one that hangs is
   named, and the others still run
2. the facts that the designs rest on (bench/hopper_facts)
3. gradients beside float64, and the bits of ordered ones over many runs
4. benchmarks beside peers
5. the other GPU tests
6. compute-sanitizer, where there is one

A lent GPU gives one run of ten minutes: limits are generous for one step, and their sum is more
than the budget. What comes late in the list gets what is left.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .pack import ROOT, Pack, gpu_tests
from .runner import Step

RESULTS = ROOT / "bench" / "results"
_FACTS = "bench/facts.py"
_DEVICE, _TORCH, _EXTENSION = "device", "torch", "extension"
#: Seconds. `registers` hangs on purpose, ten seconds for each exchange that does not end.
_FACT_LIMITS = {"arithmetic": 40, "wgmma": 25, "l2": 25, "rates": 15, "mma": 20, "registers": 65}
_BENCH_LIMITS = {
    "ceilings": 40,
    "attention": 150,
    "gemm": 40,
    "backward_choices": 40,
    "gemm_choices": 40,
    "quantize": 30,
    "choices": 50,
}
_BENCH_RESULTS = {
    "ceilings": "gpu_ceilings.json",
    "attention": "attention_cuda.json",
    "gemm": "gemm_cuda.json",
    "backward_choices": "backward_choices.json",
    "gemm_choices": "gemm_choices.json",
    "quantize": "quantize_gpu.json",
    "choices": "choices.json",
}
_GRADIENTS = "test_gpu_backward.py"
_SANITIZED_KERNELS = (
    "forward_bf16_d128_causal",
    "forward_e4m3_d128_causal_headscales",
    "forward_e4m3_d128_causal_vcolmajor_headscales",
    "quantize_cast_bf16_d128",
    "backward_bf16_d128_causal",
    "backward_bf16_d128_causal_deterministic",
)


def environ(pack: Pack, work: Path) -> dict[str, str]:
    """What every step has in its environment: the pack's package, and nothing is compiled."""
    path = [str(pack.site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "FLASH8_COMPILE": "never",
        "FLASH8_GPU_TESTS": str(pack.folder / "tests"),
        "FLASH8_CACHE": str(work / "cache"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def probe(pack: Pack) -> list[str]:
    """Asks whether the GPU answers: no torch, a second."""
    return [sys.executable, _FACTS, "device", f"--images={pack.facts}"]


def steps(pack: Pack, work: Path) -> list[Step]:
    return [
        *_setup(pack, work),
        *_check(pack),
        *_facts(pack, work),
        _test(_GRADIENTS, "on"),
        *_bench(),
        *_tests(),
        *_sanitizer(pack),
    ]


def _setup(pack: Pack, work: Path) -> Iterator[Step]:
    python = sys.executable
    device = tuple(probe(pack))
    yield Step(
        "setup", _DEVICE, (*device, f"--json={work}/device.json"), 30, result=work / "device.json"
    )
    extension = (python, "bench/gpu_extension.py", str(pack.folder))
    yield Step("setup", _EXTENSION, extension, 150, gpu=False, together=True)
    # It also takes torch from the disk, which the steps after it then find in memory.
    torch = (python, "bench/environment.py", str(work / "environment.json"))
    result = work / "environment.json"
    yield Step("setup", _TORCH, torch, 150, needs=(_DEVICE,), together=True, result=result)


def _check(pack: Pack) -> Iterator[Step]:
    for name in pack.kernels:
        command = (sys.executable, "-m", "flash8", "check", name)
        needs = (_TORCH, _EXTENSION)
        yield Step("check", f"check {name}", command, 40, least=12, needs=needs, together=True)


def _facts(pack: Pack, work: Path) -> Iterator[Step]:
    for name, limit in _FACT_LIMITS.items():
        result = work / f"facts_{name}.json"
        command = (sys.executable, _FACTS, name, f"--images={pack.facts}", f"--json={result}")
        yield Step("facts", f"facts {name}", command, limit, needs=(_DEVICE,), result=result)


def _bench() -> Iterator[Step]:
    for name, limit in _BENCH_LIMITS.items():
        result = RESULTS / _BENCH_RESULTS[name]
        command = (sys.executable, f"bench/bench_{name}.py")
        yield Step(
            "bench",
            f"bench {name}",
            command,
            limit,
            least=15,
            needs=(_TORCH,) if name == "ceilings" else (_TORCH, _EXTENSION),
            environ={"FLASH8_KERNELS": "on"},
            result=result,
        )


def _tests() -> Iterator[Step]:
    files = [path.name for path in gpu_tests() if path.name != _GRADIENTS]
    for mode in ("on", "auto", "off"):
        # The others say by themselves which kernels they want, or launch their own.
        for file in files if mode == "on" else ("test_gpu.py", "test_gpu_quantizer.py"):
            yield _test(file, mode)


def _test(file: str, mode: str) -> Step:
    # A test that hangs ends its process by itself, and says which one it was.
    options = (
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--timeout=40",
        "--timeout-method=thread",
    )
    return Step(
        "tests",
        f"tests/gpu/{file}, FLASH8_KERNELS={mode}",
        (sys.executable, "-P", "-m", "pytest", *options, f"tests/gpu/{file}"),
        70,
        least=20,
        needs=(_TORCH, _EXTENSION),
        environ={"FLASH8_KERNELS": mode},
    )


def _sanitizer(pack: Pack) -> Iterator[Step]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    quick = (sys.executable, _FACTS, *(name for name in _FACT_LIMITS if name != "registers"))
    quick += (f"--images={pack.facts}", "--quick")
    check = (sys.executable, "-m", "flash8", "check", *_SANITIZED_KERNELS)
    runs = [(kind, "facts", quick) for kind in ("memcheck", "racecheck", "synccheck", "initcheck")]
    runs += [(kind, "kernels", check) for kind in ("memcheck", "synccheck", "racecheck")]
    for kind, what, command in runs:
        yield Step(
            "sanitizer",
            f"compute-sanitizer {kind} on {what}",
            (tool, "--tool", kind, "--error-exitcode", "1", *command),
            60 if what == "facts" else 90,
            least=20,
            needs=(_DEVICE,) if what == "facts" else (_TORCH, _EXTENSION),
            absent="" if Path(tool).exists() else "compute-sanitizer is not installed",
        )


def rehearsed(planned: Sequence[Step], *, simulated: bool) -> list[Step]:
    """The same steps for a machine without a GPU: those that the simulated device can run do a few
    iterations there, of the others a stand-in says what they would do."""
    return [_rehearsed(step, simulated) for step in planned]


def _rehearsed(step: Step, simulated: bool) -> Step:
    runs = step.group == "facts" or step.name == _DEVICE
    if simulated and runs and step.name != "facts mma":  # mma.sync is not simulated
        return replace(step, command=(*step.command, "--quick", "--kind=ptx"))
    missing = [
        word
        for word in step.command
        if word.startswith(("bench/", "tests/")) and not (ROOT / word).exists()
    ]
    words = ("no such file:", *missing) if missing else ("would run:", *step.command)
    script = 'shift; echo "$@"; ' + ("exit 1" if missing else "exit 0")
    return replace(
        step, command=("/bin/sh", "-c", script, "sh", "--", *words), result=None, absent=""
    )

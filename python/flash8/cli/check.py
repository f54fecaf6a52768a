"""`flash8 check`: every shipped kernel against the portable code, on the GPU of this machine."""

import sys
import time
from collections.abc import Sequence

import torch

from flash8.backends.hopper import kernels as hopper_kernels
from flash8.backends.hopper import mode
from flash8.backends.hopper.verify import trust
from flash8.backends.hopper.verify.watchdog import KernelHangsError

_MAX_DETAIL = 400  # characters of what the compiler or the driver said


def kernels() -> dict[str, hopper_kernels.Variant]:
    """All shipped kernels by name, in the order in which they are checked."""
    return {variant.name: variant for variant in hopper_kernels.shipped()}


def list_kernels() -> int:
    """Prints their names."""
    print(*kernels(), sep="\n")
    return 0


def run(names: Sequence[str] = ()) -> int:
    """Prints a row for each kernel as soon as it is known. 1 if one fails, or nothing can be run.

    `names`: those to check; all by default. A kernel that faults leaves a context in which no other
    works: the first failure counts.
    """
    shipped = kernels()
    unknown = [name for name in names if name not in shipped]
    if unknown:
        print(
            f"flash8 check: no shipped kernel is called {', '.join(unknown)}; "
            "`flash8 check --list` names them",
            file=sys.stderr,
        )
        return 2
    reason = why_not()
    if reason is not None:
        print(f"flash8 check: nothing is checked: {reason}", file=sys.stderr)
        return 1
    return check(current_device(), [shipped[name] for name in names or shipped])


def why_not() -> str | None:
    """Why no kernel can be run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return mode.unfit(torch.cuda.current_device())


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def check(device: torch.device, variants: Sequence[hopper_kernels.Variant] | None = None) -> int:
    """Checks kernels on `device`, by default all shipped ones, and prints the table."""
    if variants is None:
        variants = list(kernels().values())
    width = max(len(variant.name) for variant in variants)
    print(f"{'kernel':{width}}  {'ms':>8}  found")
    print("-" * width, "-" * 8, "-" * 5, sep="  ")
    failed = 0
    for variant in variants:
        finding, milliseconds = _check(variant, device)
        failed += finding is not None
        detail = "ok" if finding is None else " ".join(finding.split())[:_MAX_DETAIL]
        print(f"{variant.name:{width}}  {milliseconds:8.1f}  {detail}", flush=True)
    print(f"{len(variants) - failed} of {len(variants)} kernels are ok on {_name(device)}")
    return int(failed > 0)


def _check(variant: hopper_kernels.Variant, device: torch.device) -> tuple[str | None, float]:
    """The finding and the milliseconds of the check, without those of compiling and loading."""
    try:
        for part in hopper_kernels.kernels_of(variant):
            hopper_kernels.kernel(part)
    except Exception as error:
        return f"{type(error).__name__}: {error}", 0.0
    start = time.perf_counter()
    try:
        finding = trust.find_fault(variant, device)
    except KernelHangsError:
        raise
    except Exception as error:  # of this moment, and so no fault of the kernel
        finding = f"{type(error).__name__}: {error}"
    return finding, (time.perf_counter() - start) * 1e3


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

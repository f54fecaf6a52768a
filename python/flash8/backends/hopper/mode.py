"""FLASH8_KERNELS: whether calls on CUDA tensors go to the compiled kernels, checked or not.

auto     on devices of compute capability 9.0, each kernel once it has passed its check there
require  the same, and a call that has kernels, but not for it or not here, is an error
on       on every device, unchecked; what goes wrong is raised
off      never
"""

import functools
import os
from typing import Literal, get_args

import torch

Mode = Literal["require", "auto", "on", "off"]
#: The compute capability that the kernels are compiled for: sm_90a runs on no other.
CAPABILITY = (9, 0)


class KernelRequiredError(RuntimeError):
    """FLASH8_KERNELS=require, and no kernel can serve a call that others like it have one for."""


@functools.cache
def kernels_mode() -> Mode:
    """Read once: reading the environment takes longer than everything else of a small check.

    Raises:
        ValueError: FLASH8_KERNELS is none of the four.
    """
    given = os.environ.get("FLASH8_KERNELS", "") or "auto"
    for mode in get_args(Mode):
        if given == mode:
            return mode  # type: ignore[no-any-return]
    raise ValueError(
        f"FLASH8_KERNELS is {given!r}; supported are 'require', 'auto', 'on' and 'off'"
    )


def fall_back(reason: str) -> None:
    """Called where the portable code is about to serve a call in the place of a kernel.

    Raises:
        KernelRequiredError: with FLASH8_KERNELS=require, so that no rank of a job is served by
            something else than the others, or is slower than they are, in silence.
    """
    if kernels_mode() == "require":
        raise KernelRequiredError(f"FLASH8_KERNELS is 'require', and no kernel serves: {reason}")


#: By device. No functools.cache, which torch.compile looks through, and warns of.
_served: dict[int, bool] = {}


def has_kernels(index: int) -> bool:
    """Whether calls on the CUDA device of this number are for kernels. Found out once."""
    served = _served.get(index)
    if served is None:
        served = _served[index] = why_not(index) is None
    return served


# A trace calls it, rather than to look into it. torch.compiler.assume_constant_result sets no more
# than this, but imports the compiler, which takes as long as torch itself.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(index: int) -> str | None:
    """Why no call on the CUDA device of this number is for kernels, or None."""
    mode = kernels_mode()
    if mode == "auto":
        return unfit(index)
    # Where kernels are required, a device that is not for them is found when a call wants one.
    return "FLASH8_KERNELS=off" if mode == "off" else None


def unfit(index: int) -> str | None:
    """Why the CUDA device of this number cannot run the kernels, or None."""
    # Fake tensors may lie on devices that this machine does not have.
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return f"torch sees no CUDA device {index}"
    found = torch.cuda.get_device_capability(index)
    if found == CAPABILITY:
        return None
    return (
        f"compiled kernels are for compute capability {_version(CAPABILITY)}, and "
        f"{torch.cuda.get_device_name(index)} has {_version(found)}"
    )


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))

"""Which backend serves which call.

A backend is a module with `forward`, `backward`, `append_kv`, `combine` and `combine_backward`
that fill tensors allocated by `flash8.ops`. The CPU backend has all of them; the Hopper backend
has the forward, for the calls that it does not refuse.
"""

import functools
import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash8.backends import cpu

if TYPE_CHECKING:
    from flash8.checks import Geometry
    from flash8.options import Options


@dataclass(frozen=True)
class Service:
    """One row of `flash8 info`: a kind of call, the backend that serves it, and why."""

    call: str
    backend: str
    reason: str


def backend_for(tensor: Tensor) -> ModuleType:
    """The backend that serves calls on `tensor`'s device."""
    if tensor.is_cuda:
        _tell_about_portable_cuda()
    return cpu


def forward_backend(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, options: "Options"
) -> ModuleType:
    """The backend that serves one forward call."""
    if not kernels_wanted(q):
        return backend_for(q)
    from flash8.backends import hopper

    reason = hopper.refusal(q, k, v, qv, options)
    if reason is None:
        return hopper
    tell_about_refusal(reason)
    return cpu


def kernels_wanted(tensor: Tensor) -> bool:
    """Whether calls on this tensor go to compiled kernels: FLASH8_KERNELS=on, on a GPU.

    They are proven on a simulated device only, so far, and therefore have to be asked for.
    """
    return tensor.is_cuda and _kernels_asked_for()


@functools.cache
def _kernels_asked_for() -> bool:
    """Read once: reading the environment takes longer than everything else of a small check."""
    return os.environ.get("FLASH8_KERNELS") == "on"


@functools.cache
def _tell_about_portable_cuda() -> None:
    warnings.warn(
        "CUDA tensors are served by the tiled PyTorch code of the CPU backend, which reads index "
        "tensors on the host; FLASH8_KERNELS=on lets the compiled forward kernels serve what they "
        "can (see `flash8 info`)",
        stacklevel=4,
    )


@functools.cache
def tell_about_refusal(reason: str) -> None:
    warnings.warn(
        f"flash8 has no compiled kernel for this call: {reason}; the tiled PyTorch code of the CPU "
        "backend serves it",
        stacklevel=5,
    )


def choose_num_splits(device: torch.device, geometry: "Geometry", options: "Options") -> int:
    """The number of KV splits for num_splits = 0. Without a GPU to fill, one."""
    return 1


def describe() -> list[Service]:
    """Which backend serves which call on this machine, and why."""
    portable = "tiled PyTorch, memory linear in seqlen"
    rows = [
        Service("CPU tensors, fp64 / fp32 / fp16 / bf16, forward and backward", "cpu", portable),
        Service("CPU tensors, float8_e4m3fn k and v, q of any dtype, forward", "cpu", portable),
        Service("CPU tensors, fp8_attention, forward and backward", "cpu", portable),
    ]
    if torch.cuda.is_available():
        rows += _describe_cuda(torch.cuda.get_device_name())
    else:
        reason = "torch sees no CUDA device"
        rows.append(Service("CUDA tensors, every call", "none", reason))
    return rows


def _describe_cuda(name: str) -> list[Service]:
    portable = f"{name}: the tiled PyTorch code runs there too"
    if not _kernels_asked_for():
        asked = f"{portable}; FLASH8_KERNELS=on lets kernels serve forwards and fp8.quantize"
        return [Service("CUDA tensors, every call", "cpu", asked)]
    kernel = f"{name}: FLASH8_KERNELS=on; compiled when first used"
    return [
        Service("CUDA tensors, fp16 / bf16 / e4m3 forward, no pages or splits", "hopper", kernel),
        Service("CUDA tensors, fp8.quantize of fp16 / bf16 / fp32", "hopper", kernel),
        Service("CUDA tensors, every other call", "cpu", portable),
    ]

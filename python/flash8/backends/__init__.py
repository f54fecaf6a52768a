"""Which backend serves which call.

A backend is a module with `forward`, `backward`, `jvp`, `append_kv`, `combine`, `combine_backward`
that fill tensors allocated by `flash8.ops`. The CPU backend has all of them; the Hopper backend
has the forward, for the calls that it does not refuse.
"""

import functools
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash8.backends import cpu
from flash8.backends.hopper import mode

if TYPE_CHECKING:
    from flash8.call.geometry import Geometry
    from flash8.call.options import Options


@dataclass(frozen=True)
class Service:
    """One row of `flash8 info`: a kind of call, the backend that serves it, and why."""

    call: str
    backend: str
    reason: str


def backend_for(tensor: Tensor) -> ModuleType:
    """The backend that serves calls on `tensor`'s device."""
    if tensor.is_cuda:
        _tell_about_portable_cuda(tensor.get_device())
    return cpu


def forward_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: "Options",
    out: Tensor | None = None,
) -> ModuleType:
    """The backend that serves one forward call. `out` is what the caller gave to be written.

    Raises:
        RuntimeError: the kernel has not been checked yet, and a CUDA graph is being captured.
        KernelRequiredError: FLASH8_KERNELS=require, and no kernel serves the call.
    """
    if not kernels_wanted(q):
        return backend_for(q)
    from flash8.backends import index_checks
    from flash8.backends.hopper import forward as hopper
    from flash8.backends.hopper.verify import trust

    index_checks.check_attention(q, k, options)
    reason = hopper.refusal(q, k, v, qv, options, out)
    if reason is not None:
        tell_about_refusal(reason)
    elif trust.is_trusted(hopper.choose(q, k, v, options), q.device):
        return hopper
    hopper.forget_served()
    return cpu


def kernels_wanted(tensor: Tensor) -> bool:
    """Whether calls on this tensor go to compiled kernels, as far as its device tells."""
    return tensor.is_cuda and mode.has_kernels(tensor.get_device())


@functools.cache
def _tell_about_portable_cuda(index: int) -> None:
    reason = mode.why_not(index) or "there is no compiled kernel for it (see `flash8 info`)"
    warnings.warn(
        "a call on CUDA tensors is served by the tiled PyTorch code of the CPU backend, which "
        f"reads index tensors on the host: {reason}",
        stacklevel=4,
    )


def tell_about_refusal(reason: str) -> None:
    """Called before the portable code serves a call that no kernel takes. Warns once of a reason.

    Raises:
        KernelRequiredError: FLASH8_KERNELS=require.
    """
    mode.fall_back(reason)
    _warn_of_refusal(reason)


@functools.cache
def _warn_of_refusal(reason: str) -> None:
    warnings.warn(
        f"flash8 has no compiled kernel for this call: {reason}; the tiled PyTorch code of the CPU "
        "backend serves it",
        stacklevel=6,
    )


def choose_num_splits(device: torch.device, geometry: "Geometry", options: "Options") -> int:
    """The number of KV splits for num_splits = 0. Without a GPU to fill, one."""
    return 1


def describe_mode() -> str:
    """What FLASH8_KERNELS is here, and what follows from it."""
    chosen = mode.kernels_mode()
    meaning = {
        "require": "as with auto; a call that no kernel can serve is an error",
        "auto": "on devices of compute capability 9.0, each once it has passed its check there",
        "on": "on every CUDA device, unchecked",
        "off": "never",
    }
    return f"{chosen} (FLASH8_KERNELS): {meaning[chosen]}"


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
    index, chosen = torch.cuda.current_device(), mode.kernels_mode()
    reason = mode.why_not(index)
    if reason is not None:
        return [Service("CUDA tensors, every call", "cpu", f"{portable}; {reason}")]
    if chosen == "require" and (missing := mode.unfit(index)) is not None:
        needs = f"FLASH8_KERNELS=require: an error, since {missing}"
        return [Service("CUDA tensors, forward and fp8.quantize", "none", needs)]
    checked = "unchecked" if chosen == "on" else "checked once per process"
    kernel = f"{name}: FLASH8_KERNELS={chosen}; compiled when first used, {checked}"
    return [
        Service("CUDA tensors, fp16 / bf16 / e4m3 forward, no pages or splits", "hopper", kernel),
        Service("CUDA tensors, fp8.quantize of fp16 / bf16 / fp32", "hopper", kernel),
        Service("CUDA tensors, every other call", "cpu", portable),
    ]

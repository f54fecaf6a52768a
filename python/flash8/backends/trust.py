"""Which kernels may serve calls: with FLASH8_KERNELS=auto those that pass a check on the device.

A kernel is checked once per process and device, when a call first wants it: small problems are run
by it and by the portable code, and the results compared (`check_forward`, `check_quantizer`).
A kernel that fails, or that cannot be had, is left alone from then on, and a warning says why.

The check leaves no trace: it draws from a generator of its own, records no gradients, and runs on
the stream of the call. Nothing in it takes the way of a public call, so it cannot ask for itself.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

from flash8.backends import mode
from flash8.backends.watchdog import KernelHangsError
from flash8.quantize_variants import QuantizeVariant
from flash8.variants import ForwardVariant

Variant = ForwardVariant | QuantizeVariant
_Place = tuple[str, torch.device]

#: What was found; None of a kernel that passed.
_findings: dict[_Place, str | None] = {}
_locks: dict[_Place, threading.Lock] = {}


def is_trusted(variant: Variant, device: torch.device) -> bool:
    """Whether calls on `device` may go to this kernel. The first to ask waits for its check.

    Raises:
        KernelHangsError: the check did not end.
        RuntimeError: it has not been checked yet, and a CUDA graph is being captured.
    """
    if mode.kernels_mode() != "auto":
        return True
    place = variant.name, device
    if place not in _findings:
        if _is_watched():
            return False  # the check would be seen: this call does without the kernel
        _check_once(variant, place)
    return _findings[place] is None


def find_fault(variant: Variant, device: torch.device) -> str | None:
    """What is wrong with a kernel on this device, found out now; None if nothing is.

    Raises:
        torch.OutOfMemoryError: which says nothing about the kernel.
        KernelHangsError: after which nothing else runs on this stream.
    """
    from flash8.backends import check_forward, check_quantizer

    with _undisturbed(device):
        try:
            if isinstance(variant, ForwardVariant):
                return check_forward.find_fault(variant, device)
            return check_quantizer.find_fault(variant, device)
        except (torch.OutOfMemoryError, KernelHangsError):
            raise
        except Exception as error:  # no compiler, a launch that fails, a variant that is missing
            return f"{type(error).__name__}: {error}"


def is_captured(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _check_once(variant: Variant, place: _Place) -> None:
    name, device = place
    if is_captured(device):
        raise RuntimeError(
            f"the kernel {name} has not been checked on {device} yet, which a stream that is being "
            "captured does not allow: call it once before capturing, or set FLASH8_KERNELS to on "
            "(no checks) or off (no kernels)"
        )
    with _locks.setdefault(place, threading.Lock()):
        if place in _findings:
            return
        finding = _findings[place] = find_fault(variant, device)
    if finding is not None:
        _tell(name, device, finding)


def _tell(name: str, device: torch.device, finding: str) -> None:
    warnings.warn(
        f"flash8 does not use its kernel {name} on {device}: {finding}; the tiled PyTorch code of "
        "the CPU backend serves the calls. FLASH8_KERNELS decides by hand: on uses every kernel "
        "without a check, off uses none",
        stacklevel=6,
    )


def _is_watched() -> bool:
    """Whether a mode, a transform or a trace would see the operations of a check."""
    return (
        _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
    )


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, what the caller has set for its own operations has no effect."""
    # A default device is a function mode, too.
    disabled = torch._C.DisableTorchFunction()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), disabled:
        debugged = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        if debugged:
            torch.cuda.set_sync_debug_mode("default")  # a check has to wait for what it compares
        try:
            yield
        finally:
            if debugged:
                torch.cuda.set_sync_debug_mode(debugged)

"""Which kernels may serve calls: with FLASH8_KERNELS=auto those that pass a check on the device.

A kernel is checked once per process and device, when a call first wants it: small problems are run
by it and by the portable code, and the results compared (`forward`, `decode`, `backward`,
`quantize`, `append`, `schedule`, `gemm`, `quantize_matrix`,
`qkv_projection`).
A kernel that fails, or that no compiler makes, is left alone from then on, and a warning says why.
What may pass (no memory, no room for the cache, a compiler that took too long) says nothing of the
kernel: the portable code serves for a while, and then the check is tried again. With
FLASH8_KERNELS=require both are errors.

The check leaves no trace: it draws from a generator of its own, records no gradients, and runs on
the stream of the call. Nothing in it takes the way of a public call, so it cannot ask for itself.
"""

import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from flash8 import _native
from flash8.backends.hopper import mode
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.kernels import Variant
from flash8.backends.hopper.qkv_variants import QkvVariant
from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
from flash8.backends.hopper.schedule_variants import ScheduleVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import watchdog
from flash8.backends.hopper.verify.watchdog import KernelHangsError
from flash8.call import observed
from flash8.compiler import CompileError, CompilerNotFoundError, MissingVariantError

_Place = tuple[str, torch.device]


class _Trouble(NamedTuple):
    """What kept a check from being made, and when it is tried again."""

    text: str
    pause: float  # seconds
    until: float  # of time.monotonic


#: What was found; None of a kernel that passed.
_findings: dict[_Place, str | None] = {}
_troubles: dict[_Place, _Trouble] = {}
#: Reentrant: a finalizer may make a call while a check runs in its thread.
_locks: dict[_Place, threading.RLock] = {}

#: Seconds before a second try; every further one waits twice as long as the one before, and none
#: takes more than a fiftieth of the time.
_FIRST_PAUSE, _LONGEST_PAUSE, _PAUSE_PER_SECOND = 1.0, 3600.0, 50.0
#: Errors of the driver that pass: no memory, a device in use, a capture in another thread.
_PASSING_CODES = frozenset({2, 46, 304, 600, 800, 802, *range(900, 911)})
_PASSING_WORDS = ("out of memory", "busy or unavailable", "captur")
#: Errors that come again whenever the same is tried.
_LASTING = (CompileError, CompilerNotFoundError, MissingVariantError, TypeError, ValueError)


def is_trusted(variant: Variant, device: torch.device) -> bool:
    """Whether calls on `device` may go to this kernel. The first to ask waits for its check.

    Raises:
        KernelHangsError: the check did not end.
        RuntimeError: it has not been checked yet, and a CUDA graph is being captured.
        KernelRequiredError: FLASH8_KERNELS=require, and the kernel has failed.
    """
    chosen = mode.kernels_mode()
    if chosen not in ("auto", "require"):
        return True
    place = variant.name, device
    if place in _findings:
        reason = _findings[place]
    elif chosen == "require" and device.type == "cuda" and (missing := mode.unfit(device.index)):
        reason = missing
    elif observed.are_operations_observed():
        # This call does without the kernel.
        reason = "it is not checked yet, and a mode, a transform or a trace would see the check"
    else:
        reason = _check(variant, place)
    if reason is not None:
        mode.fall_back(f"{variant.name} on {device}: {reason}")
    return reason is None


def is_settled(variant: Variant, device: torch.device) -> bool:
    """Whether `is_trusted` knows its answer without a check."""
    return mode.kernels_mode() not in ("auto", "require") or (variant.name, device) in _findings


def has_passed(variant: Variant) -> bool:
    """Whether this kernel may serve calls by now, on some device; asks for no check."""
    if mode.kernels_mode() not in ("auto", "require"):
        return True
    return any(name == variant.name and found is None for (name, _), found in _findings.items())


def find_fault(variant: Variant, device: torch.device) -> str | None:
    """What is wrong with a kernel on this device, found out now; None if nothing is.

    Raises:
        KernelHangsError: after which nothing else runs on this stream.
        Exception: of whatever kind, which says nothing about the kernel and may pass.
    """
    from flash8.backends.hopper.verify import append as check_append
    from flash8.backends.hopper.verify import backward as check_backward
    from flash8.backends.hopper.verify import decode as check_decode
    from flash8.backends.hopper.verify import decode_append as check_decode_append
    from flash8.backends.hopper.verify import forward as check_forward
    from flash8.backends.hopper.verify import forward_e4m3 as check_forward_e4m3
    from flash8.backends.hopper.verify import gemm as check_gemm
    from flash8.backends.hopper.verify import grouped_gemm as check_grouped_gemm
    from flash8.backends.hopper.verify import qkv_projection as check_qkv_projection
    from flash8.backends.hopper.verify import quantize as check_quantizer
    from flash8.backends.hopper.verify import quantize_matrix as check_matrix_quantizer
    from flash8.backends.hopper.verify import schedule as check_schedule

    with undisturbed(device):
        try:
            if isinstance(variant, ForwardVariant):
                if variant.out == "e4m3":
                    return check_forward_e4m3.find_fault(variant, device)
                return check_forward.find_fault(variant, device)
            if isinstance(variant, DecodeVariant):
                if variant.append:
                    return check_decode_append.find_fault(variant, device)
                return check_decode.find_fault(variant, device)
            if isinstance(variant, BackwardVariant):
                return check_backward.find_fault(variant, device)
            if isinstance(variant, AppendVariant):
                return check_append.find_fault(variant, device)
            if isinstance(variant, ScheduleVariant):
                return check_schedule.find_fault(variant, device)
            if isinstance(variant, GemmVariant):
                if variant.grouped or variant.grouped_k:
                    return check_grouped_gemm.find_fault(variant, device)
                return check_gemm.find_fault(variant, device)
            if isinstance(variant, QkvVariant):
                return check_qkv_projection.find_fault(variant, device)
            if isinstance(variant, QuantizeMatrixVariant):
                return check_matrix_quantizer.find_fault(variant, device)
            return check_quantizer.find_fault(variant, device)
        except Exception as error:
            if not _lasts(error):
                raise
            return _describe(error)


def _lasts(error: Exception) -> bool:
    """Whether an error is a fault of the kernel, or of what makes it, that no waiting mends."""
    # torch's AcceleratorError has the runtime's code, which is the driver's.
    code = getattr(error, "code" if isinstance(error, _native.DriverError) else "error_code", None)
    if code is not None:
        return code not in _PASSING_CODES
    # A kernel has faulted, as a torch without that class says it.
    text = str(error)
    faulted = text.startswith("CUDA error") and not any(words in text for words in _PASSING_WORDS)
    return isinstance(error, _LASTING) or faulted


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def is_captured(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _check(variant: Variant, place: _Place) -> str | None:
    """Why not to use a kernel that has not been checked yet, or None."""
    name, device = place
    _refuse_hung(device)
    if is_captured(device):
        raise RuntimeError(
            f"the kernel {name} has not been checked on {device} yet, which a stream that is being "
            "captured does not allow: call it once before capturing, or set FLASH8_KERNELS to on "
            "(no checks) or off (no kernels)"
        )
    lock = _locks.setdefault(place, threading.RLock())
    before = _troubles.get(place)
    # Nobody waits for a second try: the portable code serves meanwhile.
    if not lock.acquire(blocking=before is None):
        return before and before.text
    try:
        _refuse_hung(device)  # found out while this thread waited
        if place in _findings:
            return _findings[place]
        trouble = _troubles.get(place)
        required = mode.kernels_mode() == "require"
        if trouble is not None and time.monotonic() < trouble.until and not required:
            return trouble.text
        return _try(variant, place, required)
    finally:
        lock.release()


def _refuse_hung(device: torch.device) -> None:
    if device in watchdog.hung:
        raise KernelHangsError(watchdog.hung[device])


def _try(variant: Variant, place: _Place, required: bool) -> str | None:
    """Makes the check and keeps what was found, or when to try again."""
    name, device = place
    began = time.monotonic()
    try:
        finding = find_fault(variant, device)
    except KernelHangsError as error:
        watchdog.hung[device] = str(error)
        raise
    except Exception as error:
        if required:
            raise
        return _postpone(variant, place, _describe(error), time.monotonic() - began)
    _findings[place] = finding
    _troubles.pop(place, None)
    if finding is not None:
        _warn(
            f"flash8 does not use its kernel {name} on {device}: {finding}; {_instead(variant)} "
            "the calls."
        )
    return finding


def _instead(variant: Variant) -> str:
    if isinstance(variant, DecodeVariant) and variant.append:
        return "an append in a launch of its own, and attention over it, serve"
    return "the tiled PyTorch code of the CPU backend serves"


def _postpone(variant: Variant, place: _Place, text: str, took: float) -> str:
    before = _troubles.get(place)
    pause = _FIRST_PAUSE if before is None else 2.0 * before.pause
    pause = min(max(pause, _PAUSE_PER_SECOND * took), _LONGEST_PAUSE)
    _troubles[place] = _Trouble(text, pause, time.monotonic() + pause)
    if before is None or before.text != text:
        name, device = place
        _warn(
            f"flash8 cannot check its kernel {name} on {device} now: {text}; {_instead(variant)} "
            f"the calls, and it is tried again in {pause:.3g} s."
        )
    return text


def _warn(text: str) -> None:
    warnings.warn(
        f"{text} FLASH8_KERNELS decides by hand: on uses every kernel without a check, off uses "
        "none, require makes this an error",
        stacklevel=7,
    )


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, what the caller has set for its own operations has no effect."""
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        observed.without_function_modes(),
    ):
        debugged = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        if debugged:
            torch.cuda.set_sync_debug_mode("default")  # a check has to wait for what it compares
        try:
            yield
        finally:
            if debugged:
                torch.cuda.set_sync_debug_mode(debugged)

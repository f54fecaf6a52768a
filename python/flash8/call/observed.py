"""Whether a mode, a transform or a tracer of torch is active: one place asks.

Torch's public functions are asked where it has one that is quick. Other questions have private
names only. If a torch lacks one of those, `COMPLETE` is False and every answer is the careful one:
then each call goes through its torch op, which is slower and always right.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

try:
    from torch._C import (
        DisableTorchFunction,
        _are_functorch_transforms_active,
        _dispatch_tls_is_dispatch_key_included,
        _is_any_autocast_enabled,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
        _parse_dispatch_key,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack

    #: Whether this torch has every private name that is asked here.
    COMPLETE = hasattr(forward_ad, "_current_level")
    #: By its name it takes 20 times as long to ask for.
    _VMAP_MODE: Any = _parse_dispatch_key("VmapMode")
except ImportError:
    COMPLETE = False


def is_observed() -> bool:
    """Whether a call has to go through its torch op, for somebody to see it there: a mode, a
    transform of torch.func, forward-mode AD, a trace or torch.compile."""
    return (
        is_compiling()
        or not COMPLETE
        or _len_torch_function_stack() > 0
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or _is_tracing()
    )


#: Types of tensors of which nobody overrides what an op does.
PLAIN = (Tensor, torch.nn.Parameter)


def is_unseen(first: Tensor, *others: Tensor | None) -> bool:
    """Whether nobody sees if a call on these tensors goes through its op: plain CPU tensors, no
    mode, transform, trace or profiler."""
    return (
        first.is_cpu
        and not is_observed()
        and not is_profiled()
        and type(first) in PLAIN
        and all(x is None or type(x) in PLAIN for x in others)
        and not is_batched()
    )


def is_batched() -> bool:
    """Whether tensors may be many under one name, as for `is_grads_batched=True` of autograd."""
    return bool(_dispatch_tls_is_dispatch_key_included(_VMAP_MODE))


def are_operations_observed() -> bool:
    """The same for torch operations which nobody differentiates, `without_function_modes`."""
    return (
        not COMPLETE
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _is_tracing()
    )


def may_carry_tangents() -> bool:
    """Whether a tensor may carry a tangent, which none of its attributes tells.

    A trace (of torch.compile, say) enters levels that Python does not know of.
    """
    return (
        not COMPLETE
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
    )


def tangent_of(x: Tensor) -> Tensor | None:
    """The tangent that x carries, if any."""
    try:
        tangent: Tensor | None = forward_ad.unpack_dual(x, level=0).tangent
    except RuntimeError:  # torch.vmap maps over it, and the op asks below
        return None
    return tangent


def is_transformed() -> bool:
    """Whether a transform of torch.func is active. torch.compile follows this name; to it the stack
    of interpreters seems never empty."""
    return not COMPLETE or _are_functorch_transforms_active()


def _may_be_profiled() -> bool:
    return True


def _is_autocast_on() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


#: Whether a profiler may want to know of a call.
is_profiled: Callable[[], bool] = _profiler_enabled if COMPLETE else _may_be_profiled
#: Whether autocast is on for CPU or CUDA tensors: asked of every call, and twice as quick this way.
is_autocast_on: Callable[[], bool] = _is_any_autocast_enabled if COMPLETE else _is_autocast_on


@contextmanager
def without_function_modes() -> Iterator[None]:
    """Inside, no function mode sees anything. A default device is one, too."""
    with DisableTorchFunction():
        yield

"""Forward calls like one before, on the Hopper kernels: not checked, planned or dispatched again.

A call without gradients is known by the types, sizes, strides and devices of its tensors and by its
options, with their types: everything that the checks, the choice of a kernel and its parameters
look at, but for addresses. The first one takes the whole way and leaves its plan here. A call that
is none such, or that a mode, a transform or a trace watches, takes the whole way every time.

This is the host's hot path, a few microseconds: it says things twice rather than loop over them.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from flash8 import backends
from flash8.float8 import E4M3
from flash8.options import Options

Key = tuple[Any, ...]
_MOST_PLANS = 4096
_ADDRESS_UNIT = 16  # bytes: what TMA reads from


class _Remembered(NamedTuple):
    plan: Any  # of the Hopper backend
    out_like: Tensor  # one element, expanded to O's shape
    lse_like: Tensor


_remembered: dict[Key, _Remembered] = {}


def key_of(
    q: Any, k: Any, v: Any, qv: Any, s_aux: Any, out: Any, options: Options, window_size: Any
) -> Key | None:
    """What a call is known by; None if it has to go the whole way. All arguments may be raw."""
    if is_compiling():
        return None
    if not (
        type(q) is type(k) is type(v) is Tensor
        and not (q.is_neg() or k.is_neg() or v.is_neg())
        and backends.kernels_wanted(q)
    ):
        return None
    q_descale, k_descale, v_descale, k_mean, v_mean, v_channels = options[:6]
    cu_q, cu_k, longest_q, longest_k = options[6:10]
    used_q, used_k, leftpad, pages, rows, slopes, seed = options[10:17]
    if not (
        (qv is s_aux is out is q_descale is k_descale is v_descale is k_mean is v_mean is None)
        and v_channels is None
        and (used_q is used_k is leftpad is pages is rows is slopes is seed is None)
        and type(window_size) is tuple
    ):
        return None
    if _is_watched(q, k, v):
        return None
    scalars = (longest_q, longest_k, *options[17:], *window_size)
    registry = _hopper()._registry()
    try:
        tensors: Key = (
            *(q.dtype, q.device, q.shape, q.stride()),
            *(k.dtype, k.device, k.shape, k.stride()),
            *(v.dtype, v.device, v.shape, v.stride()),
        )
        if cu_q is cu_k is None:
            return registry, *tensors, *scalars, *map(type, scalars)
        for ends in (cu_q, cu_k):
            if ends is not None:
                if not (type(ends) is Tensor and ends.is_contiguous()):
                    return None
                tensors = (*tensors, ends.dtype, ends.device, ends.shape, ends.stride())
    except RuntimeError:  # a sparse or nested tensor has no strides
        return None
    return registry, *tensors, *scalars, *map(type, scalars), cu_q is None, cu_k is None


def run(key: Key, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    """(O, LSE) of a call that is like one before, or None."""
    try:
        found = _remembered.get(key)
    except TypeError:  # an option that has no hash: the checks will say what it is
        return None
    if found is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % _ADDRESS_UNIT != 0:
        return None
    out, lse = empty_like(found.out_like), empty_like(found.lse_like)
    _hopper().launch(found.plan, q, k, v, out, lse, options.cu_seqlens_q, options.cu_seqlens_k)
    return out, lse


def remember(key: Key, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Called after a call has succeeded, with its checked options."""
    hopper = _hopper()
    if q.dtype == E4M3 or hopper.refusal(q, k, v, None, options) is not None:
        return
    *batch, rows, heads, _ = q.shape
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device="meta")
    lse = torch.empty((*batch, heads, rows), dtype=torch.float32, device="meta")
    given = {name: getattr(options, name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    indices = {name: x for name, x in given.items() if x is not None}
    # empty_like of them is the quickest way to an empty tensor of a shape.
    patterns = [torch.empty(1, dtype=x.dtype, device=q.device).expand(x.shape) for x in (out, lse)]
    if not all(empty_like(pattern).is_contiguous() for pattern in patterns):
        return
    if len(_remembered) >= _MOST_PLANS:
        _remembered.clear()
    planned = hopper.plan(q, k, v, indices, options, out, lse)
    _remembered[key] = _Remembered(planned, *patterns)


@functools.cache
def _hopper() -> ModuleType:
    from flash8.backends import hopper

    return hopper


def _is_watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd, a mode, a functorch transform or a trace has to see the op."""
    return bool(
        (is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
    )

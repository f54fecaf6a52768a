"""Forward calls like one before, on the Hopper kernels: not checked, planned or dispatched again.

A call is known by the types, sizes, strides and devices of its tensors and by its options, with
their types: everything that the checks, the choice of a kernel and its parameters look at, but for
addresses. The first one takes the whole way and leaves its plan here;
`python/native/plan_cache/plan_cache.cpp` serves the others. A call that is none such, or that a
mode, a transform or a trace watches, takes the whole way every time. Autograd gets a node of its
own for what was launched already.

This is the host's hot path, a few microseconds.
"""

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch.autograd.profiler import record_function

from flash8 import backends
from flash8.backends import index_checks
from flash8.call.observed import is_observed, is_profiled
from flash8.call.options import Options
from flash8.ops.autograd import Launched

if TYPE_CHECKING:
    from flash8 import _native

_MOST_PLANS = 4096
#: From here on options are numbers that are checked and normalised: a plan holds the result.
_TENSOR_OPTIONS = Options._fields.index("dropout_p")


#: A call as the caller made it, ScaledTensors taken apart: (q, k, v, qv, s_aux, out), the options
#: and window_size. Nothing in it has to be valid.
Call = tuple[tuple[Any, Any, Any, Any, Any, Any], Options, Any]


def run(call: Call, return_lse: bool) -> Any:
    """What a call like one before returns; None for any other, and nothing was done then."""
    inputs, options, _ = call
    if not _may_be_launched(inputs[0]):
        return None
    launch = _plan_cache().run
    if is_profiled():
        launch = record_function("flash8::forward")(launch)
    done = launch(_hopper().kernels.registry(), *call, return_lse, is_grad_enabled())
    if done is None:
        return None
    out, lse, numbers = done
    if numbers is not None:
        q, k, v, _, s_aux, _ = inputs
        checked = (*options[:_TENSOR_OPTIONS], *numbers)
        out, lse = Launched.apply(q, k, v, s_aux, (out, lse), checked)
    return (out, lse) if return_lse else out


def insert(call: Call, options: Options, out: Tensor, lse: Tensor) -> None:
    """Called after a call has succeeded, with its checked options and what it returned."""
    if not _may_be_launched(call[0][0]):
        return
    hopper = _hopper()
    planned = hopper.forward.take_served(out)
    if planned is None or _plan_cache().contains(hopper.kernels.registry(), *call):
        return
    out_like, lse_like = _like(out), _like(lse)
    if not (empty_like(out_like).is_contiguous() and empty_like(lse_like).is_contiguous()):
        return
    _plan_cache().insert(
        hopper.kernels.registry(),
        *call,
        kernel=planned.kernel,
        device=planned.device,
        sm_margin=options.sm_margin,
        dynamic_schedule=planned.dynamic_schedule,
        params=planned.call,
        out_like=out_like,
        lse_like=lse_like,
        note=options[_TENSOR_OPTIONS:],
        most_plans=_MOST_PLANS,
    )


def _like(x: Tensor) -> Tensor:
    """One element that empty_like takes for a tensor of x's shape, and that keeps no x alive."""
    return _one_element(x.dtype, x.device).expand(x.shape)


@functools.cache
def _one_element(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, dtype=dtype, device=device)


@functools.cache
def _plan_cache() -> "_native.PlanCache":
    return new_plan_cache(getattr(Tensor, "__dlpack_c_exchange_api__", None))


def new_plan_cache(exchange_api: object | None) -> "_native.PlanCache":
    """A memory of calls. Without torch's DLPack table, which an older torch lacks, it reads tensors
    by their attributes."""
    from flash8 import _native

    hopper = _hopper()
    return _native.PlanCache(
        exchange_api=exchange_api,
        tensor=Tensor,
        parameter=torch.nn.Parameter,
        empty_like=empty_like,
        current_stream=hopper.streams.current_stream,
        tile_count=hopper.streams.get_tile_count,
        option_names=Options._fields,
    )


class _Hopper(NamedTuple):
    """Modules of the Hopper backend, which need the extension and are imported when a call does."""

    forward: ModuleType
    kernels: ModuleType
    streams: ModuleType


@functools.cache
def _hopper() -> _Hopper:
    from flash8.backends.hopper import forward, kernels, streams

    return _Hopper(forward, kernels, streams)


def _may_be_launched(q: Any) -> bool:
    """Whether the call is for kernels, and no mode, transform or trace has to see the op."""
    return (
        not is_observed()
        and isinstance(q, Tensor)
        and backends.kernels_wanted(q)
        and not index_checks.wanted()
    )

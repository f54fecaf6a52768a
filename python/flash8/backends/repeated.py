"""Forward calls like one before, on the Hopper kernels: not checked, planned or dispatched again.

A call is known by the types, sizes, strides and devices of its tensors and by its options, with
their types: everything that the checks, the choice of a kernel and its parameters look at, but for
addresses. The first one takes the whole way and leaves its plan here; `python/native/recall.cpp`
does the others. A call that is none such, or that a mode, a transform or a trace watches, takes
the whole way every time. Autograd gets a node of its own for what was launched already.

This is the host's hot path, a few microseconds.
"""

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, empty_like, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from flash8 import backends, checks
from flash8.autograd import Launched
from flash8.options import Options

if TYPE_CHECKING:
    from flash8 import _native

_MOST_PLANS = 4096
#: Behind these, options are numbers, which a plan holds in their checked form.
_TENSOR_OPTIONS = Options._fields.index("dropout_p")


#: A call as the caller made it, ScaledTensors taken apart: (q, k, v, qv, s_aux, out), the options
#: and window_size. Nothing in it has to be valid.
Call = tuple[tuple[Any, Any, Any, Any, Any, Any], Options, Any]


def run(call: Call, return_lse: bool) -> Any:
    """What a call like one before returns; None for any other, and nothing was done then."""
    if is_compiling():
        return None
    inputs, options, window = call
    if not _may_be_launched(inputs[0]):
        return None
    scope = _hopper()._registry()
    done = _recall().run(scope, inputs, options, window, return_lse, is_grad_enabled())
    if done is None:
        return None
    out, lse, numbers = done
    if numbers is not None:
        q, k, v, _, s_aux, _ = inputs
        checked = (*options[:_TENSOR_OPTIONS], *numbers)
        out, lse = Launched.apply(q, k, v, s_aux, (out, lse), checked)
    return (out, lse) if return_lse else out


def remember(call: Call, options: Options) -> None:
    """Called after a call has succeeded, with its checked options."""
    if is_compiling():
        return
    q, k, v, qv, s_aux, out = call[0]
    if not _may_be_launched(q):
        return
    hopper = _hopper()
    scope = hopper._registry()
    if hopper.refusal(q, k, v, qv, options) is not None or _recall().knows(scope, *call):
        return
    *batch, rows, heads, _ = q.shape
    lse = torch.empty((*batch, heads, rows), dtype=torch.float32, device="meta")
    if out is None:
        shape = (*q.shape[:-1], options.head_dim_v(v))
        out = torch.empty(shape, dtype=checks.output_dtype(q), device="meta")
    with torch.no_grad():
        planned = hopper.plan(q, k, v, s_aux, options, out, lse)
    out_like, lse_like = (_pattern(x, q.device) for x in (out, lse))
    if not (empty_like(out_like).is_contiguous() and empty_like(lse_like).is_contiguous()):
        return
    _recall().remember(
        scope,
        *call,
        kernel=planned.kernel,
        device=planned.device,
        sm_margin=options.sm_margin,
        draws_tiles=planned.draws_tiles,
        params=planned.call,
        out_like=out_like,
        lse_like=lse_like,
        note=options[_TENSOR_OPTIONS:],
        most_plans=_MOST_PLANS,
    )


def _pattern(x: Tensor, device: torch.device) -> Tensor:
    """One element on `device` that empty_like takes for a tensor of x's shape."""
    return torch.empty(1, dtype=x.dtype, device=device).expand(x.shape)


@functools.cache
def _recall() -> "_native.Recall":
    return new_recall(getattr(Tensor, "__dlpack_c_exchange_api__", None))


def new_recall(exchange_api: object | None) -> "_native.Recall":
    """A memory of calls. Without torch's DLPack table, which an older torch lacks, it reads tensors
    by their attributes."""
    from flash8 import _native

    hopper = _hopper()
    return _native.Recall(
        exchange_api=exchange_api,
        tensor=Tensor,
        parameter=torch.nn.Parameter,
        empty_like=empty_like,
        current_stream=hopper.current_stream,
        tile_count=hopper.get_tile_count,
        option_names=Options._fields,
    )


@functools.cache
def _hopper() -> ModuleType:
    from flash8.backends import hopper

    return hopper


def _may_be_launched(q: Any) -> bool:
    """Whether the call is for kernels, and no mode, transform or trace has to see the op."""
    return (
        isinstance(q, Tensor)
        and backends.kernels_wanted(q)
        and not _len_torch_dispatch_stack()
        and not _len_torch_function_stack()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and _get_tracing_state() is None
    )

"""The plan cache: forward calls on the Hopper kernels that are checked and planned once.

The key of a call is its arguments by name: of a tensor type, sizes, strides and device, of anything
else type and value. That is all that the checks, the choice of a kernel and its parameters look at,
but for addresses. `find` launches by the plan of a key (`python/native/plan_cache/plan_cache.cpp`).
On a miss the call is checked, and `launch` plans it, launches it and keeps the plan. Neither goes
through the torch op, so neither is asked where a mode, a transform or a trace watches. Autograd
gets a node of its own for what has been launched.

`find` is the host's hot path, a few microseconds.
"""

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd.graph import increment_version
from torch.autograd.profiler import record_function

from flash8 import backends
from flash8.backends import index_checks
from flash8.call.observed import PLAIN, is_observed, is_profiled
from flash8.call.options import Arguments, Options, WithoutTensors, without_tensors
from flash8.ops import planned
from flash8.ops.autograd import Launched
from flash8.ops.outputs import empty_lse, empty_out

if TYPE_CHECKING:
    from flash8 import _native
    from flash8.backends.protocol import Forward

_OP = "flash8::forward"  # what profilers call a launch


def may_launch(q: Any) -> bool:
    """Whether a call with this q is for kernels, nobody has to see the torch op, and nobody looks
    at its indices. It is `planned.may_launch` and one more, without the time of another call."""
    return (
        isinstance(q, Tensor)
        and not is_observed()
        and backends.kernels_wanted(q)
        and not index_checks.wanted()
    )


def find(arguments: Arguments, return_lse: bool) -> Any:
    """A hit: what the call returns, launched. None on a miss, and nothing was done."""
    if not may_launch(arguments["q"]):
        return None
    run = _plan_cache().run
    if is_profiled():
        run = record_function(_OP)(run)
    done = run(planned.hopper().kernels.registry(), arguments, return_lse, is_grad_enabled())
    if done is None:
        return None
    out, lse, options = done
    if options is not None:
        out, lse = _with_node(arguments, out, lse, options)
    return (out, lse) if return_lse else out


def backend_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor | None,
) -> "Forward | None":
    """After a miss: the backend that serves the call, which is asked for once. None where the torch
    op has to find it: a subclass of Tensor may call the op on other tensors, of its own, and so may
    who watches."""
    tensors = [x for x in (q, k, v, qv, s_aux, out, *options) if isinstance(x, Tensor)]
    if not may_launch(q) or any(type(x) not in PLAIN for x in tensors):
        return None
    with torch.no_grad():
        return backends.forward_backend(q, k, v, qv, options, out)


def launch(
    arguments: Arguments, options: Options, return_lse: bool, backend: "Forward | None"
) -> Any:
    """After a miss: plans the call, launches it, keeps the plan and returns what the call does.
    `options` are its own, checked, and `backend` is `backend_of` it. None where that is not the
    forward kernel, and nothing was done."""
    if backend is None or backend is not planned.hopper().forward:
        return None
    hopper, cache = planned.hopper(), _plan_cache()
    registry = hopper.kernels.registry()
    if not cache.has_key(registry, arguments):
        return None
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    s_aux, out = arguments.get("s_aux"), arguments.get("out")
    profiled = record_function(_OP) if is_profiled() else contextlib.nullcontext()
    with torch.no_grad(), profiled:
        if out is None:
            out = empty_out(q, v, options)
        lse = empty_lse(q)
        plan = hopper.forward.plan_and_launch(q, k, v, s_aux, options, out, lse)
    if arguments.get("out") is not None:
        increment_version((out,))
    kept = without_tensors(options)
    out_like, lse_like = planned.like(out), planned.like(lse)
    if planned.make_contiguous((out_like, lse_like)):
        cache.insert(
            registry,
            arguments,
            kernel=plan.kernel,
            device=plan.device,
            sm_margin=options.sm_margin,
            dynamic_schedule=plan.dynamic_schedule,
            params=plan.call,
            out_like=out_like,
            lse_like=lse_like,
            options=kept,
            most_plans=planned.MOST_PLANS,
        )
    if is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, s_aux)):
        # Those that the launch reads: the caller's may be int64, or an int.
        made = {name: getattr(options, name) for name in kept.tensors}
        out, lse = _with_node({**arguments, **made}, out, lse, kept)
    return (out, lse) if return_lse else out


def _with_node(arguments: Arguments, out: Tensor, lse: Tensor, options: WithoutTensors) -> Any:
    """O and LSE of a launch as outputs of a node."""
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    return Launched.apply(q, k, v, arguments.get("s_aux"), (out, lse), arguments, options)


@functools.cache
def _plan_cache() -> "_native.PlanCache":
    return new_plan_cache(planned.own_exchange_api())


def new_plan_cache(exchange_api: object | None) -> "_native.PlanCache":
    """An empty one."""
    from flash8 import _native

    return _native.PlanCache(
        **planned.functions(exchange_api)._asdict(),
        tile_count=planned.hopper().streams.get_tile_count,
    )

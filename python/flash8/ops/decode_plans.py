"""The plan cache of calls over a KV cache: those of the decode kernel, checked and planned once.

The key of a call is the arguments of `flash_attn_with_kvcache` as they were given, by name: of a
tensor type, sizes, strides and device, of anything else type and value. `run` launches by the plan
of a key (`python/native/plan_cache/decode_cache.cpp`). On a miss the call is checked, and `launch`
plans it, launches it and keeps the plan.

A call that appends launches that first, and its plan has both. Calls that autograd has to know of,
or whose kernels read copies, have no plan: those with lengths that are an int or not int32, say.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd.graph import increment_version
from torch.autograd.profiler import record_function

from flash8 import backends
from flash8.call.observed import is_profiled
from flash8.call.options import Arguments, Options
from flash8.ops import plan_cache, planned
from flash8.ops.outputs import empty_lse, empty_out

if TYPE_CHECKING:
    from flash8 import _native
    from flash8.backends.hopper import append

#: What `Options` and `flash_attn_with_kvcache` call the same arguments.
CACHE_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens",
    "leftpad_k": "cache_leftpad",
    "kv_batch_idx": "cache_batch_idx",
}
_OP = "flash8::forward"  # what profilers call a launch


def run(q: Any) -> Callable[..., tuple[Tensor, Tensor | None] | Arguments]:
    """What to call with the arguments of a call, by name. On a hit it launches and gives O and LSE,
    or None for that; on a miss it has done nothing and gives the arguments, as a dict."""
    if not plan_cache.may_launch(q):
        return dict
    run = cache().run
    return record_function(_OP)(run) if is_profiled() else run


def as_cache_call(arguments: Arguments, return_lse: bool) -> Arguments:
    """The arguments of `flash_attn_varlen_func` over pages by the names that a plan knows."""
    given = {CACHE_NAMES.get(name, name): x for name, x in arguments.items()}
    return {**given, "return_softmax_lse": return_lse}


def launch(
    arguments: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor | None,
    options: Options,
    appended: "append.Launched | None" = None,
) -> tuple[Tensor, Tensor] | None:
    """After a miss: plans the call, launches it, keeps the plan, and gives O and LSE. What follows
    `arguments` is made of them, and checked; `appended` has been launched before. None where no
    decode kernel serves the call, or autograd has to know of it, and nothing was done."""
    if not plan_cache.may_launch(q):
        return None
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    if is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    hopper = planned.hopper()
    if not cache().has_key(arguments):
        return None
    profiled = record_function(_OP) if is_profiled() else contextlib.nullcontext()
    with torch.no_grad(), profiled:
        if backends.forward_backend(q, k, v, qv, options, out) is not hopper.decode:
            return None
        if out is None:
            out = empty_out(q, v, options)
        lse = empty_lse(q)
        metadata = arguments.get("scheduler_metadata")
        plan = hopper.decode.plan_and_launch(q, k, v, s_aux, options, out, lse, qv, metadata)
    if arguments.get("out") is not None:
        increment_version((out,))
    out_like, lse_like = planned.like(out), planned.like(lse)
    tickets = plan.workspace["tickets"] // 4
    if planned.make_contiguous((out_like, lse_like)) and tickets <= hopper.streams.MANY_TICKETS:
        cache().insert(
            arguments,
            kernel=plan.kernel,
            device=plan.device,
            sm_margin=plan.sm_margin,
            params=plan.call,
            out_like=out_like,
            lse_like=lse_like,
            partial_bytes=plan.workspace["partials"],
            returns_lse=arguments["return_softmax_lse"],
            append=None if appended is None else _plan_of(appended),
            most_plans=planned.MOST_PLANS,
        )
    return out, lse


def _plan_of(appended: "append.Launched") -> "_native.AppendPlan":
    from flash8 import _native

    rotated = None if appended.rotated is None else planned.like(appended.rotated)
    return _native.AppendPlan(appended.launches, planned.like(appended.lengths), rotated)


@functools.cache
def no_splits(device: torch.device) -> Tensor:
    """The results of splits where there are none."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.float32, device=device)


@functools.cache
def cache() -> "_native.DecodeCache":
    return new_cache(planned.own_exchange_api())


def new_cache(exchange_api: object | None) -> "_native.DecodeCache":
    """An empty one."""
    from flash8 import _native

    hopper = planned.hopper()
    return _native.DecodeCache(
        **planned.functions(exchange_api)._asdict(),
        kernels=hopper.kernels,
        is_grad_enabled=is_grad_enabled,
        workspace=hopper.streams.decode_workspace,
    )

"""The plan cache of calls over a KV cache: those of the decode kernel, checked and planned once.

The key of a call is the arguments of `flash_attn_with_kvcache` as they were given, by name: of a
tensor type, sizes, strides and device, of anything else type and value. `run` launches by the plan
of a key (`python/native/plan_cache/decode_cache.cpp`). On a miss the call is checked, and `launch`
plans it, launches it and keeps the plan.

A call that appends few keys is one launch, of a decode kernel that takes them (`decode_append.py`);
another launches the append first, and its plan has both. Calls that autograd has to know of,
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

from flash8.call.observed import is_profiled
from flash8.call.options import Arguments, Options
from flash8.ops import plan_cache, planned
from flash8.ops.outputs import empty_lse, empty_out

if TYPE_CHECKING:
    from flash8 import _native
    from flash8.backends.hopper import append
    from flash8.backends.hopper.decode import Plan
    from flash8.backends.hopper.decode_append import NewRows
    from flash8.backends.hopper.decode_variants import DecodeVariant
    from flash8.backends.protocol import Forward

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
    backend: "Forward | None",
    appended: "append.Launched | None" = None,
    new: "NewRows | None" = None,
) -> tuple[Tensor, Tensor] | None:
    """After a miss: plans the call, launches it, keeps the plan, and gives O and LSE. What follows
    `arguments` is made of them, and checked, and `backend` is `plan_cache.backend_of` them;
    `appended` has been launched before, `new` is to be appended by the same launch. None where no
    decode kernel serves the call, or autograd has to know of it, and nothing was done."""
    if not plan_cache.may_launch(q):
        return None
    if new is None and backend is not planned.hopper().decode:
        return None
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    if is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    hopper = planned.hopper()
    if not cache().has_key(arguments):
        return None
    profiled = record_function(_OP) if is_profiled() else contextlib.nullcontext()
    with torch.no_grad(), profiled:
        variant = None
        if new is not None and (variant := _appending(q, k, v, qv, options, out, new)) is None:
            return None
        if out is None:
            out = empty_out(q, v, options)
        lse = empty_lse(q)
        metadata = arguments.get("scheduler_metadata")
        inputs = (q, k, v, s_aux, options, out, lse, qv, metadata)
        plan = hopper.decode.plan_and_launch(*inputs, variant, new)
    if arguments.get("out") is not None:
        increment_version((out,))
    if new is not None:
        increment_version((k, v))
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
            append=_append_plan(plan, appended, new),
            most_plans=planned.MOST_PLANS,
        )
    return out, lse


def launch_with_new_keys(
    arguments: Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor | None,
    options: Options,
    new: "NewRows | None",
) -> tuple[Tensor, Tensor] | None:
    """`launch` of a call by a kernel that appends, too; None without new rows for one."""
    if new is None:
        return None
    return launch(arguments, q, k, v, qv, s_aux, out, options, None, None, new)


def _appending(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: Options,
    out: Tensor | None,
    new: "NewRows",
) -> "DecodeVariant | None":
    """The kernel that appends and attends, if there is one that can be had and is trusted. Two
    launches do without it: nothing is checked for it while a CUDA graph is captured."""
    from flash8.backends.hopper import decode_append, kernels
    from flash8.backends.hopper.verify import trust

    variant = decode_append.choose(q, k, v, qv, options, out, new)
    if variant is None:
        return None
    if not trust.is_settled(variant, q.device) and trust.is_captured(q.device):
        return None
    usable = kernels.is_available(variant) and trust.is_trusted(variant, q.device)
    return variant if usable else None


def _append_plan(
    plan: "Plan", appended: "append.Launched | None", new: "NewRows | None"
) -> "_native.AppendPlan | None":
    """What a call appends, by a launch ahead or within that of `plan`."""
    from flash8 import _native

    if new is not None:
        return _native.AppendPlan([(None, plan.call.append)], None, None)
    if appended is None:
        return None
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

"""The plan cache of the backward: gradients of calls that have been checked and planned once.

The key of a call is what the forward saved, what comes in (dO, dLSE) and the options: of tensors
type, sizes, strides and device, of anything else type and value. `find` launches by the plan of a
key (`python/native/plan_cache/backward_cache.cpp`). On a miss the torch op serves the call, and
`keep` keeps the plan by which the Hopper backend has launched it.

Calls whose kernels read copies have no plan: those with a dO that is expanded, sinks that are not
fp32, or smooth_k, whose mean is made anew. So have calls without dO.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, are_deterministic_algorithms_enabled
from torch.autograd.profiler import record_function

from flash8.call.observed import is_profiled
from flash8.call.options import Options
from flash8.ops import planned

if TYPE_CHECKING:
    from flash8 import _native
    from flash8.backends.hopper.backward import Plan

_OP = "flash8::backward"  # what profilers call the launches

#: q, k, v, qv, s_aux, O, LSE, and the options of some names.
Saved = tuple[Tensor | None, ...]
#: Of q, k, v and s_aux.
Found = tuple[Tensor, Tensor, Tensor, Tensor | None]


def find(
    saved: Saved,
    dout: Tensor | None,
    dlse: Tensor | None,
    options: Options,
    names: tuple[str, ...] = (),
) -> Found | None:
    """A hit: the gradients, launched. None on a miss, and nothing was done. What `names` are of
    the options is behind the seven tensors in `saved`, and None in `options`."""
    if not planned.may_launch(saved[0]):
        return None
    run = cache().run
    if is_profiled():
        run = record_function(_OP)(run)
    return run(
        planned.hopper().kernels.registry(),
        saved,
        (dout, dlse),
        options,
        names,
        are_deterministic_algorithms_enabled(),
    )


def keep(
    plan: "Plan", saved: Saved, dout: Tensor | None, dlse: Tensor | None, options: Options
) -> None:
    """After a miss that has gone by this plan. `options` has its tensors."""
    q, k, v, *_ = saved
    if not planned.may_launch(q) or q is None or k is None or v is None:
        return
    likes = planned.like(q), planned.like(k), planned.like(v)
    if not planned.make_contiguous(likes):
        return
    cache().insert(
        planned.hopper().kernels.registry(),
        saved,
        (dout, dlse),
        options,
        (),
        are_deterministic_algorithms_enabled(),
        kernels=plan.kernels,
        device=plan.device,
        params=plan.call,
        gradients_like=likes,
        dsinks_like=None if plan.dsinks is None else planned.like(plan.dsinks),
        workspace_like=_workspace_like(plan.held[-1]),
        most_plans=planned.MOST_PLANS,
    )


def _workspace_like(workspace: Tensor) -> Tensor:
    """With room to begin at a multiple of the unit."""
    from flash8 import _native

    size = workspace.numel() + _native.WORKSPACE_UNIT
    return planned.without_memory((size,), torch.uint8, workspace.device)


@functools.cache
def cache() -> "_native.BackwardCache":
    return new_cache(planned.own_exchange_api())


def new_cache(exchange_api: object | None) -> "_native.BackwardCache":
    """An empty one."""
    from flash8 import _native

    return _native.BackwardCache(
        **planned.functions(exchange_api)._asdict(), field_names=Options._fields
    )

"""The plan cache of `scaled_mm`: products on the Hopper kernel that are checked and planned once.

The key of a call is its arguments by name: of a tensor type, sizes, strides and device, of anything
else type and value. `find` launches by the plan of a key
(`python/native/plan_cache/gemm_cache.cpp`). On a miss the call is checked, and `launch` plans it,
launches it and keeps the plan. Neither goes through the torch op, so neither is asked where a mode,
a transform or a trace watches.
"""

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.autograd.profiler import record_function

from flash8.call.observed import is_profiled
from flash8.call.options import Arguments
from flash8.call.scaled_mm import OUT_DTYPES, Product
from flash8.ops import gemm, planned

if TYPE_CHECKING:
    from flash8 import _native

_OP = "flash8::scaled_mm"  # what profilers call a launch
#: A key has no dtypes, but for those of tensors.
_DTYPES = {dtype: number for number, dtype in enumerate(OUT_DTYPES)}


def arguments_of(
    a: Any,
    b: Any,
    scale_a: Any,
    scale_b: Any,
    bias: Any,
    scale_result: Any,
    out_dtype: Any,
    out: Any,
    use_fast_accum: Any,
) -> Arguments | None:
    """Those of a call, by name; None where it is not for plans."""
    if not planned.may_launch(a):
        return None
    if isinstance(bias, Tensor) and bias.requires_grad and not torch.is_grad_enabled():
        bias = bias.detach()  # a layer's parameter
    number = None
    if out_dtype is not None:
        number = _DTYPES.get(out_dtype) if isinstance(out_dtype, torch.dtype) else None
        if number is None:
            return None
    return {
        "a": a,
        "b": b,
        "scale_a": scale_a,
        "scale_b": scale_b,
        "bias": bias,
        "scale_result": scale_result,
        "out_dtype": number,
        "out": out,
        "use_fast_accum": use_fast_accum,
    }


def find(arguments: Arguments) -> Tensor | None:
    """A hit: the output, launched. None on a miss, and nothing was done."""
    run = cache().run
    if is_profiled():
        run = record_function(_OP)(run)
    found: Tensor | None = run(planned.hopper().kernels.registry(), arguments)
    return found


def launch(arguments: Arguments, product: Product, out: Tensor | None) -> Tensor | None:
    """After a miss: plans the call, launches it, keeps the plan and gives the output. `product` is
    the call, checked. None where no kernel serves it, or a gradient would be recorded, and nothing
    was done."""
    hopper = planned.hopper()
    registry = hopper.kernels.registry()
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*product, out)
    ):
        return None
    if not cache().has_key(registry, arguments) or not gemm.is_for_kernels(product):
        return None
    from flash8.backends.hopper import gemm as backend

    profiled = record_function(_OP) if is_profiled() else contextlib.nullcontext()
    with torch.no_grad(), profiled:
        found = gemm.empty_out(product) if out is None else out
        plan = backend.plan_and_launch(backend.choose(product), product, found)
    if out is not None:
        increment_version((out,))
    like = planned.like(found)
    if planned.make_contiguous((like,)):
        cache().insert(
            registry,
            arguments,
            kernel=plan.kernel,
            device=plan.device,
            params=plan.params,
            out_like=like,
            most_plans=planned.MOST_PLANS,
        )
    return found


@functools.cache
def cache() -> "_native.GemmCache":
    return new_cache(planned.own_exchange_api())


def new_cache(exchange_api: object | None) -> "_native.GemmCache":
    """An empty one."""
    from flash8 import _native

    return _native.GemmCache(**planned.functions(exchange_api)._asdict())

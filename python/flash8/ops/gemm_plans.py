"""The plan cache of `scaled_mm`: products on the Hopper kernel that are checked and planned once.
`grouped_gemm_plans.py` keeps those of `grouped_scaled_mm` in it too.

The key of a call is its arguments by name: of a tensor type, sizes, strides and device, of anything
else type and value. `find` launches by the plan of a key
(`python/native/plan_cache/gemm_cache.cpp`). On a miss the call is checked, and `launch` plans it,
launches it and keeps the plan. Neither goes through the torch op, so neither is asked where a mode,
a transform or a trace watches.
"""

import contextlib
import functools
from types import ModuleType
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
    split_k: Any,
) -> Arguments | None:
    """Those of a call, by name; None where it is not for plans."""
    if not planned.may_launch(a) or not has_number(out_dtype):
        return None
    if isinstance(bias, Tensor) and bias.requires_grad and not torch.is_grad_enabled():
        bias = bias.detach()  # a layer's parameter
    return {
        "a": a,
        "b": b,
        "scale_a": scale_a,
        "scale_b": scale_b,
        "bias": bias,
        "scale_result": scale_result,
        "out_dtype": number_of(out_dtype),
        "out": out,
        "use_fast_accum": use_fast_accum,
        "split_k": split_k,
    }


def has_number(out_dtype: Any) -> bool:
    """Whether a key can have this out_dtype."""
    return out_dtype is None or (isinstance(out_dtype, torch.dtype) and out_dtype in _DTYPES)


def number_of(out_dtype: torch.dtype | None) -> int | None:
    """What stands for it in a key."""
    return None if out_dtype is None else _DTYPES[out_dtype]


def find(arguments: Arguments, op: str = _OP) -> Tensor | None:
    """A hit: the output, launched. None on a miss, and nothing was done."""
    run = cache().run
    if is_profiled():
        run = record_function(op)(run)
    found: Tensor | None = run(planned.hopper().kernels.registry(), arguments)
    return found


def launch(arguments: Arguments, product: Product, out: Tensor | None) -> Tensor | None:
    """After a miss: plans the call, launches it, keeps the plan and gives the output. `product` is
    the call, checked. None where no kernel serves it, or a gradient would be recorded, and
    nothing was done."""
    from flash8.backends.hopper import gemm as backend

    return launch_by(gemm, backend, _OP, arguments, product, out)


def launch_by(
    ops: ModuleType,
    backend: ModuleType,
    op: str,
    arguments: Arguments,
    product: Any,
    out: Tensor | None,
) -> Tensor | None:
    """The same of any kind of product: `ops` says who serves it, `backend` plans and launches."""
    hopper = planned.hopper()
    registry = hopper.kernels.registry()
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*product, out)
    ):
        return None
    if not cache().has_key(registry, arguments) or not ops.is_for_kernels(product):
        return None
    profiled = record_function(op) if is_profiled() else contextlib.nullcontext()
    with torch.no_grad(), profiled:
        found: Tensor = ops.empty_out(product) if out is None else out
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

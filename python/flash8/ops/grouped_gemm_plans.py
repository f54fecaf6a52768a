"""The plans of `grouped_scaled_mm`, in the cache of `gemm_plans.py`. The values of the groups'
indices are in no key: a plan serves any."""

from typing import Any

from torch import Tensor

from flash8.call.grouped_scaled_mm import GroupedProduct
from flash8.call.options import Arguments
from flash8.ops import gemm_plans, grouped_gemm, planned

_OP = "flash8::grouped_scaled_mm"  # what profilers call a launch


def arguments_of(
    a: Any,
    b: Any,
    scale_a: Any,
    scale_b: Any,
    offs: Any,
    masked_m: Any,
    out_dtype: Any,
    out: Any,
    use_fast_accum: Any,
) -> Arguments | None:
    """Those of a call, by name; None where it is not for plans."""
    if not planned.may_launch(a) or not gemm_plans.has_number(out_dtype):
        return None
    if (offs is None) == (masked_m is None):
        return None  # the checks say what is wrong
    return {
        "a": a,
        "b": b,
        "scale_a": scale_a,
        "scale_b": scale_b,
        "group_rows": masked_m if offs is None else offs,
        "is_apart": offs is None,
        "out_dtype": gemm_plans.number_of(out_dtype),
        "out": out,
        "use_fast_accum": use_fast_accum,
    }


def find(arguments: Arguments) -> Tensor | None:
    """A hit: the output, launched. None on a miss, and nothing was done."""
    return gemm_plans.find(arguments, _OP)


def launch(arguments: Arguments, product: GroupedProduct, out: Tensor | None) -> Tensor | None:
    """After a miss: plans the call, launches it, keeps the plan and gives the output. `product` is
    the call, checked. None where no kernel serves it, or a tensor requires grad, and nothing was
    done."""
    from flash8.backends.hopper import grouped_gemm as backend

    return gemm_plans.launch_by(grouped_gemm, backend, _OP, arguments, product, out)

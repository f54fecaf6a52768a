"""torch.autocast: flash8's functions do to their inputs what scaled_dot_product_attention does."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash8.call.observed import is_autocast_on

_DEVICES = ("cpu", "cuda")
_WIDE = (torch.float32, torch.float16, torch.bfloat16)


def cast_for_autocast(q: Any, *others: Any) -> tuple[Any, ...]:
    """q and the others in autocast's dtype where autocast is on for q's device. What is no fp32,
    fp16 or bf16 tensor is left alone: float64, as torch does, float8, None."""
    if not isinstance(q, Tensor):
        return q, *others
    device_type = q.device.type
    if device_type not in _DEVICES or q.dtype == torch.float64:
        return q, *others
    if not torch.is_autocast_enabled(device_type):
        return q, *others
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in _WIDE else x for x in (q, *others)
    )


def unaffected(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an op, whose own products autocast must not round: the inputs are cast before
    the op, and what it is made of is its own affair."""

    @functools.wraps(kernel)
    def run(*arguments: Any) -> Any:
        if not is_autocast_on():
            return kernel(*arguments)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return kernel(*arguments)

    return run

"""Calls on CPU tensors past the torch op, where nobody sees the difference.

What torch's dispatcher adds to a call of an op with so many arguments, twice through Python, is
more than a short attention takes. So are the checks; calls without index tensors are looked up by
what the checks look at, and checked once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash8 import backends
from flash8.call import observed, suspicions
from flash8.call.options import Arguments, Options, without_tensors
from flash8.ops.autograd import Launched

#: q, k, v, s_aux
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]
_INPUTS = ("q", "k", "v", "s_aux")
Key = tuple[Any, ...]
_MOST_KEYS = 1024


class Known(NamedTuple):
    """A call that was checked."""

    options: Options
    common: int | None  # `cpu.common_keys` of it


_known: dict[Key, Known] = {}


def key(arguments: Arguments) -> Key | None:
    """Equal for calls that pass the same checks with the same options; None if it cannot be told,
    or somebody is to see the op."""
    q = arguments["q"]
    if type(q) not in observed.PLAIN or not q.is_cpu or backends.kernels_wanted(q):
        return None
    if observed.is_observed() or observed.is_profiled() or observed.is_batched():
        return None
    parts: list[Any] = []
    for name, value in arguments.items():
        kind = type(value)
        if value is None:
            parts += (name, None)
            continue
        if kind in observed.PLAIN:
            if name not in _INPUTS or not value.is_cpu or value.is_nested:
                return None
            parts += (name, value.dtype, value.shape, value.layout)
        elif kind is bool or kind is int or kind is float:
            parts += (name, kind, value)
        elif kind is tuple and all(type(x) is int for x in value):
            parts += (name, value)
        else:
            return None
    return tuple(parts)


def find(key: Key | None) -> Known | None:
    """An equal call, checked."""
    return None if key is None else _known.get(key)


def keep(key: Key | None, inputs: Inputs, options: Options) -> None:
    """For calls that are equal, unless they are to be warned of."""
    if key is None or options.dropout_p > 0.0 or suspicions.may_be_dropout(options.softmax_scale):
        return
    if len(_known) >= _MOST_KEYS:
        _known.clear()
    q, k, v, s_aux = inputs
    _known[key] = Known(options, backends.cpu.common_keys(q, k, v, None, s_aux, options))


def may_run(inputs: Inputs, options: Options) -> bool:
    """Whether the call is for plain CPU tensors, and no mode, transform, trace or profiler is to
    see its op."""
    tensors = [x for x in options if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False  # the op knows what has no gradient
    return observed.is_unseen(*inputs, *tensors) and not backends.kernels_wanted(inputs[0])


def run(forward: Callable[..., Any], inputs: Inputs, options: Options) -> Any:
    """What the kernel of the op returns, with a node of autograd where one is wanted."""
    q, k, v, s_aux = inputs
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in inputs):
        return forward(q, k, v, None, s_aux, options)
    with torch.no_grad():
        out, lse, *partials = forward(q, k, v, None, s_aux, options)
    out, lse = Launched.apply(*inputs, (out, lse), options._asdict(), without_tensors(options))
    return out, lse, *partials

"""Calls on CPU tensors past the torch op, where nobody sees the difference.

What torch's dispatcher adds to a call of an op with so many arguments, twice through Python, is
more than a short attention takes. So are the checks; calls without index tensors are looked up by
what the checks look at, and checked once.
"""

import functools
import operator
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
    plan: backends.cpu.Plan | None  # `cpu.plan_batch` of it


_known: dict[Key, Known] = {}


class _Fields:
    """What the key of calls with arguments of these names and types is made of."""

    def __init__(self, tensors: list[str], pairs: list[str], numbers: list[str]) -> None:
        self.tensors, self.pairs = tensors, pairs
        self.others: Callable[[Arguments], Any] = operator.itemgetter(*numbers, *pairs)


@functools.lru_cache(_MOST_KEYS)
def _fields(names: tuple[str, ...], kinds: tuple[type, ...]) -> _Fields | None:
    """Always the same one. None where an argument has a type that no key may have."""
    tensors: list[str] = []
    pairs: list[str] = []
    numbers: list[str] = []
    for name, kind in zip(names, kinds, strict=True):
        if kind in observed.PLAIN and name in _INPUTS:
            tensors.append(name)
        elif kind is tuple:
            pairs.append(name)
        elif kind is bool or kind is int or kind is float:
            numbers.append(name)
        elif kind is not type(None):
            return None
    return _Fields(tensors, pairs, numbers) if pairs or numbers else None


def key(arguments: Arguments) -> Key | None:
    """Equal for calls that pass the same checks with the same options; None if it cannot be told,
    or somebody is to see the op."""
    q = arguments["q"]
    if type(q) not in observed.PLAIN or not q.is_cpu or backends.kernels_wanted(q):
        return None
    if observed.is_observed() or observed.is_profiled() or observed.is_batched():
        return None
    fields = _fields(tuple(arguments), tuple(map(type, arguments.values())))
    if fields is None:
        return None
    parts = [fields, fields.others(arguments)]
    for name in fields.pairs:
        for number in arguments[name]:
            if type(number) is not int:
                return None
    for name in fields.tensors:
        x = arguments[name]
        if not x.is_cpu or x.is_nested:
            return None
        parts += (x.dtype, x.shape, x.layout)
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
    _known[key] = Known(options, backends.cpu.plan_batch(q, k, v, None, s_aux, options))


def may_run(inputs: Inputs, options: Options) -> bool:
    """Whether the call is for plain CPU tensors, and no mode, transform, trace or profiler is to
    see its op."""
    tensors = [x for x in options if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False  # the op knows what has no gradient
    return observed.is_unseen(*inputs, *tensors) and not backends.kernels_wanted(inputs[0])


def wants_node(inputs: Inputs) -> bool:
    """Whether O and LSE are to be outputs of a node of autograd."""
    if not torch.is_grad_enabled():
        return False
    q, k, v, s_aux = inputs
    wanted = q.requires_grad or k.requires_grad or v.requires_grad
    return wanted or (s_aux is not None and s_aux.requires_grad)


def run(forward: Callable[..., Any], inputs: Inputs, options: Options) -> Any:
    """What the kernel of the op returns, with a node of autograd where one is wanted."""
    q, k, v, s_aux = inputs
    if not wants_node(inputs):
        return forward(q, k, v, None, s_aux, options)
    with torch.no_grad():
        out, lse, *partials = forward(q, k, v, None, s_aux, options)
    out, lse = Launched.apply(*inputs, (out, lse), options._asdict(), without_tensors(options))
    return out, lse, *partials

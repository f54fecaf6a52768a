"""`torch.vmap` of the torch ops.

A batch of dense batches is a batch: one call serves it. Where the sequences have lengths, seeds or
sinks of their own the op is called once for each element, and its outputs are stacked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash8.call.options import Options

Dims = tuple[int | None, ...]
#: (info, dimension of each argument that is mapped over, arguments) -> (outputs, their dimensions)
Rule = Callable[..., tuple[Any, Any]]

_ALIBI = Options._fields.index("alibi_slopes")


def register(library: torch.library.Library, name: str, *, merges: bool = False) -> None:
    """Gives `flash8::name` its rule. merges: its arguments are tensors with the batch in front, and
    then the options."""
    op = getattr(torch.ops.flash8, name).default

    def rule(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        if merges and _is_one_batch(in_dims, arguments):
            return _merged(op, info.batch_size, in_dims, arguments)
        return _one_by_one(op, info.batch_size, in_dims, arguments)

    torch.library.register_vmap(f"flash8::{name}", rule, lib=library)


def _one_by_one(op: Any, size: int, in_dims: Dims, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    for argument, dim in zip(op._schema.arguments, in_dims, strict=False):
        if dim is None and argument.alias_info is not None and argument.alias_info.is_write:
            raise RuntimeError(
                f"{argument.name} is written in place, by each element of torch.vmap: map over it "
                "as well, or write out of place"
            )
    results = [
        op(
            *(
                x if dim is None else x.select(dim, i)
                for x, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    if not results or results[0] is None:
        return None, None
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _is_one_batch(in_dims: Dims, arguments: tuple[Any, ...]) -> bool:
    """Whether every tensor but ALiBi's slopes has one row for each sequence, of one length."""
    count = len(arguments) - len(Options._fields)
    options = Options(*arguments[count:])
    given = [x for i, x in enumerate(options) if isinstance(x, Tensor) and i != _ALIBI]
    slopes_are_shared = in_dims[count + _ALIBI] is None
    sizes = [
        x.dim() - (dim is not None)
        for x, dim in zip(arguments[:count], in_dims[:count], strict=True)
        if x is not None
    ]
    return (
        not given
        and slopes_are_shared
        and (options.alibi_slopes is None or options.alibi_slopes.dim() == 1)
        and min(sizes) >= 3  # no sinks
        and options.num_splits == 1
    )


def _merged(op: Any, size: int, in_dims: Dims, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    count = len(arguments) - len(Options._fields)
    tensors = [
        None if x is None else _front(x, dim, size).flatten(0, 1)
        for x, dim in zip(arguments[:count], in_dims[:count], strict=True)
    ]
    outputs = op(*tensors, *arguments[count:])
    # What has no rows at all (partials, gradients of absent inputs) belongs to no element.
    is_empty = [x.dim() == 1 for x in outputs]
    split = [
        x if empty else x.unflatten(0, (size, x.shape[0] // size))
        for x, empty in zip(outputs, is_empty, strict=True)
    ]
    return tuple(split), tuple(None if empty else 0 for empty in is_empty)


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

"""Where tensors lie in memory: whether one may be written, and what would be written with it."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flash8.tensors.arguments import require_contiguous_last

#: Of one stride, to be tried. Where it is more than what lies within it spans, two may do.
_MOST_MULTIPLES = 8


def require_writable(name: str, tensor: Tensor) -> None:
    """Contiguous in its last dimension, and no element has two indices."""
    require_contiguous_last(name, tensor)
    pairs = [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    if any(stride == 0 for _, stride in pairs):
        raise ValueError(
            f"{name} must not be an expanded tensor (it is written), got strides {tensor.stride()}"
        )
    if not torch.compiler.is_compiling() and tensor.numel() > 0 and _overlaps_itself(pairs):
        raise ValueError(
            f"{name} must not overlap itself (it is written), got shape {tuple(tensor.shape)} and "
            f"strides {tensor.stride()}"
        )


def _overlaps_itself(pairs: list[tuple[int, int]]) -> bool:
    """Whether a step of some dimension ends within what the dimensions inside of it span."""
    spanned = 1
    for size, stride in sorted(pairs, key=lambda pair: pair[1]):
        if stride < spanned:
            return True
        spanned += (size - 1) * stride
    return False


def is_shared(x: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether it shares memory with one of the others."""
    return any(_share_memory(x, other) for other in others)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Of one storage, or of storages of their own over the same bytes, as of NumPy. A fake tensor
    and a subclass have no address here, and share memory with views of their storage only."""
    if not (_has_memory(a) and _has_memory(b)):
        return False
    if a.untyped_storage() is b.untyped_storage():
        places = [int(x.storage_offset()) * x.element_size() for x in (a, b)]
        return _elements_meet(a, b, places[0] - places[1])
    return elements_meet(a, b)


def elements_meet(a: Tensor, b: Tensor) -> bool:
    """Whether they have a byte in common. Views of one buffer that are interlaced, as kv[:, 0] and
    kv[:, 1] are, have none: told for one type and equal strides, and otherwise assumed."""
    if not (_has_address(a) and _has_address(b)):
        return False
    return _elements_meet(a, b, a.data_ptr() - b.data_ptr())


def _elements_meet(a: Tensor, b: Tensor, distance: int) -> bool:
    """distance: of their first bytes, that of a less that of b."""
    if distance >= _extent(b) or -distance >= _extent(a):
        return False
    size = a.element_size()
    if size != b.element_size() or a.stride() != b.stride() or distance % size != 0:
        return True
    steps = sorted(
        (stride, 1 - a_size, b_size - 1)
        for stride, a_size, b_size in zip(a.stride(), a.shape, b.shape, strict=True)
        if stride > 0
    )
    return _is_sum_of(distance // size, steps)


def _is_sum_of(distance: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether it is a sum of multiples of strides, ascending, each from a least to a most. Assumed
    where there are many to try, of tensors that overlap themselves."""
    if not steps:
        return distance == 0
    if distance % math.gcd(*(stride for stride, _, _ in steps)) != 0:
        return False
    *rest, (stride, least, most) = steps
    low = distance - sum(step * high for step, _, high in rest)
    high = distance - sum(step * low for step, low, _ in rest)
    times = range(max(least, -(-low // stride)), min(most, high // stride) + 1)
    if len(times) > _MOST_MULTIPLES:
        return True
    return any(_is_sum_of(distance - n * stride, rest) for n in times)


def spans_meet(a: Tensor, b: Tensor) -> bool:
    """Whether a byte between the first and the last of one is also that of the other."""
    if not (_has_address(a) and _has_address(b)):
        return False
    distance = a.data_ptr() - b.data_ptr()
    return distance < _extent(b) and -distance < _extent(a)


def _has_memory(x: Tensor) -> bool:
    """Empty and meta tensors have none, nor have those that a transform of torch.func maps over or
    differentiates."""
    return x.numel() > 0 and x.device.type != "meta" and not _is_wrapped(x)


def _has_address(x: Tensor) -> bool:
    """Fake tensors have none, and other subclasses may hold their data elsewhere."""
    return _is_plain(x) and _has_memory(x)


def _is_plain(x: Tensor) -> bool:
    return _is_exactly_tensor(x) and not _is_wrapped(x)


def _is_exactly_tensor(x: Tensor) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)


def _is_wrapped(x: Tensor) -> bool:
    """Whether a transform of torch.func maps over it or differentiates it: then torch refuses to
    give its address. Fake tensors are not asked for theirs."""
    if not _is_exactly_tensor(x):
        return False
    try:
        x.data_ptr()
    except RuntimeError:
        return True
    return False


def is_readable(x: Tensor) -> bool:
    """Whether to look at its values waits for no device, breaks no graph and asks no transform."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and _is_plain(x)


def _extent(x: Tensor) -> int:
    """Bytes from the first of x to the last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()

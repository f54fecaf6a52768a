"""What the plan caches of forward and backward share: who may be served by a plan, and outputs."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like
from torch.autograd.graph import increment_version

from flash8 import backends
from flash8.call.observed import is_observed

MOST_PLANS = 4096


def may_launch(q: Any) -> bool:
    """Whether a call with this q is for kernels, and nobody has to see the torch op."""
    return isinstance(q, Tensor) and not is_observed() and backends.kernels_wanted(q)


def like(x: Tensor) -> Tensor:
    """What empty_like takes for a tensor of x's shape, and that keeps neither x nor memory."""
    return without_memory(x.shape, x.dtype, x.device)


def without_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor whose one element is given back: it may have come from a pool that others expect to
    be empty later, like that of a CUDA graph."""
    expanded = torch.empty(1, dtype=dtype, device=device).expand(shape)
    expanded.untyped_storage().resize_(0)
    return expanded


def make_contiguous(likes: tuple[Tensor, ...]) -> bool:
    """Whether empty_like of each gives rows without gaps, as plans have them."""
    return all(empty_like(x).is_contiguous() for x in likes)


class Functions(NamedTuple):
    """What the native caches ask of torch and of the Hopper backend."""

    exchange_api: object | None  # torch's DLPack table; an older torch lacks it
    tensor: type
    parameter: type
    empty_like: Callable[..., Tensor]
    current_stream: Callable[..., int]
    increment_version: Callable[..., None]


def functions(exchange_api: object | None) -> Functions:
    """Without `exchange_api` tensors are read by their attributes."""
    from flash8.backends.hopper import streams

    types = (Tensor, torch.nn.Parameter)
    return Functions(exchange_api, *types, empty_like, streams.current_stream, increment_version)


def own_exchange_api() -> object | None:
    """That of this torch."""
    return getattr(Tensor, "__dlpack_c_exchange_api__", None)


class Hopper(NamedTuple):
    """Modules of the Hopper backend, which need the extension and are imported when a call does."""

    forward: ModuleType
    backward: ModuleType
    decode: ModuleType
    kernels: ModuleType
    streams: ModuleType


@functools.cache
def hopper() -> Hopper:
    from flash8.backends.hopper import backward, decode, forward, kernels, streams

    return Hopper(forward, backward, decode, kernels, streams)

"""Linear layers whose weights are split over the processes of a group.

With sequence_parallel what comes in and goes out is split along its first dimension; without, every
process has all of it.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Group = Any


def get_dim_for_local_rank(dim: int, world_size: int, local_rank: int, multiple_of: int = 1) -> int:
    """A process's part of dim, in multiples of multiple_of; the first ones have what is left."""
    each, left = divmod(dim // multiple_of, world_size)
    return (each + (local_rank < left)) * multiple_of


class ColumnParallelLinear(nn.Linear):
    """Each process has some of the output's channels."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Group,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _require_multiple("out_features", out_features, multiple_of)
        rank, size = dist.get_rank(process_group), process_group.size()
        own = get_dim_for_local_rank(out_features, size, rank, multiple_of)
        super().__init__(in_features, own, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        enter = _Gather if self.sequence_parallel else _SumGradients
        return F.linear(enter.apply(x, self.process_group), self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """Each process has some of the input's channels, the first one the bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Group,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _require_multiple("in_features", in_features, multiple_of)
        rank, size = dist.get_rank(process_group), process_group.size()
        own = get_dim_for_local_rank(in_features, size, rank, multiple_of)
        super().__init__(own, out_features, bias=bias and rank == 0, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        leave = _Scatter if self.sequence_parallel else _Sum
        out = F.linear(x, self.weight, self.bias)
        return cast(Tensor, leave.apply(out, self.process_group))


class _Gather(torch.autograd.Function):
    """All processes' parts, one after the other; its gradient is summed and split again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scattered(gradient, ctx.group), None


class _Scatter(torch.autograd.Function):
    """The process's part of the sum of all processes'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.group), None


class _SumGradients(torch.autograd.Function):
    """The identity; its gradient is the sum of all processes'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Sum(torch.autograd.Function):
    """The sum of all processes'; its gradient is that of the sum, which all of them have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _gathered(x: Tensor, group: Group) -> Tensor:
    whole = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_single(whole, x.contiguous(), group=group)
    return whole


def _scattered(x: Tensor, group: Group) -> Tensor:
    part = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_single(part, x.contiguous(), group=group)
    return part


def _require_multiple(name: str, value: int, multiple_of: int) -> None:
    if value % multiple_of != 0:
        raise ValueError(f"{name} must be a multiple of {multiple_of}, got {value}")

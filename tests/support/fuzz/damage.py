"""What may stand in the place of an argument: a little wrong, or nothing that anybody has meant."""

import contextlib
import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz.calls import FP8, JUNK, damaged


class Whole(int):
    """An int that is not of the type int."""


class Text(str):
    """A str that is not of the type str."""


class OwnTensor(Tensor):
    """A tensor that is not of the type Tensor."""


class Index:
    """What __index__ makes an index of, and nothing else."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


#: More than `test_fuzz` has: other kinds of numbers, sequences and nothings.
ODD: list[Any] = [
    *JUNK,
    *(2**62, -(2**63), 2**64, 10**400, 2**31 - 1, -(2**31), 2**15),
    *(-0.0, 1e308, -math.inf, 5e-324, Decimal(1), Fraction(1, 3), complex(math.nan, 0)),
    *(np.float64(2.5), np.int32(-1), np.uint8(255), np.bool_(True), np.zeros(3), np.ones((2, 2))),
    *(Whole(3), Text("x"), Index(2), NotImplemented, ..., slice(1), range(3), torch),
    *((), (None, None), (1, None), (-1, -1, -1), ("a", "b"), (1.5, 2), (2**31, -1), (-2, -2)),
    *((True, False), (math.nan, 1), [3, 2], {1: 2, 3: 4}, {1, 2}, iter([1, 2]), b"ab", "ab"),
    *((Whole(1), Whole(2)), (np.int64(1), np.int64(2)), ((1, 2), 3), (10**30, -(10**30))),
]


def odd_value(rng: random.Random) -> Any:
    """Anything at all."""
    kind = rng.randrange(6)
    if kind < 3:
        return rng.choice(ODD)
    dims = rng.choice([0, 0, 1, 1, 2, 3, 4, 5, 6])
    sizes = [rng.choice([0, 1, 1, 2, 3, 8]) for _ in range(dims)]
    dtype = rng.choice([torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool, FP8])
    x = torch.randint(-2, 5, sizes).to(dtype)
    if kind == 3:
        return x
    return odd_tensor(rng, x)


def odd_tensor(rng: random.Random, x: Tensor) -> Any:
    """The same numbers in another kind of tensor, or other numbers in the same."""
    try:
        return _odd_tensor(rng, x)
    except (RuntimeError, TypeError, NotImplementedError):  # not every kind has every other
        return x


def _odd_tensor(rng: random.Random, x: Tensor) -> Any:
    how = rng.randrange(17)
    dim = rng.randrange(x.dim()) if x.dim() else 0
    if how == 0:
        return x.as_subclass(OwnTensor)
    if how == 1:
        return torch.nn.Parameter(x.float().clone(), requires_grad=rng.random() < 0.5)
    if how == 2:
        return x.to("meta")
    if how == 3:
        return x.view(torch.uint8) if x.dim() and x.shape[-1] and x.stride(-1) == 1 else x.bool()
    if how == 4:
        return x.detach().float().numpy()
    if how == 5:
        return x.tolist() if x.numel() < 50 else [x]
    if how == 6:
        return x.to_sparse() if x.dtype.itemsize > 1 else x.float().to_sparse()
    if how == 7 and x.dtype.is_floating_point:
        return x.detach().float().to(torch.complex64).conj()
    if how == 8:
        return torch.nested.nested_tensor([x.float(), x.float()]) if x.dim() else x
    if how == 9:  # one element behind an aligned address
        raw = torch.zeros(x.numel() + 1, dtype=x.dtype)
        return raw[1:].view(x.shape).copy_(x)
    if how == 10 and x.dim() and x.shape[dim]:  # every row the same
        return x.narrow(dim, 0, 1).expand(x.shape)
    if how == 11 and x.dim() and x.shape[0] > 1:  # rows that overlap
        strides = [max(1, s // 2) if i == 0 else s for i, s in enumerate(x.stride())]
        return x.contiguous().as_strided(x.shape, strides)
    if how == 12 and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == 13:
        for _ in range(rng.randint(1, 3)):
            x = x.unsqueeze(rng.randint(0, x.dim()))
        return x
    if how == 14 and x.dtype in (torch.int32, torch.int64) and x.numel():
        x = x.clone()
        ends = [-(2**31), 2**31 - 1, -1, 2**30, 0]
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(ends)
        return x
    if how == 15 and x.dtype in (torch.int32, torch.int64):
        return x.flip(0) if x.dim() else x
    if how == 16 and x.is_floating_point() and x.numel() and x.dtype.itemsize > 1:
        x = x.detach().clone()
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(
            [math.nan, math.inf, -math.inf, 0.0, -1.0]
        )
        return x
    return damaged(rng, x)


def spoil(rng: random.Random, arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """The arguments with `times` of them spoilt, dropped, or given to one another."""
    spoilt = dict(arguments)
    for _ in range(times):
        name = rng.choice(sorted(arguments))
        value = spoilt.get(name)
        kind = rng.random()
        if kind < 0.04:
            spoilt.pop(name, None)
        elif kind < 0.14:
            spoilt[name] = spoilt.get(rng.choice(sorted(arguments)))
        elif isinstance(value, Tensor) and value.layout is torch.strided and kind < 0.6:
            spoilt[name] = odd_tensor(rng, value)
        elif kind < 0.8:
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a nested tensor, say
                spoilt[name] = damaged(rng, value)
        else:
            spoilt[name] = odd_value(rng)
    return spoilt

"""What the peers take for the same argument, as flash8 takes it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash8.tensors.float8 import E4M3


def window(window_size: Any) -> tuple[int, int]:
    """A pair, a list or a tensor of two; None and any negative bound mean unbounded."""
    if window_size is None:
        return -1, -1
    left, right = (int(bound) for bound in window_size)
    return bound(left), bound(right)


def bound(value: int) -> int:
    return -1 if value < 0 else value


def length(value: Any) -> Any:
    """A longest length, which the peers also take as a tensor of one element."""
    return int(value.item()) if isinstance(value, Tensor) else value


def one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    """The value of an argument that goes by two names."""
    if value is not None and other is not None:
        raise ValueError(f"{name} and {alias} are one argument: give one of them, not both")
    return other if value is None else value


def batch_of(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1


def descale(value: Any, scaled: Tensor, batch: int) -> Tensor | None:
    """A descale of a number, of shape (1,) or (heads,), or as flash8 has it; None for a tensor that
    is not float8, whose descale the peers ignore."""
    if value is None or scaled.dtype != E4M3:
        return None
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float32, device=scaled.device)
    if value.numel() == 1 and value.dim() == 1:
        return value.reshape(())
    return value.expand(batch, -1) if value.dim() == 1 else value


def descales(given: Sequence[Any], tensors: Sequence[Tensor], batch: int) -> dict[str, Any]:
    """q_descale, k_descale and v_descale, of q, k and v."""
    names = ("q_descale", "k_descale", "v_descale")
    pairs = zip(names, given, tensors, strict=True)
    return {name: descale(value, scaled, batch) for name, value, scaled in pairs}

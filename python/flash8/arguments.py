"""Small checks of single arguments. Every message names the argument, its value and what fits.

They are written to trace: on the good path they compare types and sizes only, so `torch.compile`
sees plain Python and installs ordinary guards. Messages are built when a check has failed.
"""

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Dtypes = torch.dtype | tuple[torch.dtype, ...]


class WrongIndex(ValueError):
    """What the data of an index tensor is refused for, where it is read: behind the torch op, which
    knows the argument by the name in `Options`. The public function says the caller's."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name} {text}")
        self.name, self.text = name, text


def describe(value: object) -> str:
    """A short text for a value in a message: tensors by type, shape and device."""
    if isinstance(value, Tensor) and value.is_nested:  # it has no shape to ask for
        return f"a nested {value.dtype} tensor on {value.device}"
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python writes, or an object that fails at it
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def require_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {describe(value)} ({type(value).__name__})")
    return value


def require_int(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    """A Python int (or a symbolic one while tracing) within [minimum, maximum]."""
    number = _as_int(name, value)
    if number < minimum or (maximum is not None and number > maximum):
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be an integer {limits}, got {describe(number)}")
    return number


def _as_int(name: str, value: Any) -> int:
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, bool) and getattr(value, "dtype", None) is not torch.bool:
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):
            pass
    raise TypeError(f"{name} must be an integer, got {describe(value)} ({type(value).__name__})")


def require_float(name: str, value: Any) -> float:
    """A finite Python number as float (or a symbolic float while tracing)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {describe(value)} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {describe(value)}") from None
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def require_tensor(name: str, value: Any, dtypes: Dtypes, like: Tensor | None = None) -> Tensor:
    """A strided tensor of one of `dtypes`, on the device of `like` where that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if value.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name} must have dtype {names}, got {value.dtype}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a strided (dense) tensor, got {kind}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like q, got {value.device}")
    return value


def require_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """`value.shape == shape`; `meaning` spells the shape out, e.g. "(batch, heads_kv)"."""
    if len(value.shape) != len(shape) or any(
        have != want for have, want in zip(value.shape, shape, strict=True)
    ):
        raise ValueError(
            f"{name} must have shape {meaning} = {tuple(shape)}, got {tuple(value.shape)}"
        )


def require_rank(name: str, value: Tensor, rank: int, meaning: str) -> None:
    if value.dim() != rank:
        raise ValueError(
            f"{name} must have {rank} dimensions {meaning}, got shape {tuple(value.shape)}"
        )


def require_contiguous_last(name: str, value: Tensor) -> None:
    """The last dimension is contiguous: what a kernel that writes in place can address."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {value.stride()}; "
            "call .contiguous()"
        )

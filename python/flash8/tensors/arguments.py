"""Small checks of single arguments. Every message names the argument, its value and what fits.

They are written to trace: on the good path they compare types and sizes only, so `torch.compile`
sees plain Python and installs ordinary guards. Messages are built when a check has failed.
"""

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

Dtypes = torch.dtype | tuple[torch.dtype, ...]


INDEX_DTYPES = (torch.int32, torch.int64)
#: What the caller calls an argument where that is not the name it has in `Options`.
Names = Mapping[str, str]
OWN_NAMES: Names = MappingProxyType({})
_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
_Result = TypeVar("_Result")


def wrong_index(name: str, text: str) -> ValueError:
    """For data of an index tensor that is refused where it is read: inside the torch op, which
    knows the argument by the name in `Options`. `call_by` says the caller's."""
    error = ValueError(f"{name} {text}")
    error.argument = name, text  # type: ignore[attr-defined]
    return error


def call_by(names: Names, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """The function's result; its `wrong_index` under the name that the caller gave."""
    if names is OWN_NAMES or torch.compiler.is_compiling():
        return function(*arguments)
    try:
        return function(*arguments)
    except ValueError as error:
        name, text = getattr(error, "argument", ("", ""))
        if name not in names:
            raise
        raise ValueError(f"{names[name]} {text}") from None


def to_int32(index: Any) -> Any:
    """An int64 index (what cumsum makes) as int32, without a wait; anything else as it is.

    A value beyond int32 becomes the nearest that int32 has, which no length, row or page reaches:
    on CPU tensors it is refused where it is read, and a kernel takes it for one that is too large.
    """
    if isinstance(index, Tensor) and index.dtype == torch.int64:
        return index.clamp(_INT32_MIN, _INT32_MAX).to(torch.int32)
    return index


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
    """A Python int (or a symbolic one while tracing) within [minimum, maximum].

    A trace does not know the value of an int that came out of a tensor by `.item()`: then the
    limits become assertions of the graph.
    """
    number = _as_int(name, value)
    if torch.compiler.is_compiling():
        wrong = is_known(number < minimum) or (maximum is not None and is_known(number > maximum))
        if not wrong:
            torch._check(number >= minimum)
            if maximum is not None:
                torch._check(number <= maximum)
    else:
        wrong = number < minimum or (maximum is not None and number > maximum)
    if wrong:
        limits = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be an integer {limits}, got {describe(number)}")
    return number


def is_known(condition: Any) -> bool:
    """Whether a comparison holds, as far as a trace can tell: False where it depends on data."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental import symbolic_shapes

    guard = getattr(symbolic_shapes, "guard_or_false", None)  # torch 2.7
    return bool((guard or symbolic_shapes.guard_size_oblivious)(condition))


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
        text = f"{name} must be a number, got {describe(value)} ({type(value).__name__})"
        if isinstance(value, Tensor):
            text += f"; pass {name}.item(), which waits for the device, or better the number itself"
        raise TypeError(text)
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
        raise ValueError(
            f"{name} must be on {like.device} like the other tensors, got {value.device}"
        )
    return value


def require_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """`value.shape == shape`; `meaning` spells the shape out, e.g. "(batch, heads_kv)"."""
    if differ(value.shape, shape):
        raise ValueError(
            f"{name} must have shape {meaning} = {tuple(shape)}, got {tuple(value.shape)}"
        )


def differ(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are known not to be the same."""
    if len(shape) != len(other):
        return True
    if torch.compiler.is_compiling():
        return any(is_known(a != b) for a, b in zip(shape, other, strict=True))
    return any(a != b for a, b in zip(shape, other, strict=True))


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

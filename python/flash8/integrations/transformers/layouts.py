"""What a layer is told instead of a mask: which tokens there are and how they see each other.

A model passes the layout of its mask on to every layer as `attention_mask`. It answers the few
questions that transformers asks of a mask on the way (`ndim`, `contiguous`, `to`).
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flash8.attention import Window

UNBOUNDED: Window = (-1, -1)


@dataclass(frozen=True)
class Layout:
    """Base of the layouts. `window` is flash8's window_size."""

    causal: bool
    window: Window

    #: Anything but 2: transformers converts two-dimensional masks to bool tensors.
    ndim: ClassVar[int] = 4

    def contiguous(self) -> Self:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The layout with its tensors moved, for models that are spread over devices."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Tokens)):
                moved[field.name] = value.to(*args, **kwargs)
        return replace(self, **moved)


@dataclass(frozen=True)
class Dense(Layout):
    """All tokens of all rows are used, and queries end where keys end."""


@dataclass(frozen=True)
class Cached(Layout):
    """Dense queries over keys of which each row uses [leftpad, used); queries end at `used`."""

    used: Tensor  # int32 (batch,)
    leftpad: Tensor | None  # int32 (batch,)


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a (batch, seqlen) tensor are used, and the sequences they form."""

    indices: Tensor | None  # int64 (total,) into batch * seqlen; None: all
    cu_seqlens: Tensor  # int32 (sequences + 1,)
    max_seqlen: int

    def gather(self, x: Tensor) -> Tensor:
        """(batch, seqlen, ...) to (total, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def scatter(self, x: Tensor, shape: torch.Size) -> Tensor:
        """(total, ...) to `shape`, (batch, seqlen, ...); unused tokens are zero."""
        if self.indices is not None:
            zeros = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
            x = zeros.index_copy(0, self.indices, x)
        return x.view(shape)

    def to(self, *args: Any, **kwargs: Any) -> "Tokens":
        indices = None if self.indices is None else self.indices.to(*args, **kwargs)
        return replace(self, indices=indices, cu_seqlens=self.cu_seqlens.to(*args, **kwargs))


@dataclass(frozen=True)
class Packed(Layout):
    """Sequences back to back, once unused tokens are dropped."""

    queries: Tokens
    keys: Tokens

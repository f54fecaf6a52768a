"""What a layer is told instead of a mask: which tokens there are and how they see each other.

A model passes the layout of its mask on to every layer as `attention_mask`. It answers the few
questions that transformers asks of a mask on the way (`opaque.Opaque`) and refuses to be used as
a tensor, for a model that does so computes attention itself.
"""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from flash8.attention import Window
from flash8.integrations.transformers.opaque import Opaque

UNBOUNDED: Window = (-1, -1)


@dataclass(frozen=True, eq=False)
class Layout(Opaque):
    """Base of the layouts. `window` is flash8's window_size.

    `chunk`: sequences fall into chunks of so many tokens, which do not see each other, and are cut.
    `attention_chunk`: the same where they are not cut: flash8's argument.
    `unpacked`: in a graph, whether no row holds several sequences. Layers that are told of no
        boundaries assert it.
    `packing_known`: the model's mask was made from its position_ids; a layer need not ask them.
    `owner`: the model, for error messages.
    `memo`: what layers found out about the position_ids of this forward, for the other layers.
    """

    causal: bool
    window: Window
    chunk: int | None = field(default=None, kw_only=True)
    attention_chunk: int = field(default=0, kw_only=True)
    unpacked: Tensor | None = field(default=None, kw_only=True)
    packing_known: bool = field(default=False, kw_only=True)
    owner: str = field(default="the model", kw_only=True)
    memo: dict[int, Any] = field(default_factory=dict, kw_only=True, repr=False)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The layout with its tensors moved, for models that are spread over devices. A dtype among
        the arguments of Tensor.to is of a mask's values, which a layout does not have."""
        device = _device(args, kwargs)
        if device is None:
            return self
        moved: dict[str, Any] = {"memo": {}}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, (Tensor, Tokens)):
                moved[entry.name] = value.to(device, non_blocking=kwargs.get("non_blocking", False))
        return replace(self, **moved)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The device among the arguments of Tensor.to, or None."""
    for value in (*args, kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (torch.device, str)) or type(value) is int:
            return value
    return None


@dataclass(frozen=True, eq=False)
class Dense(Layout):
    """All tokens of all rows are used, and queries end where keys end."""


@dataclass(frozen=True, eq=False)
class Cached(Layout):
    """Dense queries over keys: each row uses [leftpad, used), and its queries end at `used`."""

    used: Tensor  # int32 (batch,)
    leftpad: Tensor | None  # int32 (batch,)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which tokens of a (batch, seqlen) tensor are used, and the sequences they form.

    In a graph, where no shape may depend on data, `indices` has all tokens, those that are not used
    behind the others, where they belong to no sequence.
    """

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

    def to(self, device: Any, *, non_blocking: bool = False) -> "Tokens":
        move = partial(Tensor.to, device=device, non_blocking=non_blocking)
        indices = None if self.indices is None else move(self.indices)
        return replace(self, indices=indices, cu_seqlens=move(self.cu_seqlens))


@dataclass(frozen=True, eq=False)
class Packed(Layout):
    """Sequences back to back, once unused tokens are dropped."""

    queries: Tokens
    keys: Tokens

    @property
    def is_padded(self) -> bool:
        return self.keys.indices is not None

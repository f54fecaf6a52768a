"""Appends on the simulated device, and their comparison with the portable append, bit by bit."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cases import cumulative, int32
from flash8.backends.cpu import append as portable
from flash8.backends.hopper import append as hopper
from flash8.call.request import Appended, Queries
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope
from quantizer_cases import draw, tables
from quantizer_device import kernels

HEADS, HEADS_KV = 3, 2
WIDTH, WIDTH_V = 72, 40
LENGTHS = (13, 0, 47)
#: Tokens that a sequence has room for.
ROOM = 96
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass
class Append:
    """One call of the appending kernel."""

    k: Appended
    v: Appended
    queries: Queries | None = None

    def copy(self) -> "Append":
        """The same rows into caches of its own."""
        k, v = (x._replace(cache=x.cache.clone()) for x in (self.k, self.v))
        return replace(self, k=k, v=v)

    def changed(self, **fields: Any) -> "Append":
        """Into caches of its own, with other fields of both keys and values."""
        k, v = (x._replace(cache=x.cache.clone(), **fields) for x in (self.k, self.v))
        return replace(self, k=k, v=v)

    def tensors(self) -> list[Tensor]:
        given = [*self.k, *self.v, *(self.queries or ())]
        flat = [
            x for field in given for x in (field if isinstance(field, Rope | Norm) else (field,))
        ]
        return list({x.data_ptr(): x for x in flat if isinstance(x, Tensor)}.values())

    def on_kernels(self, monkeypatch: Any, *, seed: int = 0) -> list[Tensor]:
        """The caches, the lengths and the rotated queries."""
        with kernels(monkeypatch, *self.tensors(), seed=seed):
            rotated, lengths = hopper.append(self.k, self.v, queries=self.queries)
        return self._filled(rotated, lengths)

    def portable(self) -> list[Tensor]:
        return self._filled(*portable.append(self.k, self.v, queries=self.queries))

    def _filled(self, rotated: Tensor | None, lengths: Tensor) -> list[Tensor]:
        return [self.k.cache, self.v.cache, lengths, *([] if rotated is None else [rotated])]


def bits(x: Tensor) -> Tensor:
    """An integer for an element; one for all NaNs."""
    words = x.view(_WORDS[x.element_size()]).int()
    return torch.where(x.float().isnan(), -(2**31), words)


def assert_same(have: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def differs(have: list[Tensor], want: list[Tensor]) -> bool:
    return any(not torch.equal(bits(a), bits(b)) for a, b in zip(have, want, strict=True))


def make(
    dtype: torch.dtype = torch.bfloat16,
    *,
    cache: torch.dtype | None = None,
    new: int | tuple[int, ...] = 7,
    new_q: int | tuple[int, ...] | None = None,
    page_size: int | None = None,
    rows: tuple[int, ...] | None = None,
    rotary_dim: int = 0,
    interleaved: bool = True,
    advances: bool = True,
    offsets: tuple[int, ...] = LENGTHS,
    table_dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype | None = None,
) -> Append:
    """New rows behind LENGTHS tokens; counts are those of all sequences, or of each, packed. An
    e4m3 cache has a mean, and descales by slot; `rows` are kv_batch_idx. norm_dtype: that of the
    weights of norms of Q and K."""
    cache = dtype if cache is None else cache
    lines = len(LENGTHS) + (2 if rows is not None else 0)
    where: dict[str, Any] = {"starts": int32(LENGTHS)}
    if rows is not None:
        where["kv_batch_idx"] = int32(rows)
    slots = (lines, ROOM)
    if page_size is not None:
        columns = -(-ROOM // page_size)
        order = torch.randperm(lines * columns + 1, generator=torch.Generator().manual_seed(9))
        where["page_table"] = order[1:].view(lines, columns).int()
        slots = (lines * columns + 1, page_size)
    if isinstance(new, tuple):
        where["cu_seqlens"] = cumulative(new)
    rope = None
    if rotary_dim:
        both = (x.to(table_dtype) for x in tables(rotary_dim, 140))
        rope = Rope(*both, int32(offsets), interleaved)
    norms: list[Norm | None] = [None, None]
    if norm_dtype is not None:
        norms = [Norm(draw(WIDTH, seed=s).to(norm_dtype), 0.1) for s in (10, 11)]
    parts = []
    for seed, width in ((2, WIDTH), (3, WIDTH_V)):
        x = draw(*_shape(new), HEADS_KV, width, seed=seed, scale=3.0).to(dtype)
        held = draw(*slots, HEADS_KV, width, seed=seed + 2).to(cache)
        part = Appended(held, x, **where)
        if seed == 2:
            part = part._replace(rope=rope, norm=norms[0])
        if cache == E4M3 and dtype != E4M3:
            descale = draw(slots[0], HEADS_KV, 1, dtype=torch.float32, seed=6)
            mean = draw(len(LENGTHS), HEADS_KV, width, dtype=torch.float32, seed=7)
            part = part._replace(descale=descale.abs() * 0.05 + 0.01, mean=mean)
        parts.append(part)
    queries = None
    if rope is not None or norm_dtype is not None:
        new_q = new if new_q is None else new_q
        q = draw(*_shape(new_q), HEADS, WIDTH, seed=1).to(dtype)
        cu_seqlens_q = cumulative(new_q) if isinstance(new_q, tuple) else None
        queries = Queries(q, rope, cu_seqlens_q, advances, norms[1])
    return Append(parts[0], parts[1], queries)


def _shape(new: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sum(new),) if isinstance(new, tuple) else (len(LENGTHS), new)

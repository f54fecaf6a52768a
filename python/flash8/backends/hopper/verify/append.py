"""An appending kernel against the portable append, bit by bit: caches, queries and lengths."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flash8.backends.cpu import append as portable
from flash8.backends.hopper import append as hopper
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.request import Appended, Queries
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope

_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "e4m3": E4M3,
}
_HEADS, _HEADS_KV = 5, 3
_WIDTH, _WIDTH_V = 96, 64
_POSITIONS = 300
_PAGE = 32
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def find_fault(variant: AppendVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for k, v, queries in _Draw(variant, device).calls():
        fault = _fault(k, v, queries)
        if fault is not None:
            return fault
    return None


def _fault(k: Appended, v: Appended, queries: Queries | None) -> str | None:
    wanted = [x._replace(cache=x.cache.clone()) for x in (k, v)]
    watchdog = Watchdog(k.x.device)
    rotated, lengths = hopper.append(k, v, queries=queries)
    watchdog.wait()
    want_rotated, want_lengths = portable.append(*wanted, queries=queries)
    rows = [
        ("elements of the K cache", k.cache, wanted[0].cache),
        ("elements of the V cache", v.cache, wanted[1].cache),
        ("lengths", lengths, want_lengths),
    ]
    if rotated is not None and want_rotated is not None:
        rows.append(("elements of Q", rotated, want_rotated))
    for what, have, want in rows:
        wide = _WORDS[have.element_size()]
        differ = int((have.view(wide) != want.view(wide)).sum())
        if differ:
            return f"{differ} of {have.numel()} {what} differ"
    return None


class _Draw:
    """Random calls of a variant. They are drawn on the CPU: the same on every device."""

    def __init__(self, variant: AppendVariant, device: torch.device) -> None:
        self._variant, self._device = variant, device
        self._generator = torch.Generator("cpu").manual_seed(1)

    def calls(self) -> Iterator[tuple[Appended, Appended, Queries | None]]:
        """A packed one, across the ends of pages, and a dense one into rows of larger caches."""
        starts, offsets = self._int32(13, 90, 0), self._int32(0, 30, 31, 36)
        table = self._int32(7, 2, 9, 0, 1, 11, 4, 3, 5, 6, 8, 10).view(3, 4)
        rows = self._int32(2, 0, 1)
        rope = None if self._variant.dtype == "e4m3" else Rope(*self._tables(), starts, True)
        packed: dict[str, Any] = {"cu_seqlens": offsets, "page_table": table, "kv_batch_idx": rows}
        queries = None
        if rope is not None:
            queries = Queries(self._x(36, _HEADS, _WIDTH), rope, self._int32(0, 1, 30, 36))
        yield (
            self._appended((12, _PAGE), starts, _WIDTH, rope=rope, by_slot=(12, 1), **packed),
            self._appended((12, _PAGE), starts, _WIDTH_V, by_slot=(12, 1), **packed),
            queries,
        )
        if rope is not None:
            rope = Rope(*self._tables(), self._int32(3, 0, 60), False)
            queries = Queries(self._x(3, 7, _HEADS, _WIDTH), rope, None, False, self._norm(False))
        norm = None if rope is None else self._norm(True)
        yield (
            self._appended((4, 200), starts, _WIDTH, rope=rope, norm=norm, kv_batch_idx=rows),
            self._appended((4, 200), starts, _WIDTH_V, kv_batch_idx=rows),
            queries,
        )

    def _appended(
        self,
        slots: tuple[int, int],
        starts: Tensor,
        width: int,
        *,
        rope: Rope | None = None,
        norm: Norm | None = None,
        by_slot: tuple[int, int] | None = None,
        **where: Tensor,
    ) -> Appended:
        """Rows with the scales of an e4m3 cache that quantizes them, by slot or by sequence."""
        dtype = _DTYPES[self._variant.dtype]
        quantizes = self._variant.cache == "e4m3"
        cache = torch.full((*slots, _HEADS_KV, width), 1.0, device=self._device)
        shape = (3, 11) if "cu_seqlens" not in where else (36,)
        appended = Appended(
            cache.to(E4M3 if quantizes else dtype),
            self._x(*shape, _HEADS_KV, width),
            starts,
            rope=rope,
            norm=norm,
            **where,
        )
        if not quantizes:
            return appended
        scales = (3, _HEADS_KV) if by_slot is None else (by_slot[0], _HEADS_KV, by_slot[1])
        return appended._replace(
            descale=self._normal(*scales).abs() * 0.05 + 0.01,
            mean=self._normal(*((_HEADS_KV,) if by_slot is None else (3, _HEADS_KV)), width),
        )

    def _x(self, *shape: int) -> Tensor:
        """Normal values and, here and there, larger ones."""
        x = self._normal(*shape)
        x.view(-1)[::1001] *= 20.0
        return x.to(_DTYPES[self._variant.dtype])

    def _norm(self, wide: bool) -> Norm:
        weight = self._normal(_WIDTH)
        return Norm(weight if wide else weight.to(_DTYPES[self._variant.dtype]), 0.1)

    def _tables(self) -> tuple[Tensor, Tensor]:
        angles = self._normal(_POSITIONS, _WIDTH // 6) * 3.0
        return angles.cos(), angles.sin()

    def _normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return x.to(self._device)

    def _int32(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

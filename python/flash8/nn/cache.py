"""KV caches for generation: rows of fixed capacity, or pages handed out on demand.

Both kinds are used the same way. Lengths are known to the host, so nothing here waits for the
device::

    row = cache.add_sequence()
    step = cache.prepare([row], new_tokens=x.shape[1])    # reserves the space
    for index, attention in enumerate(layers):
        x = attention(x, cache=step.layer(index))         # appends k, v, then attends
    step.commit()                                         # the sequences are longer now
    cache.remove_sequence(row)

A cache of dtype float8_e4m3fn is quantized by the append, with one descale per layer and head that
is fixed when the cache is made: x ~ descale * x_fp8.

The paging scheme is that of Kwon et al., "PagedAttention" (arXiv 2309.06180).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.tensors.arguments import require_int, require_shape, require_tensor
from flash8.tensors.float8 import E4M3


class OutOfPagesError(RuntimeError):
    """The pool has fewer free pages than a sequence needs; nothing was allocated."""


class PageAllocator:
    """Hands out page numbers 0 .. num_pages - 1; the most recently released go first."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = require_int("num_pages", num_pages, minimum=1)
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages.

        Raises:
            OutOfPagesError: fewer are free.
        """
        require_int("count", count, minimum=0)
        if count > self.num_free:
            raise OutOfPagesError(
                f"{count} pages wanted, {self.num_free} of {self.num_pages} are free"
            )
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back.

        Raises:
            ValueError: a page is not in use; no page is released then.
        """
        unknown = [page for page in pages if page not in self._used]
        if unknown or len(set(pages)) != len(pages):
            raise ValueError(f"pages must be in use and distinct, got {list(pages)}")
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))


@dataclass(frozen=True)
class LayerCache:
    """What one attention layer needs to append to a cache and read it.

    k, v: (batch, capacity, heads_kv, head_dim), or (pages, page_size, heads_kv, head_dim).
    cache_seqlens: (rows,) int32, the lengths before this step.
    cache_batch_idx: (rows,) int32, dense only; page_table: (rows, max_pages) int32, paged only.
    max_seqlen: the longest a sequence may become.
    k_descale, v_descale: fp32 (rows, heads_kv), of an e4m3 cache that has descales.
    """

    k: Tensor
    v: Tensor
    cache_seqlens: Tensor
    cache_batch_idx: Tensor | None
    page_table: Tensor | None
    max_seqlen: int
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None


@dataclass(frozen=True)
class CacheStep:
    """One forward pass over some rows of a cache: made by `prepare`, ended by `commit`."""

    cache: "_KVCache"
    rows: tuple[int, ...]
    new_tokens: tuple[int, ...]
    cache_seqlens: Tensor
    cache_batch_idx: Tensor | None
    page_table: Tensor | None

    def layer(self, index: int) -> LayerCache:
        """The cache of layer ``index``."""
        return LayerCache(
            self.cache.k[index],
            self.cache.v[index],
            self.cache_seqlens,
            self.cache_batch_idx,
            self.page_table,
            self.cache.max_seqlen,
            self._descale(self.cache.k_descale, index),
            self._descale(self.cache.v_descale, index),
        )

    def _descale(self, descale: Tensor | None, index: int) -> Tensor | None:
        return None if descale is None else descale[index].expand(len(self.rows), -1)

    def commit(self) -> None:
        """Count the new tokens, once every layer has appended them."""
        self.cache.advance(self.rows, self.new_tokens)


class _KVCache(ABC):
    """Rows and their lengths; where the tokens lie is the subclass's business."""

    k: Tensor
    v: Tensor
    k_descale: Tensor | None
    v_descale: Tensor | None

    def __init__(self, max_batch: int, max_seqlen: int) -> None:
        self.max_batch = require_int("max_batch", max_batch, minimum=1)
        self.max_seqlen = require_int("max_seqlen", max_seqlen, minimum=1)
        self._lengths: dict[int, int] = {}

    def length(self, row: int) -> int:
        """Tokens that sequence ``row`` holds."""
        self._check_row(row)
        return self._lengths[row]

    @property
    def num_sequences(self) -> int:
        return len(self._lengths)

    def add_sequence(self) -> int:
        """Open an empty sequence and return its row.

        Raises:
            RuntimeError: all ``max_batch`` rows are taken.
        """
        for row in range(self.max_batch):
            if row not in self._lengths:
                self._lengths[row] = 0
                return row
        raise RuntimeError(f"all max_batch = {self.max_batch} rows of the cache are in use")

    def remove_sequence(self, row: int) -> None:
        """Close a sequence; its space can be used again."""
        self._check_row(row)
        del self._lengths[row]

    def prepare(self, rows: Sequence[int], new_tokens: int | Sequence[int]) -> CacheStep:
        """Reserve space for one forward pass.

        Args:
            rows: the sequences of the batch, in its order, each at most once.
            new_tokens: tokens each will append: one number for all, or one per row.

        Raises:
            ValueError: an unknown row, or a sequence would exceed ``max_seqlen``.
            OutOfPagesError: the pool is too small; no sequence has changed.
        """
        rows = tuple(rows)
        counts = (new_tokens,) * len(rows) if isinstance(new_tokens, int) else tuple(new_tokens)
        self._check_step(rows, counts)
        self._reserve({row: self._lengths[row] + n for row, n in zip(rows, counts, strict=True)})
        lengths = [self._lengths[row] for row in rows]
        return CacheStep(
            self, rows, counts, self._int32(lengths), self._batch_idx(rows), self._pages(rows)
        )

    def advance(self, rows: Sequence[int], new_tokens: Sequence[int]) -> None:
        """Count tokens that have been appended; see `CacheStep.commit`."""
        for row, count in zip(rows, new_tokens, strict=True):
            self._lengths[row] += count

    def _allocate(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        descales: tuple[Tensor | None, Tensor | None],
    ) -> None:
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        for name, descale in zip(("k_descale", "v_descale"), descales, strict=True):
            if descale is not None:
                if dtype != E4M3:
                    raise ValueError(f"{name} needs a cache of dtype {E4M3}, got dtype {dtype}")
                require_tensor(name, descale, torch.float32, self.k)
                layers_and_heads = (shape[0], shape[-2])
                require_shape(name, descale, layers_and_heads, "(num_layers, num_heads_kv)")
            setattr(self, name, descale)

    @abstractmethod
    def _reserve(self, lengths: dict[int, int]) -> None: ...

    @abstractmethod
    def _batch_idx(self, rows: tuple[int, ...]) -> Tensor | None: ...

    @abstractmethod
    def _pages(self, rows: tuple[int, ...]) -> Tensor | None: ...

    def _int32(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.k.device, non_blocking=True)

    def _check_row(self, row: int) -> None:
        if row not in self._lengths:
            raise ValueError(f"row must be one that add_sequence returned, got {row}")

    def _check_step(self, rows: tuple[int, ...], counts: tuple[int, ...]) -> None:
        if not rows or len(set(rows)) != len(rows):
            raise ValueError(f"rows must be distinct and at least one, got {list(rows)}")
        if len(counts) != len(rows):
            raise ValueError(f"new_tokens must hold {len(rows)} numbers, got {len(counts)}")
        for row, count in zip(rows, counts, strict=True):
            self._check_row(row)
            require_int("new_tokens", count, minimum=0)
            length = self._lengths[row] + count
            if length > self.max_seqlen:
                raise ValueError(
                    f"row {row} would hold {length} tokens, more than max_seqlen = "
                    f"{self.max_seqlen}"
                )


class DenseKVCache(_KVCache):
    """``max_batch`` rows with room for ``max_seqlen`` tokens each, allocated at once.

    ``k`` and ``v`` are (num_layers, max_batch, max_seqlen, num_heads_kv, head_dim).
    dtype float8_e4m3fn takes k_descale and v_descale, fp32 (num_layers, num_heads_kv); None: 1.
    """

    def __init__(
        self,
        num_layers: int,
        max_batch: int,
        max_seqlen: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
    ) -> None:
        super().__init__(max_batch, max_seqlen)
        shape = (num_layers, max_batch, max_seqlen, num_heads_kv, head_dim)
        self._allocate(shape, dtype, device, (k_descale, v_descale))

    def _reserve(self, lengths: dict[int, int]) -> None:
        """Every row already has its space."""

    def _batch_idx(self, rows: tuple[int, ...]) -> Tensor:
        return self._int32(rows)

    def _pages(self, rows: tuple[int, ...]) -> None:
        return None


class PagedKVCache(_KVCache):
    """Sequences in pages of a shared pool; a sequence takes a page when it grows into it.

    ``k`` and ``v`` are (num_layers, num_pages, page_size, num_heads_kv, head_dim). One page number
    stands for the same place in every layer, so all layers share a page table.
    dtype float8_e4m3fn takes k_descale and v_descale, fp32 (num_layers, num_heads_kv); None: 1.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        max_batch: int,
        max_seqlen: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
    ) -> None:
        super().__init__(max_batch, max_seqlen)
        self.page_size = require_int("page_size", page_size, minimum=1)
        self.allocator = PageAllocator(num_pages)
        self._held: dict[int, list[int]] = {}
        shape = (num_layers, num_pages, page_size, num_heads_kv, head_dim)
        self._allocate(shape, dtype, device, (k_descale, v_descale))

    def pages_of(self, row: int) -> tuple[int, ...]:
        """The pages of sequence ``row``, first tokens first."""
        self._check_row(row)
        return tuple(self._held[row])

    def add_sequence(self) -> int:
        row = super().add_sequence()
        self._held[row] = []
        return row

    def remove_sequence(self, row: int) -> None:
        super().remove_sequence(row)
        self.allocator.release(self._held.pop(row))

    def _reserve(self, lengths: dict[int, int]) -> None:
        missing = {
            row: max(0, -(-length // self.page_size) - len(self._held[row]))
            for row, length in lengths.items()
        }
        fresh = iter(self.allocator.allocate(sum(missing.values())))
        for row, count in missing.items():
            self._held[row].extend(next(fresh) for _ in range(count))

    def _batch_idx(self, rows: tuple[int, ...]) -> None:
        return None

    def _pages(self, rows: tuple[int, ...]) -> Tensor:
        """Places past a sequence's pages hold 0: a valid page that its length keeps unread."""
        width = -(-self.max_seqlen // self.page_size)
        table = torch.zeros(len(rows), width, dtype=torch.int32)
        for index, row in enumerate(rows):
            pages = self._held[row]
            table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        return table.to(self.k.device, non_blocking=True)

"""Small problems for a forward kernel, which use everything it is compiled for.

Sequences are ragged, two query heads share a KV head, there are sinks, and what must not be read is
NaN. A table has no page for it.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash8.backends.hopper.variants import Element, ForwardVariant
from flash8.call.options import Options
from flash8.tensors.descales import num_blocks, num_packed_blocks
from flash8.tensors.float8 import E4M3
from flash8.tensors.tokens import Tokens
from flash8.tensors.v_colmajor import to_colmajor

_DTYPES: dict[Element, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": E4M3,
}
_HEADS, _HEADS_KV = 4, 2
SOFTCAP = 1.5
_DROPOUT_P = 0.2
_UNIT = 32.0  # of e4m3 values, which then use the range; the descales are about its inverse
_MANY = 1 << 30  # a margin that leaves one CTA, or one cluster, to walk over all tiles

_Lengths = tuple[tuple[int, int], ...]
#: (rows, used rows) of q and of k, by sequence: several blocks of both, fewer queries than keys
#: and the other way round, and one without a key.
_QUERIES: _Lengths = ((161, 150), (5, 3), (40, 40), (2, 2))
_KEYS: _Lengths = ((291, 270), (90, 77), (9, 9), (3, 0))
#: Left padding of the keys: more than a page, some of one, and all of a sequence.
_PADDING = (27, 3, 9, 0)
_WINDOW = (37, 21)
#: What stands in a table where no page is needed.
NO_PAGES = (-1, 2**31 - 1, 10**6, -(2**31))
#: Not ragged: an even and an odd number of blocks of queries.
_EVEN = (((150, 150),) * 2, ((270, 270),) * 2)
_ODD = (((300, 300),) * 2, ((131, 131),) * 2)


class Problem(NamedTuple):
    """What a launch and the portable code are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor
    options: Options
    real: tuple[Tensor, Tensor, Tensor]  # what q, k, v represent, in fp64
    out_dtype: torch.dtype
    sm_margin: int


def problems(
    variant: ForwardVariant, device: torch.device, *, channel_descales: bool = True
) -> Iterator[Problem]:
    """Two: one by as many CTAs as there are tiles, one by a single one, or a single cluster.

    The first is packed; the second is dense. Without a mask that makes tiles uneven it has no
    ragged lengths either, so that its schedule is static. Clusters serve such calls only. Pages are
    of another size in each, and their lengths ragged. A problem is made when the one before it has
    been passed. channel_descales: whether an FP8 V has them.
    """
    draw = functools.partial(_Draw, variant, device, channel_descales=channel_descales)
    if variant.cluster:
        yield draw(*_ODD, packed=False, seed=1).problem(0)
    else:
        yield draw(_QUERIES, _KEYS, packed=True, seed=1).problem(0)
    dense = _EVEN if variant.mask == "none" and not variant.paged else (_QUERIES, _KEYS)
    yield draw(*dense, packed=False, seed=2).problem(_MANY)


class _Draw:
    """Random tensors of one problem. They are drawn on the CPU: the same on every device."""

    def __init__(
        self,
        variant: ForwardVariant,
        device: torch.device,
        queries: _Lengths,
        keys: _Lengths,
        *,
        packed: bool,
        seed: int,
        channel_descales: bool,
    ) -> None:
        self._variant, self._device, self._packed = variant, device, packed
        self._channel_descales = channel_descales
        self._queries, self._keys = queries, keys
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def problem(self, sm_margin: int) -> Problem:
        variant = self._variant
        local, float8 = variant.mask == "local", variant.dtype == "e4m3"
        of_fp8 = self._fp8() if float8 else self._of_cache() if variant.cache == "e4m3" else {}
        options = Options(
            causal=variant.mask == "causal",
            window_left=_WINDOW[0] if local else -1,
            window_right={"none": -1, "causal": 0, "local": _WINDOW[1]}[variant.mask],
            softcap=SOFTCAP if variant.softcap else 0.0,
            alibi_slopes=self._uniform(_HEADS) * 0.1 if variant.alibi else None,
            dropout_p=_DROPOUT_P if variant.dropout else 0.0,
            dropout_seed=self._seed() if variant.dropout else None,
            **self._lengths(),
            **of_fp8,
        )
        cached = _DTYPES["e4m3" if variant.cache == "e4m3" else variant.dtype]
        queries = self._queries, _HEADS, variant.head_dim, self._packed
        q = self._tensor(*queries, _DTYPES[variant.dtype])
        keys = self._keys, _HEADS_KV
        k = self._tensor(*keys, variant.head_dim, self._packed_keys, cached)
        v = self._tensor(*keys, variant.head_dim_v, self._packed_keys, cached)
        real = self._real(q, k, v, options)
        if self._page_size > 0:
            padding = _PADDING if self._pads else (0,) * len(self._keys)
            if self._pads:
                options = options._replace(leftpad_k=self._int32(list(padding)))
            seen = [
                (self._first_seen(pad, used, queries), used)
                for pad, (_, used), (_, queries) in zip(
                    padding, self._keys, self._queries, strict=True
                )
            ]
            paged = _Pages.draw(seen, _longest(self._keys), self._page_size, self._generator)
            options = options._replace(page_table=paged.table.to(self._device))
            k, v = paged.store(k), paged.store(v)
            real = real[0], paged.store(real[1]), paged.store(real[2])
        if variant.v_colmajor:
            options = options._replace(v_colmajor_tokens=v.shape[-3])
            v = to_colmajor(v, Tokens(options.cu_seqlens_k, options.seqused_k))
        narrow = torch.bfloat16 if self._packed else torch.float16
        out_dtype = narrow if float8 else q.dtype
        sinks = self._uniform(_HEADS) * 4.0
        return Problem(q, k, v, sinks, options, real, out_dtype, sm_margin)

    @property
    def _page_size(self) -> int:
        """0: k and v do not lie in pages. An e4m3 cache under a 16-bit q does in one problem."""
        if self._variant.cache == "e4m3":
            return 20 if self._packed else 0
        sizes = (1, 20) if self._variant.gather else (16, 48)
        return sizes[not self._packed] if self._variant.paged else 0

    @property
    def _pads(self) -> bool:
        """Whether pages have left padding. By TMA they do with a mask at the left edge only."""
        variant = self._variant
        return variant.gather or variant.cache == "e4m3" or variant.mask == "local"

    def _first_seen(self, padding: int, used: int, queries: int) -> int:
        """The first key of a sequence that some query sees, counted with its padding."""
        if self._variant.mask != "local":
            return padding
        return padding + max(0, used - padding - queries - _WINDOW[0])

    @property
    def _packed_keys(self) -> bool:
        return self._packed and self._page_size == 0

    def _lengths(self) -> dict[str, Any]:
        if all(rows in (*_EVEN, *_ODD) for rows in (self._queries, self._keys)):
            return {}
        found: dict[str, Any] = {}
        for side, rows in (("q", self._queries), ("k", self._keys)):
            found[f"seqused_{side}"] = self._int32([used for _, used in rows])
            if self._packed if side == "q" else self._packed_keys:
                ends = [_total(rows[:n]) for n in range(len(rows) + 1)]
                found[f"cu_seqlens_{side}"] = self._int32(ends)
                found[f"max_seqlen_{side}"] = _longest(rows)
        return found

    def _fp8(self) -> dict[str, Any]:
        """Descales that differ everywhere, and means. One problem has Q's by KV head, as in FA3."""
        variant, batch = self._variant, len(self._queries)
        heads_q = _HEADS_KV if variant.scales == "head" and self._packed else _HEADS
        found: dict[str, Tensor | None] = {
            "q_descale": self._descale(heads_q, self._queries),
            "k_descale": self._descale(_HEADS_KV, self._keys),
            "v_descale": self._descale(_HEADS_KV, self._keys),
            "v_mean": self._normal(batch, _HEADS_KV, variant.head_dim_v) * 0.2,
        }
        if variant.dropout:  # the weights that it leaves do not sum to 1
            found["v_mean"] = None
        if self._channel_descales:
            channels = self._uniform(batch, _HEADS_KV, variant.head_dim_v)
            found["v_channel_descale"] = channels + 0.5
        if not variant.softcap:  # the cap is of scores that the mean belongs to
            found["k_mean"] = self._normal(batch, _HEADS_KV, variant.head_dim) * 0.5
        return found

    def _of_cache(self) -> dict[str, Any]:
        """Descales of k and v that differ everywhere."""
        names = ("k_descale", "v_descale")
        return {name: self._descale(_HEADS_KV, self._keys) for name in names}

    def _descale(self, heads: int, rows: _Lengths) -> Tensor:
        shape: tuple[int, ...] = (len(rows), heads)
        if self._variant.scales == "block" and self._packed:
            shape = (1, heads, num_packed_blocks(_total(rows), len(rows)))
        elif self._variant.scales == "block":
            shape = (*shape, num_blocks(_longest(rows)))
        return (self._uniform(*shape) * 0.6 + 0.5) / _UNIT

    def _tensor(
        self, rows: _Lengths, heads: int, width: int, packed: bool, dtype: torch.dtype
    ) -> Tensor:
        """Normal values in used rows, NaN in the others."""
        longest = _longest(rows)
        x = torch.full(
            (len(rows), longest, heads, width), math.nan, dtype=torch.float32, device="cpu"
        )
        for sequence, (_, used) in zip(x, rows, strict=True):
            sequence[:used].normal_(generator=self._generator)
        if packed:
            x = torch.cat([sequence[: length[0]] for sequence, length in zip(x, rows, strict=True)])
        unit = _UNIT if dtype == E4M3 else 1.0
        return (x * unit).to(dtype).to(self._device)

    def _real(
        self, q: Tensor, k: Tensor, v: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        if k.dtype != E4M3:
            return q.double(), k.double(), v.double()
        of_q = Tokens(options.cu_seqlens_q)
        of_k = Tokens(options.cu_seqlens_k)
        if options.q_descale is None:
            q = q.double()
        else:
            scale = of_q.spread_descale(options.q_descale, q)
            q = q.double() * scale.repeat_interleave(q.shape[-2] // scale.shape[-2], dim=-2)
        k = k.double() * of_k.spread_descale(options.k_descale, k)  # type: ignore[arg-type]
        v = v.double() * of_k.spread_descale(options.v_descale, v)  # type: ignore[arg-type]
        if options.v_channel_descale is not None:
            v = v * of_k.spread(options.v_channel_descale, v)
        v = v if options.v_mean is None else v + of_k.spread(options.v_mean, v)
        return q, k if options.k_mean is None else k + of_k.spread(options.k_mean, k), v

    def _uniform(self, *shape: int) -> Tensor:
        x = torch.rand(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return x.to(self._device)

    def _normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return x.to(self._device)

    def _seed(self) -> Tensor:
        """With bits in both halves."""
        bits = torch.randint(2**62, (1,), generator=self._generator, dtype=torch.int64)
        return bits.to(self._device)

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


class _Pages(NamedTuple):
    """Pages in no order. Nobody owns the last one. Where no query of a sequence sees a key, slots
    are NaN and the table has no page."""

    table: Tensor  # (sequences, columns)
    seen: list[tuple[int, int]]  # keys [begin, end) of each sequence
    size: int

    @classmethod
    def draw(
        cls, seen: list[tuple[int, int]], longest: int, size: int, generator: torch.Generator
    ) -> "_Pages":
        columns = -(-longest // size)
        order = torch.randperm(len(seen) * columns, generator=generator, device="cpu").int()
        table = order.view(len(seen), columns)
        nowhere = torch.tensor(NO_PAGES, dtype=torch.int32, device="cpu").repeat(columns)
        for row, (begin, end) in zip(table, seen, strict=True):
            column = torch.arange(columns, device="cpu")
            freed = (column < begin // size) | (column >= -(-end // size)) | (begin >= end)
            row[freed] = nowhere[: int(freed.sum())]
        return cls(table, seen, size)

    def store(self, x: Tensor) -> Tensor:
        """x, (sequences, rows, heads, d), in pages; the rest is NaN."""
        sequences, columns = self.table.shape
        shape = (sequences * columns + 1, self.size, *x.shape[2:])
        pages = torch.full(shape, math.nan, dtype=torch.float32, device=x.device).to(x.dtype)
        for row, (begin, end), sequence in zip(self.table.tolist(), self.seen, x, strict=True):
            for column in range(begin // self.size, -(-end // self.size) if begin < end else 0):
                start = column * self.size
                keys = sequence[max(start, begin) : min(start + self.size, end)]
                first = max(0, begin - start)
                pages[row[column], first : first + len(keys)] = keys
        return pages


def _total(rows: _Lengths) -> int:
    return sum(length for length, _ in rows)


def _longest(rows: _Lengths) -> int:
    return max(length for length, _ in rows)

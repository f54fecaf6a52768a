"""Which tokens each rank has.

A sequence is cut into pieces of equal length, one per rank ("contiguous") or two ("zigzag"): of 2 P
pieces rank r has number r and number 2 P - 1 - r, an early and a late one, so that causal attention
is the same work for every rank. Piece i of n begins at token i * length // n: any length will do,
and a sequence that is shorter than n leaves some pieces empty. A rank's tokens lie by sequence, the
early piece before the late one.

A piece of n is the union of U pieces of n * U, so ranks that are joined in groups of U have, group
by group, what fewer ranks would have. That is what "ulysses+ring" stands on.
"""

import functools
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

LAYOUTS = ("zigzag", "contiguous")

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Span(NamedTuple):
    """Tokens [begin, end) of a sequence, the `part`-th of its rank."""

    sequence: int
    part: int
    begin: int
    end: int


class Batch(NamedTuple):
    """Packed sequences and how they are cut. It is hashed: indices and plans are kept by it."""

    lengths: tuple[int, ...]
    layout: str

    def spans(self, ranks: int, rank: int) -> list[Span]:
        """The tokens of one of so many ranks, in the order in which it has them."""
        pieces, own = ranks, [rank]
        if self.layout == "zigzag":
            pieces, own = 2 * ranks, [rank, 2 * ranks - 1 - rank]
        return [
            Span(sequence, part, piece * length // pieces, (piece + 1) * length // pieces)
            for sequence, length in enumerate(self.lengths)
            for part, piece in enumerate(own)
        ]

    @property
    def parts(self) -> int:
        """The number of spans of a sequence that a rank has."""
        return 2 if self.layout == "zigzag" else 1

    def counts(self, ranks: int) -> tuple[int, ...]:
        """The number of tokens of every rank."""
        return _counts(self, ranks)

    def offsets(self) -> list[int]:
        """Where each sequence begins among all tokens, and their number."""
        return [0, *accumulate(self.lengths)]


def kept(maxsize: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Keeps what a function makes of a batch: every layer of a step asks for the same. Indices
    that inference mode would make could not be saved for a backward later."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def outside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with torch.inference_mode(False):
                return function(*args, **kwargs)

        return functools.lru_cache(maxsize)(outside)  # type: ignore[return-value]

    return decorate


@kept(maxsize=64)
def _counts(batch: Batch, ranks: int) -> tuple[int, ...]:
    return tuple(
        sum(span.end - span.begin for span in batch.spans(ranks, rank)) for rank in range(ranks)
    )


@kept(maxsize=8)
def rows_of(batch: Batch, ranks: int, rank: int, device: torch.device) -> Tensor:
    """Which of all tokens a rank has, int64, in its order."""
    offsets = batch.offsets()
    found = [
        torch.arange(offsets[span.sequence] + span.begin, offsets[span.sequence] + span.end)
        for span in batch.spans(ranks, rank)
    ]
    return _joined(found).to(device)


@kept(maxsize=4)
def places_of(batch: Batch, ranks: int, device: torch.device) -> Tensor:
    """Where every token is once the ranks' tokens are gathered, int64: those of rank r lie at
    r * (the most that any rank has)."""
    longest = max(batch.counts(ranks))
    places = torch.empty(sum(batch.lengths), dtype=torch.int64)
    for rank in range(ranks):
        rows = rows_of(batch, ranks, rank, torch.device("cpu"))
        places[rows] = torch.arange(len(rows)) + rank * longest
    return places.to(device)


@kept(maxsize=4)
def joined_order(batch: Batch, ranks: int, joined: int, rank: int, device: torch.device) -> Tensor:
    """For `joined` ranks that together have the tokens of rank `rank` of ranks / joined: where each
    of these tokens is among those of the joined ranks, one rank after the other."""
    cpu = torch.device("cpu")
    members = [rows_of(batch, ranks, rank * joined + i, cpu) for i in range(joined)]
    place = torch.empty(sum(batch.lengths), dtype=torch.int64)
    source = _joined(members)
    place[source] = torch.arange(len(source))
    return place[rows_of(batch, ranks // joined, rank, cpu)].to(device)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

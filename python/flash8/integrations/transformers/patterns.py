"""Which pattern a mask function of transformers draws, found without drawing it.

transformers describes a mask by a function of indices, f(batch, head, query, key) -> visible.
The usual functions are known by identity or by the options that come with them. Packed sequences
(and chunks) are closures; those are evaluated along a few diagonals, O(seqlen) elements, which
shows where sequences begin, and checked at the edges of what the layout would then let through.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

MaskFunction = Callable[[Any, Any, Any, Any], Tensor]


@dataclass(frozen=True)
class Request:
    """What transformers asks for: the mask of queries [q_offset, + q_length) over the key slots
    [kv_offset, + kv_length)."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int | Tensor  # a tensor with a static cache
    kv_offset: int
    mask_function: MaskFunction
    local_size: int | None  # of a sliding window or a chunk
    is_chunked: bool
    known_causal: bool  # nothing but local_size modifies a causal mask
    known_bidirectional: bool
    wants_packing: bool  # of whole sequences, rather than to leave left padding where it is
    device: torch.device
    owner: str
    left_padding: Tensor | int = 0  # (batch, 1), where chunks are counted from


@dataclass(frozen=True)
class Pattern:
    """causal or bidirectional, with a window where `window` is given, in sequences that begin where
    `begins` (batch, seqlen) says, or with each row. `begins` counts chunks, where `chunk` is given,
    as sequences; `packing_known` says that it counts packed sequences."""

    causal: bool
    window: int | None = None
    begins: Tensor | None = None
    chunk: int | None = None
    packing_known: bool = False


def known_pattern(request: Request) -> Pattern | None:
    """The pattern, where it takes no look at the mask function's values."""
    if request.mask_function is causal_mask_function:
        return Pattern(causal=True)
    if request.mask_function is bidirectional_mask_function:
        return Pattern(causal=False)
    if request.is_chunked and request.local_size is not None:
        fits = request.kv_offset + request.kv_length <= request.local_size
        plain = request.known_causal or request.q_length == 1
        return Pattern(causal=True) if fits and plain else None
    if request.known_bidirectional:
        return Pattern(causal=False, window=request.local_size)
    # One query over a cache: only a static cache keeps transformers from calling it plain.
    if request.known_causal or request.q_length == 1:
        return Pattern(causal=True, window=request.local_size)
    return None


def recognise(request: Request) -> Pattern:
    """The pattern of any request.

    Raises:
        ValueError: the mask function draws something that flash8 does not serve.
    """
    chunk = request.local_size if request.is_chunked else None
    _refuse_over_a_cache(request, chunk)
    if chunk is None:
        return _probe(request, request.local_size)
    return replace(_probe(request, window=None), chunk=chunk, packing_known=False)


def recognise_in_graph(request: Request) -> tuple[Pattern, Tensor]:
    """The pattern of any request in a graph, where its values cannot be looked at, and whether no
    row is packed, a bool tensor.

    That the function draws a packing of causal sequences at most is asserted when the graph runs.
    """
    chunk = request.local_size if request.is_chunked else None
    _refuse_over_a_cache(request, chunk)
    diagonals = _Diagonals(request)
    token = diagonals.token
    begins = _begins(~diagonals(token, token - 1))
    window = None if request.is_chunked else request.local_size
    # Fewer places than where the length is known: the number of probes would be part of the graph.
    places = [token - 2, token - 4, torch.zeros_like(token)]
    wrong = _wrong(diagonals, token, _first(token, begins, window), token, places)
    torch._assert_async(~wrong.any(), _UNRECOGNISED.format(_NONE_OF_THEM))
    expected = torch.zeros_like(begins)
    if chunk is not None:
        expected = (token - request.left_padding) % chunk == 0
    return Pattern(causal=True, window=window, chunk=chunk), (begins == _begins(expected)).all()


def _refuse_over_a_cache(request: Request, chunk: int | None) -> None:
    if request.q_length == request.kv_length:
        return
    if chunk is None or request.kv_offset + request.kv_length <= chunk:
        raise _unrecognised("over a KV cache")
    raise ValueError(
        f"attention_chunk_size {chunk} is not supported over a KV cache of "
        f"{request.kv_offset + request.kv_length} tokens, which is longer; "
        "use attn_implementation='sdpa' for that"
    )


def _probe(request: Request, window: int | None) -> Pattern:
    diagonals = _Diagonals(request)
    token = diagonals.token
    previous, following = diagonals(token, token - 1), diagonals(token, token + 1)
    if previous[:, 1:].all() and following[:, :-1].all():
        reach = request.q_length if window is None else window
        _check(diagonals, token, token - reach, token + reach)
        return Pattern(causal=False, window=window)
    begins = _begins(~previous)
    _check(diagonals, token, _first(token, begins, window), token)
    if not begins[:, 1:].any():  # transformers may not have looked at the position_ids
        return Pattern(causal=True, window=window)
    return Pattern(causal=True, window=window, begins=begins, packing_known=True)


def _begins(flags: Tensor) -> Tensor:
    """(batch, seqlen); every row begins a sequence."""
    return F.pad(flags[:, 1:], (1, 0), value=True)


def _first(token: Tensor, begins: Tensor, window: int | None) -> Tensor:
    """The first token that each one sees."""
    first = torch.where(begins, token, 0).cummax(dim=1).values
    return first if window is None else torch.maximum(first, token - window + 1)


class _Diagonals:
    """Evaluates the mask function for pairs of a query and a key, one pair per query."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.token = torch.arange(request.q_length, device=request.device).expand(request.batch, -1)
        self._batch = torch.arange(request.batch, device=request.device)[:, None]

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries, keys: (batch, seqlen), keys anywhere: those past the ends count as the ends'.
        Returns bool (batch, seqlen)."""
        request = self._request
        keys = keys.clamp(0, request.kv_length - 1) + request.kv_offset
        head = torch.zeros_like(self._batch)
        visible = request.mask_function(self._batch, head, queries + request.q_offset, keys)
        return visible.expand(request.batch, request.q_length)


def _check(f: _Diagonals, token: Tensor, first: Tensor, last: Tensor) -> None:
    """Holds the function against `first <= key <= last`: at the edges, and at distances 1, 2, 4,
    ... to both sides, which tells strides, prefixes and blocks."""
    distances = [1 << i for i in range(token.shape[1].bit_length())]
    places = [token + sign * distance for distance in distances for sign in (-1, 1)]
    if _wrong(f, token, first, last, places).any():
        raise _unrecognised(_NONE_OF_THEM)


def _wrong(
    f: _Diagonals, token: Tensor, first: Tensor, last: Tensor, places: list[Tensor]
) -> Tensor:
    """Where the function is not `first <= key <= last`, at both edges and at some places."""
    length = token.shape[1]
    wrong = torch.zeros_like(token, dtype=torch.bool)
    for key in [first, first - 1, last, last + 1, token, *places]:
        exists = (key >= 0) & (key < length)
        wrong = wrong | exists & (f(token, key) != ((key >= first) & (key <= last)))
    return wrong


_NONE_OF_THEM = "that is neither causal, bidirectional, a window nor a packing"
_UNRECOGNISED = (
    "the model asks for a mask {}, which is not supported: causal, bidirectional, sliding-window, "
    "chunked and packed masks are; use attn_implementation='sdpa' for others"
)


def _unrecognised(what: str) -> ValueError:
    return ValueError(_UNRECOGNISED.format(what))

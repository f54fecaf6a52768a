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
    if chunk is None:
        return _probe(request, request.local_size)
    if request.q_length == request.kv_length:
        return replace(_probe(request, window=None), chunk=chunk, packing_known=False)
    if request.kv_offset + request.kv_length <= chunk:
        raise _unrecognised("over a KV cache")
    raise ValueError(
        f"attention_chunk_size {chunk} is not supported over a KV cache of "
        f"{request.kv_offset + request.kv_length} tokens, which is longer; "
        "use attn_implementation='sdpa' for that"
    )


def _probe(request: Request, window: int | None) -> Pattern:
    if request.q_length != request.kv_length:
        raise _unrecognised("over a KV cache")
    diagonals = _Diagonals(request)
    token = torch.arange(request.q_length, device=request.device).expand(request.batch, -1)
    previous, following = diagonals(token, token - 1), diagonals(token, token + 1)
    if previous[:, 1:].all() and following[:, :-1].all():
        reach = request.q_length if window is None else window
        _check(diagonals, token, token - reach, token + reach)
        return Pattern(causal=False, window=window)
    begins = ~previous
    begins[:, 0] = True
    first = torch.where(begins, token, 0).cummax(dim=1).values
    if window is not None:
        first = torch.maximum(first, token - window + 1)
    _check(diagonals, token, first, token)
    if not begins[:, 1:].any():  # transformers may not have looked at the position_ids
        return Pattern(causal=True, window=window)
    return Pattern(causal=True, window=window, begins=begins, packing_known=True)


class _Diagonals:
    """Evaluates the mask function for pairs of a query and a key, one pair per query."""

    def __init__(self, request: Request) -> None:
        self._request = request
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
    """Holds the function against `first <= key <= last`: at both edges, and at distances 1, 2, 4,
    ... to both sides, which tells strides, prefixes and blocks."""
    length = token.shape[1]
    distances = [1 << i for i in range(length.bit_length())]
    probes = [first, first - 1, last, last + 1, token]
    probes += [token + sign * distance for distance in distances for sign in (-1, 1)]
    wrong = torch.zeros_like(token, dtype=torch.bool)
    for key in probes:
        exists = (key >= 0) & (key < length)
        wrong |= exists & (f(token, key) != ((key >= first) & (key <= last)))
    if wrong.any():
        raise _unrecognised("that is neither causal, bidirectional, a window nor a packing")


def _unrecognised(what: str) -> ValueError:
    return ValueError(
        f"the model asks for a mask {what}, which is not supported: causal, bidirectional, "
        "sliding-window, chunked and packed masks are; use attn_implementation='sdpa' for others"
    )

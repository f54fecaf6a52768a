"""Packed sequences that a call describes beside the mask: by boundaries, or by position_ids.

Many models make their mask without the position_ids that say where packed sequences begin, but
hand those on to every layer. A layer therefore looks for sequences too, once per forward: what it
finds is kept in the layout, which all layers share.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash8.integrations.transformers.layouts import Cached, Layout, Packed, Tokens
from flash8.varlen import max_seqlen_of, position_ids_from_cu_seqlens

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
_INTEGERS = (torch.int32, torch.int64)
_RESTART = (
    "position_ids restart: inside torch.compile or a CUDA graph give packed sequences as "
    "cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k"
)


def resolve(layout: Layout, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> Layout:
    """The layout with the packed sequences that the keyword arguments of a layer describe.

    Args:
        layout: of the mask.
        q, k: (batch, seqlen, ...).
        kwargs: cu_seq_lens_q, cu_seq_lens_k (sequences + 1,), max_length_q and max_length_k, as
            `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them; they need no
            look at the data and come first. Else position_ids (batch or 1, seqlen_q) that restart.

    Raises:
        ValueError: boundaries beside a padding mask or a static cache; half of the boundaries;
            position_ids that restart over a KV cache.
    """
    given = _given(q, k, kwargs)
    if given is not None:
        return _bounded(layout, *given)
    if layout.unpacked is not None:
        torch._assert_async(layout.unpacked, _RESTART)
        return layout
    position_ids = kwargs.get("position_ids")
    batch, q_length, kv_length = q.shape[0], q.shape[1], k.shape[1]
    if position_ids is None or layout.packing_known:
        return layout
    if not _are_positions(position_ids, batch, q_length):
        return layout
    rows = position_ids.expand(batch, -1)
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        _assert_unpacked(layout, rows, q_length == kv_length)
        return layout
    known = layout.memo.get(id(position_ids))
    if known is None or known[0] is not position_ids:
        found = _with_positions(layout, rows, q_length == kv_length)
        known = layout.memo[id(position_ids)] = (position_ids, found)
    resolved: Layout = known[1]
    return resolved


def tokens_from_begins(begins: Tensor, indices: Tensor | None = None) -> Tokens:
    """One sequence from each begin to the next; `begins` bool (total,) of the used tokens."""
    starts = begins.nonzero().flatten()
    cu_seqlens = F.pad(starts, (0, 1), value=begins.numel()).to(torch.int32)
    return Tokens(indices, cu_seqlens, max_seqlen_of(cu_seqlens))


def _given(q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> tuple[Tokens, Tokens] | None:
    cu_q, cu_k = (kwargs.get(name) for name in _BOUNDARIES)
    if cu_q is None and cu_k is None:
        return None
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together, got one of them")
    cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
    max_q, max_k = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    return (
        Tokens(None, cu_q, _longest(q, cu_q) if max_q is None else int(max_q)),
        Tokens(None, cu_k, _longest(k, cu_k) if max_k is None else int(max_k)),
    )


def _longest(x: Tensor, cu_seqlens: Tensor) -> int:
    """At least the longest sequence, of those that x (batch, seqlen, ...) may hold in a graph."""
    if torch.compiler.is_compiling():
        return x.shape[0] * x.shape[1]
    return max_seqlen_of(cu_seqlens)


def _bounded(layout: Layout, queries: Tokens, keys: Tokens) -> Layout:
    if isinstance(layout, Cached) or (isinstance(layout, Packed) and layout.is_padded):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k cannot be combined with a padding mask or a static "
            "cache; pass attention_mask=None"
        )
    if layout.chunk is not None:
        queries = keys = _chunked(layout, queries)
    return Packed(
        *(layout.causal, layout.window, queries, keys),
        chunk=layout.chunk,
        attention_chunk=layout.attention_chunk,
    )


def _chunked(layout: Layout, sequences: Tokens) -> Tokens:
    """Sequences cut into chunks, each counted from the begin of its sequence."""
    assert layout.chunk is not None
    key = id(sequences.cu_seqlens)
    known = layout.memo.get(key)
    if known is None or known[0] is not sequences.cu_seqlens:
        total = int(sequences.cu_seqlens[-1])
        position = position_ids_from_cu_seqlens(sequences.cu_seqlens, total)
        chunks = tokens_from_begins(position % layout.chunk == 0)
        known = layout.memo[key] = (sequences.cu_seqlens, chunks)
    found: Tokens = known[1]
    return found


def _split_chunks(begins: Tensor, chunk: int) -> Tensor:
    """Where chunks begin, given where sequences begin; both bool (total,)."""
    token = torch.arange(begins.numel(), device=begins.device)
    first = torch.where(begins, token, 0).cummax(0).values
    return (token - first) % chunk == 0


def _are_positions(position_ids: Any, batch: int, q_length: int) -> bool:
    """Whether these are positions of tokens: other models hand on coordinates in an image, or
    three positions per token."""
    return (
        isinstance(position_ids, Tensor)
        and position_ids.dim() == 2
        and position_ids.dtype in _INTEGERS
        and position_ids.shape[0] in (1, batch)
        and position_ids.shape[1] == q_length > 1
    )


def _with_positions(layout: Layout, rows: Tensor, same_tokens: bool) -> Layout:
    """rows: (batch, seqlen_q)."""
    indices = _used(layout, rows.shape[1], same_tokens)
    firsts, restarts = _restarts(rows, indices)
    if not restarts.any():
        return layout
    if not same_tokens:
        raise ValueError(
            "position_ids restart, so several sequences are packed into a row, which is not "
            "supported over a KV cache or in cross-attention; pass use_cache=False"
        )
    begins = firsts | restarts
    if layout.chunk is not None:
        begins = _split_chunks(begins, layout.chunk)
    tokens = tokens_from_begins(begins, indices)
    return Packed(layout.causal, layout.window, tokens, tokens, chunk=layout.chunk)


def _used(layout: Layout, q_length: int, same_tokens: bool) -> Tensor | None:
    """Indices of the query tokens that are no padding; None: all are used."""
    if isinstance(layout, Packed):
        return layout.keys.indices if same_tokens else layout.queries.indices
    if isinstance(layout, Cached) and layout.leftpad is not None:
        first = layout.leftpad - (layout.used - q_length)
        slots = torch.arange(q_length, device=first.device)
        return (slots >= first[:, None]).flatten().nonzero().flatten()
    return None


def _restarts(rows: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the used tokens of all rows: whether each is the first of its row, and whether positions
    start again there, lower than the one before or at that of the row's first token."""
    position = rows.flatten()
    token = torch.arange(position.numel(), device=rows.device)
    row = token // rows.shape[1]
    if indices is not None:
        position, row = position[indices], row[indices]
        token = token[: position.numel()]
    firsts = F.pad(row[1:] != row[:-1], (1, 0), value=True)[: position.numel()]
    start = torch.where(firsts, token, 0).cummax(0).values
    previous = position.roll(1)
    return firsts, ~firsts & ((position < previous) | (position == position[start]))


def _assert_unpacked(layout: Layout, rows: Tensor, same_tokens: bool) -> None:
    """In a graph, where nothing may depend on the data, packing is refused instead."""
    if isinstance(layout, Cached) and layout.leftpad is not None:
        return  # indices of padding are data; generate() made it, and packs nothing
    if isinstance(layout, Packed):
        tokens = layout.keys if same_tokens else layout.queries
        _, restarts = _restarts(rows, tokens.indices)
        used = torch.arange(restarts.numel(), device=rows.device) < tokens.cu_seqlens[-1]
        restarts = restarts & used
    else:
        _, restarts = _restarts(rows, None)
    torch._assert_async(~restarts.any(), _RESTART)

"""The mask function that models call once per forward: it answers with a layout, not a mask."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from flash8.integrations.transformers.fp8 import wants_fp8
from flash8.integrations.transformers.layouts import (
    UNBOUNDED,
    Cached,
    Dense,
    Layout,
    Packed,
    Tokens,
)
from flash8.integrations.transformers.packing import tokens_from_begins
from flash8.integrations.transformers.patterns import (
    MaskFunction,
    Pattern,
    Request,
    known_pattern,
    recognise,
    recognise_in_graph,
)
from flash8.varlen import cu_seqlens_from_mask, max_seqlen_of


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | Layout | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Layout:
    """The layout of a mask, as transformers' `AttentionMaskInterface` asks for it.

    Args:
        batch_size, q_length, kv_length: sizes of the attention call.
        q_offset, kv_offset: the slots of the first query and of the first key.
        mask_function: f(batch, head, query slot, key slot) -> visible.
        attention_mask: (batch, slots), nonzero where a token is valid.
        local_size: of a sliding window or a chunk.
        use_vmap: set for masks that a caller composed.

    Returns:
        A `Layout`, never None: a model that computes attention itself would take None for a mask
        that hides nothing, while a Layout refuses to be computed with.

    Raises:
        ValueError: the mask is none that flash8 serves.

    Looks at the data of a padding mask or of packed positions, once per forward, and so waits for
    the device; with neither it does not. In a graph nothing is looked at: padded tokens are sorted
    behind the others, and what must be known of the data is asserted when the graph runs.
    """
    if isinstance(attention_mask, Layout):  # made ahead by generate()
        return attention_mask
    if use_vmap:
        raise ValueError(
            "masks composed with or_mask_function or and_mask_function are not supported; "
            "use attn_implementation='sdpa' or 'eager' for that"
        )
    request = Request(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        local_size,
        is_chunked=local_size is not None and _chunk_size(config) == local_size,
        known_causal=allow_is_causal_skip,
        known_bidirectional=allow_is_bidirectional_skip,
        wants_packing=torch.is_grad_enabled() or wants_fp8(config),
        device=torch.device(device),
        owner=_owner(config),
    )
    if request.is_chunked and attention_mask is not None:
        request = replace(request, left_padding=_left_padding(attention_mask))
    pattern, unpacked = known_pattern(request), None
    if pattern is None and _in_graph():
        pattern, unpacked = recognise_in_graph(request)
    elif pattern is None:
        pattern = recognise(request)
    valid = None if attention_mask is None else _valid_slots(request, attention_mask)
    return _layout(request, pattern, valid, unpacked)


def _in_graph() -> bool:
    return torch.compiler.is_compiling()


def _owner(config: Any) -> str:
    kind = getattr(config, "model_type", None)
    return "the model" if not kind else f"the model of type {kind!r}"


def _chunk_size(config: Any) -> int | None:
    if getattr(config, "sliding_window", None) is not None:
        return None
    return getattr(config, "attention_chunk_size", None)


def _layout(
    request: Request, pattern: Pattern, valid: Tensor | None, unpacked: Tensor | None
) -> Layout:
    make = _causal if pattern.causal else _bidirectional
    cut = pattern.begins is not None
    return replace(
        make(request, pattern, valid),
        chunk=pattern.chunk if cut else None,
        attention_chunk=0 if cut else pattern.chunk or 0,
        unpacked=unpacked,
        packing_known=pattern.packing_known,
        owner=request.owner,
    )


def _left_padding(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)


def _valid_slots(request: Request, attention_mask: Tensor) -> Tensor:
    """The padding mask of the key slots, bool (batch, kv_length); slots past it are invalid."""
    if attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be a padding mask (batch, seqlen), got shape "
            f"{tuple(attention_mask.shape)}; use attn_implementation='sdpa' for other masks"
        )
    end = request.kv_offset + request.kv_length
    mask = attention_mask.to(device=request.device, dtype=torch.bool)
    mask = F.pad(mask, (0, max(0, end - mask.shape[1])))
    return mask[:, request.kv_offset : end].expand(request.batch, -1)


def _causal(request: Request, pattern: Pattern, valid: Tensor | None) -> Layout:
    window = _causal_window(request, pattern)
    used = request.q_offset + request.q_length - request.kv_offset
    aligned = request.q_length == request.kv_length
    aligned = aligned or (not isinstance(used, Tensor) and used == request.kv_length)
    slots = torch.arange(request.kv_length, device=request.device)
    if valid is not None and not aligned:
        valid = valid & (slots < used)
    if valid is not None and not _are_true(valid | (slots >= used)):
        return _padded(request, pattern, valid, used)
    if pattern.begins is not None:
        everything = _sequences(pattern.begins, None)
        return Packed(True, window, everything, everything)
    if not aligned:
        return Cached(True, window, _per_row(request, used), None)
    return Dense(True, window)


def _padded(
    request: Request, pattern: Pattern, valid: Tensor, used: int | Tensor
) -> Cached | Packed:
    """Left padding stays where it is over a cache and in inference; everything else is packed."""
    window = _causal_window(request, pattern)
    without_cache = request.q_length == request.kv_length
    slots = torch.arange(request.kv_length, device=request.device)
    leftpad = valid.int().argmax(dim=1).to(torch.int32)
    is_left = _are_true(valid == ((slots >= leftpad[:, None]) & (slots < used)))
    if is_left and pattern.begins is None and not (without_cache and request.wants_packing):
        return Cached(True, window, _per_row(request, used), leftpad)
    if window != UNBOUNDED or (pattern.chunk is not None and pattern.begins is None):
        _refuse_holes(valid)
    if pattern.begins is not None:
        tokens = _sequences(pattern.begins, valid)
        return Packed(True, window, tokens, tokens)
    query_slots = torch.arange(request.q_length, device=request.device) + (used - request.q_length)
    keys = _rows(valid)
    queries = keys if without_cache else _rows(valid.index_select(1, query_slots))
    return Packed(True, window, queries, keys)


def _bidirectional(request: Request, pattern: Pattern, valid: Tensor | None) -> Layout:
    window = UNBOUNDED
    if pattern.window is not None and pattern.window < request.kv_length:
        window = (pattern.window, pattern.window)
        if request.q_length != request.kv_length:
            raise ValueError(
                "a bidirectional window needs as many queries as keys, got "
                f"{request.q_length} and {request.kv_length}"
            )
    if valid is None or _are_true(valid):
        return Dense(False, window)
    keys = _rows(valid)
    if window != UNBOUNDED:
        _refuse_holes(valid)
        return Packed(False, window, keys, keys)
    # Queries may belong to another sequence than the padded keys (cross-attention): all are used.
    boundaries = torch.arange(request.batch + 1, dtype=torch.int32, device=request.device)
    queries = Tokens(None, boundaries * request.q_length, request.q_length)
    return Packed(False, window, queries, keys)


def _causal_window(request: Request, pattern: Pattern) -> tuple[int, int]:
    if pattern.window is None or pattern.window >= request.kv_length:
        return UNBOUNDED
    return pattern.window - 1, 0


def _per_row(request: Request, used: int | Tensor) -> Tensor:
    lengths = torch.as_tensor(used, dtype=torch.int32, device=request.device)
    return lengths.expand(request.batch).contiguous()


def _are_true(flags: Tensor) -> bool:
    """False in a graph, where they cannot be looked at: the way of any flags serves."""
    return not _in_graph() and bool(flags.all())


def _rows(valid: Tensor) -> Tokens:
    """One sequence per row, of its valid tokens."""
    cu_seqlens = cu_seqlens_from_mask(valid)
    if _in_graph():
        order = torch.argsort(~valid.flatten(), stable=True)
        return Tokens(order, cu_seqlens, valid.shape[1])
    return Tokens(valid.flatten().nonzero().flatten(), cu_seqlens, max_seqlen_of(cu_seqlens))


def _sequences(begins: Tensor, valid: Tensor | None) -> Tokens:
    """One sequence from each begin to the next, of valid tokens."""
    flat = begins.flatten()
    indices = None
    if valid is not None:
        # A sequence begins at its first valid token.
        sequence = flat.cumsum(0)
        indices = valid.flatten().nonzero().flatten()
        sequence = sequence[indices]
        flat = sequence != F.pad(sequence, (1, 0))[:-1]
    return tokens_from_begins(flat, indices)


def _refuse_holes(valid: Tensor) -> None:
    """A window counts slots; once padding is dropped it would count tokens."""
    runs = (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1) + valid[:, 0]
    reason = (
        "attention_mask has padding between valid tokens, which is not supported with a sliding "
        "window or chunks; pad on the left, or use attn_implementation='sdpa'"
    )
    if _in_graph():
        torch._assert_async((runs <= 1).all(), reason)
    elif (runs > 1).any():
        raise ValueError(reason)

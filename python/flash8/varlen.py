"""Packing of sequences of different lengths, and the index tensors that describe it.

A packed tensor holds all tokens of all sequences back to back, ``(total, ...)``; ``cu_seqlens``
``(batch + 1,)`` int32 says that sequence ``i`` lies at ``[cu_seqlens[i], cu_seqlens[i + 1])``.

Every function works on any device and carries gradients where it moves values. Values inside
index tensors are checked on CPU tensors only, outside ``torch.compile``: elsewhere a check would
stop the host until the device has caught up. What does wait for the device is marked "Syncs".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash8.tensors.arguments import require_int, require_rank, require_tensor

__all__ = [
    "PackedBatch",
    "cu_seqlens_from_lengths",
    "cu_seqlens_from_mask",
    "cu_seqlens_from_position_ids",
    "max_seqlen_of",
    "pack",
    "pad_input",
    "position_ids_from_cu_seqlens",
    "unpack",
    "unpad_input",
]

_INT32_MAX = 2**31 - 1
_INTEGER_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class PackedBatch(NamedTuple):
    """Sequences back to back: what :func:`pack` returns; unpacks like a plain tuple.

    ``values`` is ``(total, ...)``, ``cu_seqlens`` is ``(batch + 1,)`` int32 on its device, and
    ``max_seqlen`` is the longest length as a Python int.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def cu_seqlens_from_lengths(
    lengths: Tensor | Sequence[int], *, device: torch.device | str | None = None
) -> Tensor:
    """Cumulative lengths with a leading zero.

    Args:
        lengths: ``(batch,)`` integers, each >= 0: a tensor or a sequence of Python ints.
        device: where the result goes; the device of ``lengths`` (CPU for a sequence) by default.

    Returns:
        ``(batch + 1,)`` int32.

    Raises:
        TypeError: ``lengths`` holds no integers.
        ValueError: it is not one-dimensional, has a negative entry, or sums past int32.
    """
    if not isinstance(lengths, Tensor):
        lengths = _lengths_tensor(lengths)
    _check_integers("lengths", lengths, ndim=1)
    total = lengths.cumsum(0, dtype=torch.int64)
    if _may_read(lengths) and lengths.numel() > 0:
        _check_lengths(lengths, int(total[-1]))
    cu_seqlens = F.pad(total, (1, 0)).to(torch.int32)
    # From the CPU the copy need not wait for the device; towards the CPU it must.
    return cu_seqlens.to(device or lengths.device, non_blocking=lengths.device.type == "cpu")


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Boundaries of packed sequences, from the position of every token.

    A sequence begins at the first token, at every position 0, and wherever a position is not its
    predecessor plus one; each row of a two-dimensional input begins a new sequence.

    Args:
        position_ids: ``(total,)`` or ``(batch, seqlen)`` integers; rows are read one after
            another, so the result describes the flattened tokens.

    Returns:
        ``(sequences + 1,)`` int32 on the device of ``position_ids``.

    Raises:
        TypeError: ``position_ids`` holds no integers.
        ValueError: it has neither one nor two dimensions.

    Syncs: once (the number of sequences is a shape).
    """
    _check_integers("position_ids", position_ids, ndim=(1, 2))
    flat = position_ids.reshape(-1)
    begins = (flat == 0) | (flat != flat.roll(1) + 1)
    row = position_ids.shape[-1]
    begins = begins | (torch.arange(flat.numel(), device=flat.device) % max(row, 1) == 0)
    starts = begins.nonzero().reshape(-1)
    return F.pad(starts, (0, 1), value=flat.numel()).to(torch.int32)


def cu_seqlens_from_mask(attention_mask: Tensor) -> Tensor:
    """Boundaries of the valid tokens of a padded batch once the padding is dropped.

    Only the number of valid tokens of each row counts, so padding may be on the left, on the
    right or in the middle; the tokens themselves are gathered by :func:`unpad_input`.

    Args:
        attention_mask: ``(batch, seqlen)`` bool or integers, nonzero where a token is valid.

    Returns:
        ``(batch + 1,)`` int32.

    Raises:
        TypeError: the mask is floating point (an additive mask has another meaning).
        ValueError: it is not two-dimensional.
    """
    valid = _mask("attention_mask", attention_mask)
    return cu_seqlens_from_lengths(valid.sum(dim=1, dtype=torch.int32))


def max_seqlen_of(cu_seqlens: Tensor) -> int:
    """The longest sequence that ``cu_seqlens`` ``(batch + 1,)`` describes; 0 for no sequence.

    Syncs: once.
    """
    _check_integers("cu_seqlens", cu_seqlens, ndim=1)
    _check_has_data("cu_seqlens", cu_seqlens)
    if cu_seqlens.numel() < 2:
        return 0
    return int(cu_seqlens.diff().max().item())


def position_ids_from_cu_seqlens(cu_seqlens: Tensor, total: int) -> Tensor:
    """Position of each of ``total`` packed tokens in its own sequence.

    Args:
        cu_seqlens: ``(batch + 1,)`` integers.
        total: number of packed tokens; those past ``cu_seqlens[-1]`` count on from there.

    Returns:
        ``(total,)`` int64.
    """
    _check_integers("cu_seqlens", cu_seqlens, ndim=1)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens must have at least one entry, got none")
    total = require_int("total", total, minimum=0, maximum=_INT32_MAX)
    token = torch.arange(total, device=cu_seqlens.device)
    ends = cu_seqlens[1:].contiguous()
    sequence = torch.searchsorted(ends, token.to(ends.dtype), right=True)
    return token - cu_seqlens[sequence]


def pack(tensors: Sequence[Tensor]) -> PackedBatch:
    """Concatenate sequences of different lengths along their first dimension.

    Args:
        tensors: one ``(length_i, ...)`` tensor per sequence; trailing shape, dtype and device
            agree. Lengths may be zero.

    Returns:
        :class:`PackedBatch`: ``values`` ``(sum of lengths, ...)``, ``cu_seqlens``, ``max_seqlen``.

    Raises:
        TypeError: an entry is no tensor, or dtypes differ.
        ValueError: no tensors, a zero-dimensional one, or shapes or devices that differ.
    """
    if getattr(tensors, "is_nested", False):
        raise TypeError("tensors must be a sequence of plain tensors, got a nested tensor")
    tensors = list(tensors)
    _check_packable(tensors)
    lengths = [tensor.shape[0] for tensor in tensors]
    cu_seqlens = cu_seqlens_from_lengths(lengths, device=tensors[0].device)
    return PackedBatch(torch.cat(tensors), cu_seqlens, max(lengths))


def unpack(packed: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Split a packed tensor into its sequences: the inverse of :func:`pack`.

    Args:
        packed: ``(total, ...)``.
        cu_seqlens: ``(batch + 1,)`` integers; ``cu_seqlens[-1]`` must not exceed ``total``.

    Returns:
        ``batch`` views of ``packed``, the ``i``-th ``(length_i, ...)``.

    Raises:
        TypeError: ``cu_seqlens`` holds no integers.
        ValueError: ``cu_seqlens`` does not describe ``packed``.

    Syncs: once when ``cu_seqlens`` is not on the CPU (lengths are shapes).
    """
    _check_integers("cu_seqlens", cu_seqlens, ndim=1)
    _check_rows("packed", packed, 1)
    _check_has_data("cu_seqlens", cu_seqlens)
    bounds = cu_seqlens.tolist()
    ascending = all(low <= high for low, high in pairwise(bounds))
    if not bounds or bounds[0] != 0 or not ascending or bounds[-1] > packed.shape[0]:
        raise ValueError(
            f"cu_seqlens must start at 0, never decrease and end at most at the {packed.shape[0]} "
            f"tokens of packed, got {_abridged(bounds)}"
        )
    return [packed[low:high] for low, high in pairwise(bounds)]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the padding of a padded batch.

    Argument order and return values follow ``flash_attn.bert_padding.unpad_input``.

    Args:
        hidden_states: ``(batch, seqlen, ...)``, any dtype.
        attention_mask: ``(batch, seqlen)`` bool or integers, nonzero where a token is valid.
        unused_mask: as ``attention_mask``; nonzero marks tokens that keep a place in the packed
            result but are not used.

    Returns:
        ``(hidden, indices, cu_seqlens, max_seqlen_in_batch, seqused)``: the kept tokens
        ``(total, ...)``; their places ``(total,)`` int64 in the flattened batch, as
        :func:`pad_input` wants them; ``(batch + 1,)`` int32; the largest number of kept tokens of
        a row as a Python int; and the valid tokens of each row ``(batch,)`` int32.

    Raises:
        TypeError: a mask is floating point.
        ValueError: shapes or devices that do not agree.

    Syncs: once (the number of kept tokens is a shape, the longest row a Python int). Under
    ``torch.compile`` these two break the graph unless
    ``torch._dynamo.config.capture_scalar_outputs`` is set.
    """
    _check_rows("hidden_states", hidden_states, 2)
    valid = _mask("attention_mask", attention_mask)
    kept = valid if unused_mask is None else valid | _mask("unused_mask", unused_mask, like=valid)
    if hidden_states.shape[:2] != valid.shape:
        raise ValueError(
            f"attention_mask must be {tuple(hidden_states.shape[:2])}, the batch and seqlen of "
            f"hidden_states, got {tuple(valid.shape)}"
        )
    _check_same_device("attention_mask", valid, "hidden_states", hidden_states)
    _check_has_data("attention_mask", valid)
    seqused = valid.sum(dim=1, dtype=torch.int32)
    kept_per_row = seqused if unused_mask is None else kept.sum(dim=1, dtype=torch.int32)
    cu_seqlens = cu_seqlens_from_lengths(kept_per_row)
    total, longest = _total_and_longest(cu_seqlens, kept_per_row)
    indices = torch.nonzero_static(kept.reshape(-1), size=total).reshape(-1)
    hidden = hidden_states.flatten(0, 1).index_select(0, indices)
    return hidden, indices, cu_seqlens, longest, seqused


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed tokens back into a padded batch; places without a token are zero.

    Argument order follows ``flash_attn.bert_padding.pad_input``.

    Args:
        hidden_states: ``(total, ...)``, any dtype.
        indices: ``(total,)`` int32 or int64 places in the flattened ``(batch * seqlen)``, each at
            most once, as :func:`unpad_input` returns them.
        batch: rows of the result.
        seqlen: columns of the result.

    Returns:
        ``(batch, seqlen, ...)``.

    Raises:
        TypeError: ``indices`` holds no integers.
        ValueError: ``indices`` does not match ``hidden_states`` or points outside the batch.
    """
    _check_integers("indices", indices, ndim=1)
    _check_rows("hidden_states", hidden_states, 1)
    batch = require_int("batch", batch, minimum=0, maximum=_INT32_MAX)
    seqlen = require_int("seqlen", seqlen, minimum=0, maximum=_INT32_MAX)
    if hidden_states.shape[0] != indices.shape[0]:
        raise ValueError(
            f"indices must hold one place for each token of hidden_states "
            f"{tuple(hidden_states.shape)}, got {indices.shape[0]}"
        )
    _check_same_device("indices", indices, "hidden_states", hidden_states)
    places = batch * seqlen
    if _may_read(indices) and indices.numel() > 0:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= places:
            raise ValueError(
                f"indices must lie in [0, batch * seqlen) = [0, {places}), got {low} to {high}"
            )
    padded = hidden_states.new_zeros(places, *hidden_states.shape[1:])
    padded = padded.index_copy(0, indices.long(), hidden_states)
    return padded.reshape(batch, seqlen, *hidden_states.shape[1:])


def _total_and_longest(cu_seqlens: Tensor, kept_per_row: Tensor) -> tuple[int, int]:
    """Both numbers in one trip from the device."""
    if kept_per_row.numel() == 0:
        return 0, 0
    total, longest = torch.stack((cu_seqlens[-1], kept_per_row.max())).tolist()
    torch._check(total >= 0)
    return total, longest


def _lengths_tensor(lengths: Sequence[int]) -> Tensor:
    lengths = list(lengths)
    for index, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"lengths must hold integers; entry {index} is {length!r}")
    return torch.tensor(lengths, dtype=torch.int64)


def _check_lengths(lengths: Tensor, total: int) -> None:
    shortest = int(lengths.min())
    if shortest < 0:
        raise ValueError(f"lengths must be >= 0, got {shortest} at {int(lengths.argmin())}")
    if total > _INT32_MAX:
        raise ValueError(f"lengths must sum to at most 2^31 - 1 (int32 offsets), got {total}")


def _check_packable(tensors: list[Tensor]) -> None:
    if not tensors:
        raise ValueError("tensors must hold at least one tensor, got none")
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or tensor.is_nested:
            what = "nested" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"tensors must hold plain tensors; entry {index} is {what}")
        if tensor.dim() == 0:
            raise ValueError(f"tensors must be (length, ...); entry {index} has no dimension")
    first = tensors[0]
    for index, tensor in enumerate(tensors):
        if tensor.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"tensors must agree after their first dimension; entry 0 is "
                f"{tuple(first.shape)}, entry {index} is {tuple(tensor.shape)}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"tensors must have one dtype; entry 0 is {first.dtype}, entry {index} is "
                f"{tensor.dtype}"
            )
        _check_same_device(f"tensors[{index}]", tensor, "tensors[0]", first)


def _check_integers(name: str, tensor: Tensor, ndim: int | tuple[int, ...]) -> None:
    require_tensor(name, tensor, _INTEGER_DTYPES)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if tensor.dim() not in allowed:
        wanted = " or ".join(str(n) for n in allowed)
        raise ValueError(f"{name} must have {wanted} dimension(s), got shape {tuple(tensor.shape)}")


def _check_rows(name: str, tensor: Tensor, ndim: int) -> None:
    """Refuses all but a tensor with at least `ndim` dimensions."""
    require_tensor(name, tensor, getattr(tensor, "dtype", torch.float32))
    if tensor.dim() < ndim:
        raise ValueError(f"{name} must have at least {ndim} dimension(s), got {tensor.dim()}")


def _check_has_data(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} must hold data, got a meta tensor")


def _mask(name: str, mask: Tensor, like: Tensor | None = None) -> Tensor:
    """The mask as bool; refuses additive masks, whose valid entries are zero."""
    require_tensor(name, mask, (torch.bool, *_INTEGER_DTYPES))
    require_rank(name, mask, 2, "(batch, seqlen)")
    if like is not None and mask.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of attention_mask {tuple(like.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    if like is not None:
        _check_same_device(name, mask, "attention_mask", like)
    return mask if mask.dtype == torch.bool else mask != 0


def _check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}"
        )


def _may_read(tensor: Tensor) -> bool:
    """Whether looking at values costs no device wait and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _abridged(values: Sequence[int], limit: int = 8) -> str:
    head = ", ".join(str(value) for value in values[:limit])
    return f"[{head}]" if len(values) <= limit else f"[{head}, ...] ({len(values)} entries)"

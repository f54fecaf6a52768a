"""New tokens into a KV cache in plain torch operations: the appending kernel's specification."""

from torch import Tensor

from flash8.call.request import Appended, Queries
from flash8.tensors.descales import BLOCK, checked
from flash8.tensors.float8 import saturating_cast
from flash8.tensors.rms_norm import rms_norm
from flash8.tensors.rotary import embed_position, token_positions, token_sequences


def append(*appended: Appended, queries: Queries | None = None) -> tuple[Tensor | None, Tensor]:
    """Writes the rows, into one cache or the two of a call. Returns the rotated queries, and the
    lengths of the sequences from now on. Raises ValueError where there is no room for the rows,
    before the first is written."""
    from flash8.backends.cpu.cache import append_rows

    pairs = [(a.cache, prepare(a)) for a in appended]
    a = appended[0]
    rotated = None if queries is None else rotate(queries)
    append_rows(pairs, a.starts, a.cu_seqlens, a.page_table, a.kv_batch_idx)
    return rotated, lengths(a)


def prepare(appended: Appended) -> Tensor:
    """The rows as they go into the cache."""
    a = appended
    if a.quantizes:
        return quantize(a)
    x = a.x if a.norm is None else rms_norm(a.x, a.norm)
    if a.rope is not None:
        x = embed_position(x, a.rope, a.starts.shape[0], a.cu_seqlens)
    return x.to(a.x.dtype)


def rotate(queries: Queries) -> Tensor:
    """The queries normalised and in position, rounded once."""
    x, rope, cu_seqlens, advances, norm = queries
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = x if norm is None else rms_norm(x, norm)
    if rope is not None:
        y = embed_position(y, rope, batch, cu_seqlens, advance=advances)
    return y.to(x.dtype)


def lengths(appended: Appended) -> Tensor:
    """Of every sequence, with its new rows."""
    if appended.cu_seqlens is None:
        return appended.starts + appended.x.shape[1]
    return appended.starts + (appended.cu_seqlens[1:] - appended.cu_seqlens[:-1])


def quantize(appended: Appended) -> Tensor:
    """The rows in e4m3, as they go into the cache: norm, position, mean, scale, cast."""
    a = appended
    x = a.x.float() if a.norm is None else rms_norm(a.x, a.norm).float()
    batch = a.starts.shape[0]
    if a.rope is not None:
        x = embed_position(x, a.rope, batch, a.cu_seqlens)
    sequences = token_sequences(x, batch, a.cu_seqlens)
    if a.mean is not None:
        x = x - (a.mean if a.mean.dim() == 2 else a.mean[sequences])
    if a.descale is not None:
        x = x * _of_rows(a, checked(a.descale), sequences).reciprocal()
    return saturating_cast(x)


def _of_rows(appended: Appended, descale: Tensor, sequences: Tensor) -> Tensor:
    """The descale of every row, broadcasting over (..., heads_kv, d); of rows without a place in
    the cache, which are refused or dropped later, any."""
    if descale.dim() == 0:
        return descale
    if descale.dim() == 2:
        return descale[sequences][..., None]
    rows = sequences
    if appended.kv_batch_idx is not None:
        slots = (descale if appended.page_table is None else appended.page_table).shape[0]
        rows = appended.kv_batch_idx.long()[rows].clamp(0, slots - 1)
    positions = token_positions(appended.x, appended.starts, appended.cu_seqlens)
    table = appended.page_table
    if table is None:
        blocks = (positions // BLOCK).clamp(0, descale.shape[2] - 1)
        return descale[rows, :, blocks][..., None]
    entries = (positions // appended.cache.shape[1]).clamp(0, table.shape[1] - 1)
    return descale[table[rows, entries].long().clamp(0, descale.shape[0] - 1)]

"""The decode kernel: a few rows of q over a KV cache, dense or paged.

`refusal` says why a call is not for it; `forward` serves those that are, in one launch. What the
host decides follows from sizes alone, so a captured call may be replayed with other lengths and
page tables. More rows than a tile has are further tiles, which read the keys again.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import append, attention_params, forward_fp8, kernels, streams
from flash8.backends.hopper import forward as many_rows
from flash8.backends.hopper.decode_variants import (
    QV_TILES,
    ROWS,
    TILES,
    WIDEST_OF_WARP,
    Cache,
    DecodeVariant,
    Element,
    Load,
    Scales,
    tile_rows,
)
from flash8.call.checks import output_dtype
from flash8.call.options import Options
from flash8.call.request import Appended, Queries
from flash8.tensors.descales import BLOCK, is_per_token
from flash8.tensors.float8 import E4M3

_DTYPES: dict[torch.dtype, Element] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
#: Rows up to which a cache that the forward kernel serves too is for this one.
_FEW_ROWS = ROWS[-1]
#: And any other cache, which no other kernel serves.
MOST_ROWS = 256
_MOST_PARTIALS = 1 << 31  # bytes
_MOST_BYTES = 1 << 36  # of a cache that is gathered: 32 bits count units of 16 bytes


def is_wanted(q: Tensor, k: Tensor, options: Options) -> bool:
    """Whether a call is over a KV cache, as far as the kernel for packed keys goes."""
    return options.is_cache or options.page_table is not None or k.dtype != q.dtype


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: Options,
    out: Tensor | None = None,
) -> str | None:
    """Why no decode kernel serves this call, or None. `out` is the caller's."""
    if q.dtype not in (*_DTYPES, E4M3) or k.dtype not in (q.dtype, E4M3):
        return f"there is no decode kernel for {q.dtype} q and {k.dtype} k"
    reason = attention_params.refused_scale(options)
    reason = reason or _refused_options(q, v, qv, options) or _refused_sizes(q, k, v, qv, options)
    rows = rows_of_head(q, k, options)
    if reason is None and rows > _FEW_ROWS:
        of_forward = many_rows.refusal(q, k, v, qv, options, out)
        if of_forward is None:
            return f"more than {_FEW_ROWS} rows of q for a KV head are for the forward kernel"
        if rows > MOST_ROWS:
            return (
                f"{of_forward}; the decode kernel, which is asked then, takes up to {MOST_ROWS} "
                f"rows of q for a KV head, and there are {rows}"
            )
    if reason is None and out is not None and not attention_params.can_be_stored(out):
        return "out is not aligned to 16 bytes in address and strides"
    return reason


def _refused_options(q: Tensor, v: Tensor, qv: Tensor | None, options: Options) -> str | None:
    for name, given in (
        ("cu_seqlens_k", options.cu_seqlens_k is not None),
        ("dropout_p", options.dropout_p > 0.0),
        ("num_splits", options.num_splits > 1),
        ("v_colmajor", options.v_colmajor_tokens is not None),
        ("k_mean with softcap", options.k_mean is not None and options.softcap > 0.0),
        ("k_mean with qv", qv is not None and options.k_mean is not None),
        ("v_mean with qv", qv is not None and options.v_mean is not None),
        ("v_channel_descale", options.v_channel_descale is not None),
    ):
        if given:
            return f"{name} has no decode kernel yet"
    tile = _tile(q, v, qv)
    by_team = tile is not None and tile[1] > WIDEST_OF_WARP
    for name, descale in (("k_descale", options.k_descale), ("v_descale", options.v_descale)):
        if descale is not None and descale.dim() > 2 and by_team:
            return (
                f"{name} is per token, block or page; with qv, or head_dims above "
                f"{WIDEST_OF_WARP}, the decode kernel takes one per tensor or head"
            )
    return None


def _refused_sizes(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, options: Options
) -> str | None:
    if 0 in k.shape[:2]:
        return "the cache has no keys"
    if _tile(q, v, qv) is None:
        sizes = f"head_dim is {q.shape[-1]} and head_dim_v {v.shape[-1]}"
        return f"{sizes}; tiles are {TILES}" if qv is None else f"{sizes}; with qv it is {QV_TILES}"
    unit = 16 // k.element_size()
    for name, size in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        if size % max(unit, 8) != 0:
            return f"{name} is {size}; the decode kernel takes multiples of {max(unit, 8)}"
    if not all(attention_params.tma_can_read(x) for x in (q, k, v, qv) if x is not None):
        return (
            "q, k, v or qv is not aligned to 16 bytes in address and strides, or a stride is 2^40"
        )
    gathers = _gathers(k, options)
    if not gathers and any(attention_params.overlaps(x) for x in (k, v)):
        return "rows of the cache share memory"
    if gathers and any(_span(x) >= _MOST_BYTES for x in (k, v)):
        return "k or v spans 2^36 bytes, and pages are not of a size for TMA"
    return _too_long(q, k, options)


def _too_long(q: Tensor, k: Tensor, options: Options) -> str | None:
    keys = attention_params.room(k, options)
    units = -(-rows_of_head(q, k, options) // ROWS[0]) * k.shape[-2] * _batch(q, options)
    if keys + _max_seqlen_q(q, options) > attention_params.INT32_MAX - 1024:
        return "a sequence has room for more than 2^31 keys"
    if units * -(-keys // 16) > 1 << 30:
        return "there are more than 2^30 tiles of keys"
    return None


def _tile(q: Tensor, v: Tensor, qv: Tensor | None) -> tuple[int, int] | None:
    return tile_of(q.shape[-1], v.shape[-1], qv is not None)


def tile_of(head_dim: int, head_dim_v: int, has_qv: bool) -> tuple[int, int] | None:
    """The sizes of the tile that serves these, or None."""
    tiles = QV_TILES if has_qv else TILES
    return next((t for t in tiles if head_dim <= t[0] and head_dim_v <= t[1]), None)


def rows_of_tile(rows: int, supported: tuple[int, ...]) -> int:
    """Those of the tile that serves so many rows of q for a KV head."""
    return next((n for n in supported if rows <= n), supported[-1])


def _max_seqlen_q(q: Tensor, options: Options) -> int:
    return q.shape[1] if options.cu_seqlens_q is None else options.max_seqlen_q or 0


def rows_of_head(q: Tensor, k: Tensor, options: Options) -> int:
    """Rows of q that a KV head serves in one sequence."""
    return q.shape[-2] // k.shape[-2] * _max_seqlen_q(q, options)


def _batch(q: Tensor, options: Options) -> int:
    return q.shape[0] if options.cu_seqlens_q is None else options.cu_seqlens_q.shape[0] - 1


def _gathers(k: Tensor, options: Options) -> bool:
    return options.page_table is not None and k.shape[1] % attention_params.TMA_PAGE != 0


def _span(x: Tensor) -> int:
    steps = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * sum((n - 1) * step for n, step in steps if n > 1)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    qv: Tensor | None = None,
    out: Tensor | None = None,
) -> DecodeVariant:
    """The variant that serves a call which is not refused. `out` is the caller's."""
    tile = _tile(q, v, qv)
    assert tile is not None
    return _variant(
        _DTYPES[output_dtype(q) if out is None else out.dtype],
        "e4m3" if k.dtype == E4M3 else "same",
        *tile,
        rows_of_tile(rows_of_head(q, k, options), tile_rows(tile[1])),
        "gather" if _gathers(k, options) else "tma",
        options.softcap > 0.0 or options.alibi_slopes is not None,
        qv is not None,
        "key" if any(_is_by_key(x) for x in (options.k_descale, options.v_descale)) else "head",
    )


def _is_by_key(descale: Tensor | None) -> bool:
    """Whether it is of tokens, blocks or pages."""
    return descale is not None and descale.dim() == 3


@functools.cache
def _variant(
    dtype: Element,
    cache: Cache,
    head_dim: int,
    head_dim_v: int,
    rows: int,
    load: Load,
    score_mod: bool,
    qv: bool,
    scales: Scales,
) -> DecodeVariant:
    """The variant for these choices, made once per process."""
    return DecodeVariant(dtype, cache, head_dim, head_dim_v, rows, load, score_mod, qv, scales)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    out_partial: Tensor,
    lse_partial: Tensor,
) -> None:
    """Fills out and lse on q's stream, without a synchronisation."""
    plan_and_launch(q, k, v, s_aux, options, out, lse, qv)


def plan_and_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    qv: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    variant: DecodeVariant | None = None,
    new: tuple[Appended, Appended, Queries] | None = None,
) -> "Plan":
    """Does it, and returns the plan by which it was done. `scheduler_metadata` has
    `schedule.shape` and lies without gaps."""
    planned = plan(q, k, v, s_aux, options, out, lse, qv, variant, new)
    if scheduler_metadata is not None:
        planned.call.scheduler_metadata = scheduler_metadata.data_ptr()
    stream = streams.current_stream(q)
    captured = planned.kernel.is_captured(planned.device, stream)
    count = planned.workspace["tickets"] // 4
    launch(planned, stream, streams.get_tickets(q.device, stream, count, captured))
    # What the call points to may go: freed memory is not reused before the kernel on this stream.
    return planned._replace(held=[])


class Plan(NamedTuple):
    """A launch, but for the stream and its tickets."""

    kernel: _native.Kernel
    device: int
    call: _native.DecodeParams
    sm_margin: int  # that the workspace is for
    workspace: dict[str, int]  # bytes
    held: list[Tensor]  # what `call` points to besides the arguments of `plan`


def launch(planned: Plan, stream: int, tickets: Tensor) -> None:
    """Enqueues it. The tickets are zero, and are so again after the launch."""
    if tickets.numel() * 4 < planned.workspace["tickets"]:
        raise ValueError(
            f"there are {tickets.numel()} tickets; the launch needs "
            f"{planned.workspace['tickets'] // 4}"
        )
    planned.call.tickets = tickets.data_ptr()
    _native.launch_decode(planned.kernel, planned.device, stream, planned.call, planned.sm_margin)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    qv: Tensor | None = None,
    variant: DecodeVariant | None = None,
    new: tuple[Appended, Appended, Queries] | None = None,
) -> Plan:
    """The kernel and the parameters of a call. `variant` is `choose`'s unless given; one that
    appends takes the new rows of k and v, and the queries."""
    kernel = kernels.kernel(choose(q, k, v, options, qv, out) if variant is None else variant)
    device = q.device.index or 0
    call = _native.DecodeParams()
    held = []
    if qv is not None:
        options = options._replace(softmax_scale=options.scale(q, qv))
        qv = qv.contiguous() if attention_params.overlaps(qv) else qv
        call.qv = attention_params.tensor_ref(qv)
        held.append(qv)
    if attention_params.overlaps(q):
        q = q.contiguous()
    call.q, call.k, call.v, call.o = (attention_params.tensor_ref(x) for x in (q, k, v, out))
    call.lse = attention_params.row_ref(lse)
    call.head_dim_v = v.shape[-1]
    call.q_is_e4m3 = int(q.dtype == E4M3)
    indices = attention_params.indices_of(options)
    attention_params.describe(call, q, k, indices, options)
    held += [q, *indices.values(), *attention_params.describe_scores(call, s_aux, options)]
    held += _describe_cache(call, k, options)
    held += forward_fp8.describe_query_scales(call, q, k, options)
    held += _describe_tree(call, options)
    if new is not None:
        held += append.describe_within(call.append, *new)
    call.split_keys = options.split_keys
    workspace = _native.decode_workspace(kernel, device, call, options.sm_margin)
    if workspace["partials"] > _MOST_PARTIALS:
        raise ValueError(
            f"split_keys is {options.split_keys}: for a cache with room for "
            f"{attention_params.room(k, options)} keys of {_batch(q, options)} sequences that "
            f"takes {workspace['partials'] >> 20} MB of partial results; supported are up to "
            f"{_MOST_PARTIALS >> 20} MB, by larger pieces"
        )
    partials = torch.empty(workspace["partials"] // 4, dtype=torch.float32, device=q.device)
    call.partials = partials.data_ptr()
    return Plan(kernel, device, call, options.sm_margin, workspace, [*held, partials])


def _describe_tree(call: _native.DecodeParams, options: Options) -> list[Tensor]:
    """The words of a tree of drafts; returns what the call points to then."""
    if options.tree_mask is None:
        return []
    words = options.tree_mask.contiguous()
    call.tree_mask = words.data_ptr()
    call.tree_mask_stride = words.stride(0) if words.dim() == 2 else 0
    return [words]


def _describe_cache(call: _native.DecodeParams, k: Tensor, options: Options) -> list[Tensor]:
    """Pages and descales; returns what the call points to then."""
    call.pages.num_pages, call.pages.page_size = k.shape[:2]  # of a dense cache too
    held = attention_params.describe_pages(call, k, options)
    held += attention_params.describe_scaling(
        call, options, ("k_descale", "v_descale"), ("k_mean", "v_mean")
    )
    if _is_by_key(options.k_descale):
        call.k_descale, call.k_scale_rows = _by_place(options.k_descale, k)
    if _is_by_key(options.v_descale):
        call.v_descale, call.v_scale_rows = _by_place(options.v_descale, k)
    return held


def _by_place(descale: Tensor | None, k: Tensor) -> tuple[tuple[int, int, int, int], int]:
    """Address and strides of page, head and block of a descale by key, and the rows of a block. A
    page is the only block of its own."""
    assert descale is not None
    if is_per_token(descale, k):
        return attention_params.descale_ref(descale.transpose(1, 2)), 1
    return attention_params.descale_ref(descale), BLOCK

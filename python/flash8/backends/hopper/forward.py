"""The Hopper backend: chooses a kernel variant, describes the call, and launches.

`refusal` says why a call is not for it; `forward` serves those that are. Tensors stay where they
are: the kernel gets their addresses and strides.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import attention_params, forward_fp8, heuristics, kernels, streams
from flash8.backends.hopper.variants import Cache, Element, ForwardVariant, Mask, Scales
from flash8.call.options import Options
from flash8.tensors.float8 import E4M3

_DTYPES: dict[torch.dtype, Element] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    E4M3: "e4m3",
}
#: The head dimensions that tiles are made for; others are filled up with zeros by TMA.
HEAD_DIMS = (64, 96, 128, 192, 256)


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: Options,
    out: Tensor | None = None,
) -> str | None:
    """Why no forward kernel serves this call, or None. `out` is the caller's."""
    if q.dtype not in _DTYPES or k.dtype not in (q.dtype, E4M3):
        return f"there is no kernel for {q.dtype} q and {k.dtype} k"
    for name, size in (("head_dim", q.shape[-1]), ("head_dim_v", options.head_dim_v(v))):
        if size > HEAD_DIMS[-1] or size % 8 != 0:
            return f"{name} is {size}; kernels take multiples of 8 up to {HEAD_DIMS[-1]}"
    for name, given in (
        ("qv", qv is not None),
        ("tree_mask", options.tree_mask is not None),
        ("num_splits", options.num_splits > 1),
        ("dropout without a seed", options.dropout_p > 0.0 and options.dropout_seed is None),
    ):
        if given:
            return f"{name} has no kernel yet"
    if options.page_table is not None:
        reason = _refused_pages(q, k, v, options)
        if reason is not None:
            return reason
    if any(n > attention_params.INT32_MAX for x in (q, k, v) for n in x.shape):
        return "q, k or v has a dimension above 2^31 - 1"
    if not all(attention_params.overlaps(x) or attention_params.tma_can_read(x) for x in (q, k, v)):
        return "q, k or v is not aligned to 16 bytes in address and strides, or a stride is 2^40"
    if out is not None and not attention_params.can_be_stored(out):
        return "out is not aligned to 16 bytes in address and strides"
    if (reason := attention_params.refused_scale(options)) is not None:
        return reason
    if _widens(q, k):
        return forward_fp8.refusal_widened(q, k, v, options)
    return forward_fp8.refusal(v, options) if q.dtype == E4M3 else None


def _widens(q: Tensor, k: Tensor) -> bool:
    """Whether k and v are of e4m3 under a q of 16 bits, which are read wherever they lie."""
    return k.dtype != q.dtype


def _refused_pages(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    table, page_size = options.page_table, k.shape[1]
    assert table is not None
    if options.dropout_p > 0.0:
        return "page_table with dropout has no kernel yet"
    if options.v_colmajor_tokens is not None:
        return "page_table with a v_colmajor v has no kernel yet"
    if k.numel() == 0 or table.numel() == 0:
        return "there is no page"
    if _gathers(k, options):
        for name, x in (("head_dim", k), ("head_dim_v", v)):
            if x.shape[-1] * x.element_size() % attention_params.ROW_BYTES != 0:
                return (
                    f"{name} is {x.shape[-1]} and pages have {page_size} keys; rows of pages of no "
                    f"multiple of {attention_params.TMA_PAGE} keys are read by 16 bytes"
                )
    if any(not _is_read_in_place(q, k, x, options) for x in (k, v)):
        return "rows of the cache share memory"
    rows = q.shape[1] if options.cu_seqlens_q is None else q.shape[0]
    if attention_params.room(k, options) + rows > attention_params.INT32_MAX - 1024:
        return "a sequence has room for more than 2^31 keys"
    return None


def _gathers(k: Tensor, options: Options) -> bool:
    """Whether k is of pages that TMA cannot load."""
    return options.page_table is not None and k.shape[1] % attention_params.TMA_PAGE != 0


def _is_read_in_place(q: Tensor, k: Tensor, x: Tensor, options: Options) -> bool:
    """Whether x, k or v, needs no copy. TMA wants rows that share no memory; lanes that copy 16
    bytes at a time, of e4m3 to be widened and of pages to be gathered, take any."""
    if not attention_params.overlaps(x):
        return True
    return (_widens(q, k) or _gathers(k, options)) and attention_params.tma_can_read(x)


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
    plan_and_launch(q, k, v, s_aux, options, out, lse)


def plan_and_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
) -> "Plan":
    """Does it, and returns the plan by which it was done."""
    planned = plan(q, k, v, s_aux, options, out, lse)
    launch_on_stream(planned, q, options.sm_margin)
    # What the call points to may go: freed memory is not reused before the kernel on this stream.
    return planned._replace(held=[])


class Plan(NamedTuple):
    """A launch, but for the stream and what belongs to it."""

    kernel: _native.Kernel
    device: int
    call: _native.ForwardParams
    dynamic_schedule: bool
    held: list[Tensor]  # what `call` points to besides the arguments of `plan`


def launch_on_stream(planned: Plan, q: Tensor, sm_margin: int) -> None:
    """Enqueues it on q's stream, with the counters of that."""
    stream = streams.current_stream(q)
    tile_count = None
    if planned.dynamic_schedule:
        captured = planned.kernel.is_captured(planned.device, stream)
        tile_count = streams.get_tile_count(q.device, stream, captured)
    launch(planned, stream, tile_count, sm_margin)


def launch(planned: Plan, stream: int, tile_count: Tensor | None, sm_margin: int = 0) -> None:
    """Enqueues it. `tile_count` (`streams.new_tile_count`) is zero, and is so again after
    the launch; None deals tiles."""
    if tile_count is not None and tile_count.numel() != streams.COUNTERS:
        raise ValueError(
            f"tile_count has {tile_count.numel()} elements; the kernel has {streams.COUNTERS}"
        )
    planned.call.scheduler.tile_count = 0 if tile_count is None else tile_count.data_ptr()
    _native.launch_forward(planned.kernel, planned.device, stream, planned.call, sm_margin)


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    qv: Tensor | None = None,
    out: Tensor | None = None,
) -> ForwardVariant:
    """The variant that serves a call which is not refused."""
    assert qv is None
    ratio = q.shape[-2] // k.shape[-2]
    head_dim_v = options.head_dim_v(v)
    widest = max(q.shape[-1], head_dim_v)
    pack_gqa = heuristics.packs_query_heads(
        q.shape[1] if options.cu_seqlens_q is None else None,
        ratio,
        widest,
        options.pack_gqa,
    )
    widens = _widens(q, k)
    paged = options.page_table is not None and not widens
    gather = paged and _gathers(k, options)
    even = not paged and not widens and not heuristics.has_uneven_tiles(options)
    cluster = even and heuristics.loads_in_clusters(
        q.shape[1], ratio if pack_gqa else 1, widest, q.dtype == E4M3
    )
    return _variant(
        q.dtype,
        q.shape[-1],
        head_dim_v,
        # Boxes of pages with left padding begin inside of a tile, which takes a mask at the left
        # edge.
        "local"
        if paged and not gather and options.leftpad_k is not None
        else attention_params.mask_of(options),
        options.softcap > 0.0,
        options.alibi_slopes is not None,
        pack_gqa,
        forward_fp8.scales(options) if q.dtype == E4M3 else "none",
        cluster,
        options.v_colmajor_tokens is not None,
        options.dropout_p > 0.0,
        paged,
        gather,
        "e4m3" if widens else "same",
    )


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor | None,
    variant: ForwardVariant | None = None,
) -> Plan:
    """The kernel and the parameters of a call. `variant` is `choose`'s unless given. Without lse
    the kernel leaves LSE out."""
    variant = choose(q, k, v, options) if variant is None else variant
    if attention_params.overlaps(q):
        q = q.contiguous()
    k, v = (x if _is_read_in_place(q, k, x, options) else x.contiguous() for x in (k, v))
    indices = attention_params.indices_of(options)
    held = [q, k, v, *indices.values()]
    device = q.device.index or 0
    uneven = heuristics.has_uneven_tiles(options)
    call = _describe(q, k, v, indices, options, out, lse)
    held += attention_params.describe_pages(call, k, options)
    if options.cu_seqlens_q is not None:
        call.scheduler.longest_first = int(heuristics.longest_first(call.sequences.batch))
    call.scheduler.heads_per_section = 1
    if uneven:
        call.scheduler.heads_per_section = heuristics.heads_per_section(
            call.sequences.max_seqlen_k,
            k.element_size() * (k.shape[-1] + options.head_dim_v(v)),
            1 if variant.pack_gqa else q.shape[-2] // k.shape[-2],
        )
    if q.dtype == E4M3:
        held += forward_fp8.describe(call, q, k, out, options)
    elif variant.cache == "e4m3":
        held += forward_fp8.describe_widened(call, options)
    held += attention_params.describe_scores(call, s_aux, options)
    return Plan(kernels.kernel(variant), device, call, uneven, held)


def _tile_head_dim(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if head_dim <= size)


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: dict[str, Tensor],
    options: Options,
    out: Tensor,
    lse: Tensor | None,
) -> _native.ForwardParams:
    call = _native.ForwardParams()
    tensor_ref = attention_params.tensor_ref
    call.q, call.k, call.o = (tensor_ref(x) for x in (q, k, out))
    call.v = tensor_ref(v if options.v_colmajor_tokens is None else v.transpose(-3, -2))
    if lse is not None:
        call.lse = attention_params.row_ref(lse)
    call.head_dim_v = options.head_dim_v(v)
    attention_params.describe(call, q, k, indices, options)
    attention_params.describe_dropout(call, options)
    return call


@functools.cache
def _variant(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    mask: Mask,
    softcap: bool,
    alibi: bool,
    pack_gqa: bool,
    scales: Scales,
    cluster: bool,
    v_colmajor: bool,
    dropout: bool,
    paged: bool,
    gather: bool,
    cache: Cache,
) -> ForwardVariant:
    """The variant for these choices, made once per process."""
    return ForwardVariant(
        dtype=_DTYPES[dtype],
        head_dim=_tile_head_dim(head_dim),
        head_dim_v=_tile_head_dim(head_dim_v),
        mask=mask,
        softcap=softcap,
        alibi=alibi,
        pack_gqa=pack_gqa,
        scales=scales,
        cluster=cluster,
        v_colmajor=v_colmajor,
        dropout=dropout,
        paged=paged,
        gather=gather,
        cache=cache,
    )

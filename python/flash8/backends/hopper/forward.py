"""The Hopper backend: chooses a kernel variant, describes the call, and launches.

`refusal` says why a call is not for it; `forward` serves those that are. Tensors stay where they
are: the kernel gets their addresses and strides.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import forward_fp8, heuristics, kernels, streams
from flash8.backends.hopper.variants import Element, ForwardVariant, Mask, Scales
from flash8.call.options import Options
from flash8.tensors.float8 import E4M3

_DTYPES: dict[torch.dtype, Element] = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    E4M3: "e4m3",
}
#: The head dimensions that tiles are made for; others are filled up with zeros by TMA.
_HEAD_DIMS = (64, 96, 128, 192, 256)
_TMA_UNIT = 16  # bytes: of addresses and strides
_TMA_MAX_STRIDE = 1 << 40  # bytes
_STORE_BYTES = 16  # the epilogue writes rows of O in units of this size
_INT32_MAX = 2**31 - 1
_INDEX_FIELDS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
    "kv_batch_idx",
)


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: Options,
    out: Tensor | None = None,
) -> str | None:
    """Why no forward kernel serves this call, or None. `out` is the caller's."""
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        return f"there is no kernel for {q.dtype} q and {k.dtype} k"
    for name, size in (("head_dim", q.shape[-1]), ("head_dim_v", options.head_dim_v(v))):
        if size > _HEAD_DIMS[-1] or size % 8 != 0:
            return f"{name} is {size}; kernels take multiples of 8 up to {_HEAD_DIMS[-1]}"
    for name, given in (
        ("qv", qv is not None),
        ("page_table", options.page_table is not None),
        ("dropout_p", options.dropout_p > 0.0),
        ("num_splits", options.num_splits > 1),
    ):
        if given:
            return f"{name} has no kernel yet"
    if any(n > _INT32_MAX for x in (q, k, v) for n in x.shape):
        return "q, k or v has a dimension above 2^31 - 1"
    if not all(_overlaps(x) or _tma_can_read(x) for x in (q, k, v)):
        return "q, k or v is not aligned to 16 bytes in address and strides, or a stride is 2^40"
    if out is not None and not _can_be_stored(out):
        return "out is not aligned to 16 bytes in address and strides"
    return forward_fp8.refusal(v, options) if q.dtype == E4M3 else None


def _tma_can_read(x: Tensor) -> bool:
    inner_is_contiguous = x.shape[-1] == 1 or x.stride(-1) == 1
    return (
        inner_is_contiguous
        and x.data_ptr() % _TMA_UNIT == 0
        and all(step % _TMA_UNIT == 0 and step < _TMA_MAX_STRIDE for step in _steps(x))
    )


def _overlaps(x: Tensor) -> bool:
    """Whether rows of x share memory: it is expanded, or a window that slides over a tensor.

    The driver describes no such tensor to TMA. The kernel gets a copy: that takes far less than
    attention does, and much less than the portable code.
    """
    row = x.shape[-1] * x.element_size()
    return any(step < row for step in _steps(x))


def _apart(x: Tensor) -> Tensor:
    """x, or a copy whose rows share no memory."""
    return x.contiguous() if _overlaps(x) else x


def _can_be_stored(out: Tensor) -> bool:
    return out.data_ptr() % _STORE_BYTES == 0 and all(
        step % _STORE_BYTES == 0 for step in _steps(out)
    )


def _steps(x: Tensor) -> list[int]:
    """The strides in bytes of all dimensions but the last, without those of one element."""
    size = x.element_size()
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return [stride * size for n, stride in outer if n > 1]


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
    stream = streams.current_stream(q)
    tile_count = None
    if planned.dynamic_schedule:
        captured = planned.kernel.is_captured(planned.device, stream)
        tile_count = streams.get_tile_count(q.device, stream, captured)
    launch(planned, stream, tile_count, options.sm_margin)
    # What the call points to may go: freed memory is not reused before the kernel on this stream.
    return planned._replace(held=[])


class Plan(NamedTuple):
    """A launch, but for the stream and what belongs to it."""

    kernel: _native.Kernel
    device: int
    call: _native.ForwardParams
    dynamic_schedule: bool
    held: list[Tensor]  # what `call` points to besides the arguments of `plan`


def launch(planned: Plan, stream: int, tile_count: Tensor | None, sm_margin: int = 0) -> None:
    """Enqueues it. `tile_count` (`streams.new_tile_count`) is zero, and is so again after
    the launch; None deals tiles."""
    if tile_count is not None and tile_count.numel() != streams.COUNTERS:
        raise ValueError(
            f"tile_count has {tile_count.numel()} elements; the kernel has {streams.COUNTERS}"
        )
    planned.call.scheduler.tile_count = 0 if tile_count is None else tile_count.data_ptr()
    _native.launch_forward(planned.kernel, planned.device, stream, planned.call, sm_margin)


def choose(q: Tensor, k: Tensor, v: Tensor, options: Options) -> ForwardVariant:
    """The variant that serves a call."""
    ratio = q.shape[-2] // k.shape[-2]
    head_dim_v = options.head_dim_v(v)
    widest = max(q.shape[-1], head_dim_v)
    pack_gqa = heuristics.packs_query_heads(
        q.shape[1] if options.cu_seqlens_q is None else None,
        ratio,
        widest,
        options.pack_gqa,
    )
    cluster = not heuristics.has_uneven_tiles(options) and heuristics.loads_in_clusters(
        q.shape[1], ratio if pack_gqa else 1, widest, q.dtype == E4M3
    )
    return _variant(
        q.dtype,
        q.shape[-1],
        head_dim_v,
        _mask(options),
        options.softcap > 0.0,
        options.alibi_slopes is not None,
        pack_gqa,
        forward_fp8.scales(options) if q.dtype == E4M3 else "none",
        cluster,
        options.v_colmajor_tokens is not None,
    )


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Options,
    out: Tensor,
    lse: Tensor,
    variant: ForwardVariant | None = None,
) -> Plan:
    """The kernel and the parameters of a call. `variant` is `choose`'s unless given."""
    variant = choose(q, k, v, options) if variant is None else variant
    q, k, v = (_apart(x) for x in (q, k, v))
    given = {name: getattr(options, name) for name in _INDEX_FIELDS}
    indices = {name: x.contiguous() for name, x in given.items() if x is not None}
    held = [q, k, v, *indices.values()]
    device = q.device.index or 0
    uneven = heuristics.has_uneven_tiles(options)
    call = _describe(q, k, v, indices, options, out, lse)
    call.scheduler.heads_per_section = 1
    if uneven:
        call.scheduler.heads_per_section = heuristics.heads_per_section(
            call.sequences.max_seqlen_k,
            k.element_size() * (k.shape[-1] + options.head_dim_v(v)),
            1 if variant.pack_gqa else q.shape[-2] // k.shape[-2],
        )
    if q.dtype == E4M3:
        held += forward_fp8.describe(call, q, k, out, options)
    if s_aux is not None:
        sinks = s_aux.float().contiguous()
        held.append(sinks)
        call.scores.sinks = sinks.data_ptr()
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.float().contiguous()
        held.append(slopes)
        call.scores.alibi_slopes = slopes.data_ptr()
        call.scores.alibi_batch_stride = slopes.shape[-1] if slopes.dim() == 2 else 0
    return Plan(kernels.kernel(variant), device, call, uneven, held)


def _mask(options: Options) -> Mask:
    if options.window_left >= 0 or options.window_right > 0 or options.attention_chunk > 0:
        return "local"
    return "causal" if options.window_right == 0 else "none"


def _tile_head_dim(head_dim: int) -> int:
    return next(size for size in _HEAD_DIMS if head_dim <= size)


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: dict[str, Tensor],
    options: Options,
    out: Tensor,
    lse: Tensor,
) -> _native.ForwardParams:
    call = _native.ForwardParams()
    call.q, call.k, call.o = (_tensor_ref(x) for x in (q, k, out))
    call.v = _tensor_ref(v if options.v_colmajor_tokens is None else v.transpose(-3, -2))
    call.lse = (lse.data_ptr(), 0 if lse.dim() == 2 else lse.stride(0), lse.stride(-2))
    call.heads_q, call.heads_kv = q.shape[-2], k.shape[-2]
    call.head_dim, call.head_dim_v = q.shape[-1], options.head_dim_v(v)
    sequences, scores = call.sequences, call.scores
    for name, index in indices.items():
        setattr(sequences, name, index.data_ptr())
    if options.cu_seqlens_q is None:
        sequences.batch, sequences.max_seqlen_q = q.shape[:2]
    else:
        sequences.batch = options.cu_seqlens_q.shape[0] - 1
        sequences.max_seqlen_q, sequences.total_q = options.max_seqlen_q or 0, q.shape[0]
    if options.cu_seqlens_k is None:
        sequences.batch_k, sequences.max_seqlen_k = k.shape[:2]
    else:
        sequences.max_seqlen_k, sequences.total_k = options.max_seqlen_k or 0, k.shape[0]
    scale = options.softmax_scale
    scores.softmax_scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores.softcap = options.softcap
    scores.window_left, scores.window_right = options.window_left, options.window_right
    scores.attention_chunk = options.attention_chunk
    return call


def _tensor_ref(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides. torch gives a dimension of one any stride; here it is 0."""
    *batch, rows, heads, _ = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), batch[0] if batch else 0, rows, heads


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
    )

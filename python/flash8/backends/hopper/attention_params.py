"""What the parameters of all attention kernels tell alike: tensors, sequences and scores."""

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper.variants import Mask
from flash8.call.options import Options
from flash8.tensors.philox import keep_scale, threshold

INT32_MAX = 2**31 - 1
TMA_PAGE = 8  # keys of whose multiples pages are that TMA loads
_TMA_UNIT = 16  # bytes: of addresses and strides
_TMA_MAX_STRIDE = 1 << 40  # bytes
ROW_BYTES = 16  # kernels read and write rows of 16-bit tensors in units of this size
_MIN_SCALE = 2.0**-126  # the smallest normal number of fp32
_INDEX_FIELDS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
    "kv_batch_idx",
)

TrainingCall = _native.ForwardParams | _native.BackwardParams
Call = TrainingCall | _native.DecodeParams


def refused_scale(options: Options) -> str | None:
    """Why no kernel takes this softmax_scale, or None. Kernels flush subnormal numbers to 0, and 0
    times the -inf of a hidden key is NaN."""
    scale = options.softmax_scale
    if scale is None or scale >= _MIN_SCALE:
        return None
    return f"softmax_scale is {scale}; kernels take {_MIN_SCALE} and more"


def tma_can_read(x: Tensor) -> bool:
    """Whether the driver describes x to TMA as it lies, but for `overlaps`."""
    inner_is_contiguous = x.shape[-1] == 1 or x.stride(-1) == 1
    return (
        inner_is_contiguous
        and x.data_ptr() % _TMA_UNIT == 0
        and all(step % _TMA_UNIT == 0 and step < _TMA_MAX_STRIDE for step in _steps(x))
    )


def overlaps(x: Tensor) -> bool:
    """Whether rows of x share memory: it is expanded, or a window that slides over a tensor.

    The driver describes no such tensor to TMA. The kernel gets a copy: that takes far less than
    attention does, and much less than the portable code.
    """
    row = x.shape[-1] * x.element_size()
    return any(step < row for step in _steps(x))


def can_be_stored(out: Tensor) -> bool:
    """Whether kernels can write rows of out where they are."""
    return out.data_ptr() % ROW_BYTES == 0 and all(step % ROW_BYTES == 0 for step in _steps(out))


def _steps(x: Tensor) -> list[int]:
    """The strides in bytes of all dimensions but the last, without those of one element."""
    size = x.element_size()
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return [stride * size for n, stride in outer if n > 1]


def tensor_ref(x: Tensor) -> tuple[int, int, int, int]:
    """Address and strides. torch gives a dimension of one any stride; here it is 0."""
    *batch, rows, heads, _ = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), batch[0] if batch else 0, rows, heads


def descale_ref(descale: Tensor) -> tuple[int, int, int, int]:
    """Address, and the strides of batch, head and block: 0 for those that there are not."""
    # The stride of a dimension of one is never stepped over.
    steps = [0 if n == 1 else s for n, s in zip(descale.shape, descale.stride(), strict=True)]
    batch, head, block = steps + [0] * (3 - len(steps))
    return descale.data_ptr(), batch, head, block


def row_ref(lse: Tensor) -> tuple[int, int, int]:
    """Address and strides of values by row or channel, (batch, heads, n) or (heads, n)."""
    return lse.data_ptr(), 0 if lse.dim() == 2 else lse.stride(0), lse.stride(-2)


def mask_of(options: Options) -> Mask:
    """The mask that a kernel is compiled for."""
    if options.window_left >= 0 or options.window_right > 0 or options.attention_chunk > 0:
        return "local"
    return "causal" if options.window_right == 0 else "none"


def indices_of(options: Options) -> dict[str, Tensor]:
    """The index tensors of a call, as kernels read them."""
    given = {name: getattr(options, name) for name in _INDEX_FIELDS}
    return {name: x.contiguous() for name, x in given.items() if x is not None}


def describe(
    call: Call, q: Tensor, k: Tensor, indices: dict[str, Tensor], options: Options
) -> None:
    """Head counts, sequences and scores of a call, but for `describe_scores`."""
    call.heads_q, call.heads_kv = q.shape[-2], k.shape[-2]
    call.head_dim = q.shape[-1]
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
    scores.softmax_scale = options.scale(q)
    scores.softcap = options.softcap
    scores.window_left, scores.window_right = options.window_left, options.window_right
    scores.attention_chunk = options.attention_chunk


def room(k: Tensor, options: Options) -> int:
    """Keys that a sequence of a cache has room for."""
    return k.shape[1] if options.page_table is None else k.shape[1] * options.page_table.shape[1]


def describe_pages(
    call: _native.ForwardParams | _native.DecodeParams, k: Tensor, options: Options
) -> list[Tensor]:
    """Where the keys of a paged cache are; returns what the call points to then."""
    if options.page_table is None:
        return []
    pages, sequences = call.pages, call.sequences
    table = options.page_table.contiguous()
    pages.num_pages, pages.page_size = k.shape[:2]
    pages.page_table, pages.page_table_stride = table.data_ptr(), table.stride(0)
    pages.max_pages = table.shape[1]
    sequences.batch_k, sequences.max_seqlen_k = table.shape[0], room(k, options)
    return [table]


def describe_dropout(call: TrainingCall, options: Options) -> None:
    """Dropout, which is not decoding's."""
    if options.dropout_seed is not None:
        call.dropout.seed = options.dropout_seed.data_ptr()
        call.dropout.threshold = threshold(options.dropout_p)
        call.dropout.keep_scale = keep_scale(options.dropout_p)


def describe_scaling(
    call: Call, options: Options, descales: tuple[str, ...], channels: tuple[str, ...]
) -> list[Tensor]:
    """The named descales, and values by channel; returns what the call points to then."""
    held = []
    for name in descales:
        descale = getattr(options, name)
        if descale is not None:
            held.append(descale)
            setattr(call, name, descale_ref(descale))
    for name in channels:
        given = getattr(options, name)
        if given is not None:
            values = given.contiguous()
            held.append(values)
            batch_stride = values.stride(0) if values.dim() == 3 else 0
            setattr(call, name, (values.data_ptr(), batch_stride, values.stride(-2)))
    return held


def describe_scores(call: Call, s_aux: Tensor | None, options: Options) -> list[Tensor]:
    """Sinks and slopes; returns what the call points to then."""
    held = []
    if s_aux is not None:
        sinks = s_aux.to(torch.float32).contiguous()
        held.append(sinks)
        call.scores.sinks = sinks.data_ptr()
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(torch.float32).contiguous()
        held.append(slopes)
        call.scores.alibi_slopes = slopes.data_ptr()
        call.scores.alibi_batch_stride = slopes.shape[-1] if slopes.dim() == 2 else 0
    return held

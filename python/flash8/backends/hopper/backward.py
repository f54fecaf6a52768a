"""The backward on compiled kernels (hopper/backward): three launches, dQ, dK, dV and d(s_aux).

`refusal` says why a call is not for them; `backward` serves those that are. The kernels get the
addresses and strides of what the call has; what TMA cannot read is copied first, which takes far
less than attention does. The workspace is linear in the tokens of q, and needs no initial value.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import attention_params, forward_fp8, heuristics, kernels, streams
from flash8.backends.hopper.backward_variants import TILES, BackwardVariant, Element
from flash8.backends.hopper.key_mean import key_mean
from flash8.backends.hopper.variants import Mask
from flash8.call.options import Options

DTYPES: dict[torch.dtype, Element] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_MAX_HEAD_DIM = TILES[-1][0]
_FP8_FIELDS = ("q_descale", "k_descale", "v_descale", "k_mean", "v_mean", "v_channel_descale")


def refusal(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, options: Options) -> str | None:
    """Why no backward kernel serves this call, or None. Of FP8 inputs see `backward_fp8`."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"there is no backward kernel for {q.dtype} q, {k.dtype} k and {v.dtype} v"
    for name, size in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        if size > _MAX_HEAD_DIM or size % 8 != 0:
            return f"{name} is {size}; backward kernels take multiples of 8 up to {_MAX_HEAD_DIM}"
    given = {"qv": qv, **{name: getattr(options, name) for name in _FP8_FIELDS}}
    for name, x in given.items():
        if x is not None:
            return f"{name} has no backward kernel yet"
    return refusal_of_options(q, k, v, options)


def refusal_of_options(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    """The same for what 16-bit and FP8 inputs have in common."""
    for name, given in (
        ("page_table", options.page_table is not None),
        ("leftpad_k", options.leftpad_k is not None),
        ("kv_batch_idx", options.kv_batch_idx is not None),
        ("tree_mask", options.tree_mask is not None),
        ("dropout without a seed", options.dropout_p > 0.0 and options.dropout_seed is None),
    ):
        if given:
            return f"{name} has no backward kernel yet"
    if any(n > attention_params.INT32_MAX for x in (q, k, v) for n in x.shape):
        return "q, k or v has a dimension above 2^31 - 1"
    return None


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dqv: Tensor,
    ds_aux: Tensor,
) -> "Plan | None":
    """Fills dq, dk, dv (every row of them), and ds_aux where the forward had s_aux, on q's stream,
    without a synchronisation. Returns the plan, if calls like this one may be launched by it."""
    mean = key_mean(k, options) if options.smooth_k and k.numel() > 0 else None
    dout = torch.zeros_like(out) if dout is None else dout
    given = Given(dout, dlse, q, k, v, out, lse, mean)
    return serve(given, s_aux, options, choose(q, k, v, options), dq, dk, dv, ds_aux)


def serve(
    given: "Given",
    s_aux: Tensor | None,
    options: Options,
    variant: BackwardVariant,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    ds_aux: Tensor,
) -> "Plan | None":
    """The same by the kernels of this variant."""
    q = given.q
    sinks = None if s_aux is None else (s_aux, ds_aux)
    if q.numel() == 0:  # there may be nothing to launch then
        ds_aux.zero_()
        sinks = None
    planned = plan(given, sinks, options, dq, dk, dv, variant=variant)
    launch(planned, streams.current_stream(q))
    if planned.dsinks is not None and planned.dsinks is not ds_aux:
        ds_aux.copy_(planned.dsinks)
        return None
    return planned if given.k_mean is None else None


class Given(NamedTuple):
    """What a backward reads."""

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    k_mean: Tensor | None = None  # fp32 (batch, heads_kv, head_dim): dQ comes of K without it


class Plan(NamedTuple):
    """The launches, but for the stream."""

    kernels: tuple[_native.Kernel, _native.Kernel, _native.Kernel]
    device: int
    call: _native.BackwardParams
    dsinks: Tensor | None  # in fp32
    held: list[Tensor]  # what `call` points to besides the arguments of `plan`


def launch(planned: Plan, stream: int) -> None:
    """Enqueues them. Memory of `held` that is freed then is not reused before they have run."""
    _native.launch_backward(*planned.kernels, planned.device, stream, planned.call)


def choose(q: Tensor, k: Tensor, v: Tensor, options: Options) -> BackwardVariant:
    """The variant that serves a call."""
    return choose_for(q.dtype, q, v, options)


def choose_for(
    dtype: torch.dtype, q: Tensor, v: Tensor, options: Options, *, fp8: bool = False
) -> BackwardVariant:
    """The same for gradients of this type."""
    return _variant(
        DTYPES[dtype],
        q.shape[-1],
        v.shape[-1],
        attention_params.mask_of(options),
        options.softcap > 0.0,
        options.alibi_slopes is not None,
        options.dropout_p > 0.0,
        options.deterministic or torch.are_deterministic_algorithms_enabled(),
        fp8,
    )


@functools.cache
def _variant(
    dtype: Element,
    head_dim: int,
    head_dim_v: int,
    mask: Mask,
    softcap: bool,
    alibi: bool,
    dropout: bool,
    deterministic: bool,
    fp8: bool,
) -> BackwardVariant:
    """The variant for these choices, made once per process."""
    tile = next(tile for tile in TILES if head_dim <= tile[0] and head_dim_v <= tile[1])
    return BackwardVariant(
        dtype, *tile, mask, softcap, alibi, dropout=dropout, deterministic=deterministic, fp8=fp8
    )


def plan(
    given: Given,
    sinks: tuple[Tensor, Tensor] | None,
    options: Options,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    variant: BackwardVariant | None = None,
    head_splits: int | None = None,
) -> Plan:
    """The kernels and the parameters of a call, with a workspace of its own.

    `sinks` are s_aux and its gradient. `variant` is `choose`'s unless given, and `head_splits`
    follow from the device.
    """
    variant = choose(given.q, given.k, given.v, options) if variant is None else variant
    first, kernel, last = (kernels.kernel(part) for part in kernels.kernels_of(variant))
    q, k, v, out, dout = (_plain(x) for x in (given.q, given.k, given.v, given.out, given.dout))
    lse = _in_float(given.lse)
    device = q.device.index or 0
    indices = attention_params.indices_of(options)
    held = [q, k, v, out, dout, lse, *indices.values()]
    call = _native.BackwardParams()
    tensor_ref = attention_params.tensor_ref
    call.q, call.k, call.v, call.o, call.dout = (tensor_ref(x) for x in (q, k, v, out, dout))
    call.dq, call.dk, call.dv = (tensor_ref(x) for x in (dq, dk, dv))
    call.lse = attention_params.row_ref(lse)
    if given.dlse is not None:
        dlse = _in_float(given.dlse)
        held.append(dlse)
        call.dlse = attention_params.row_ref(dlse)
    if given.k_mean is not None:
        held.append(given.k_mean)
        call.k_mean = attention_params.row_ref(given.k_mean)
    call.head_dim_v = v.shape[-1]
    attention_params.describe(call, q, k, indices, options)
    attention_params.describe_dropout(call, options)
    call.head_splits = _head_splits(call, kernel, device) if head_splits is None else head_splits
    call.scheduler.heads_per_section = _heads_per_section(call, variant, options)
    if variant.fp8:
        held += forward_fp8.describe_scales(call, q, k, options)
    held += attention_params.describe_scores(call, None if sinks is None else sinks[0], options)
    dsinks = None
    if sinks is not None:
        dsinks = _float_like(sinks[1])
        held.append(dsinks)
        call.dsinks = dsinks.data_ptr()
    held.append(_give_workspace(call, kernel, q))
    return Plan((first, kernel, last), device, call, dsinks, held)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor that kernels fill."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def _plain(x: Tensor) -> Tensor:
    """x, or a copy that kernels can read."""
    if attention_params.tma_can_read(x) and not attention_params.overlaps(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _in_float(lse: Tensor) -> Tensor:
    """LSE, or its gradient, in fp32 and without gaps."""
    return lse.to(torch.float32).contiguous()


def _float_like(ds_aux: Tensor) -> Tensor:
    """Where the kernels leave the gradient of s_aux."""
    if ds_aux.dtype == torch.float32 and ds_aux.is_contiguous():
        return ds_aux
    return allocate(tuple(ds_aux.shape), torch.float32, ds_aux)


def _heads_per_section(
    call: _native.BackwardParams, variant: BackwardVariant, options: Options
) -> int:
    """How many splits of KV heads may run side by side with all that they read again and again in
    L2: Q, dO and the sums of dQ of their query heads."""
    if not heuristics.has_uneven_tiles(options):
        return 1
    row = 2 * (call.head_dim + call.head_dim_v) + 4 * variant.head_dim
    group = -(-call.heads_q // (call.heads_kv * call.head_splits))
    return heuristics.heads_per_section(call.sequences.max_seqlen_q, row * group, 1)


def _head_splits(call: _native.BackwardParams, kernel: _native.Kernel, device: int) -> int:
    """By how many CTAs the query heads of a KV head are shared out."""
    group = call.heads_q // call.heads_kv
    if group == 1:
        return 1
    info, sequences = kernel.info, call.sequences
    assert info is not None
    if sequences.cu_seqlens_k:
        blocks = sequences.total_k // info.block_n + sequences.batch
    else:
        blocks = sequences.batch * -(-sequences.max_seqlen_k // info.block_n)
    return heuristics.head_splits(
        call.heads_kv * blocks, group, sequences.max_seqlen_q, kernel.multiprocessors(device)
    )


def _give_workspace(call: _native.BackwardParams, kernel: _native.Kernel, like: Tensor) -> Tensor:
    """Memory for all parts of the workspace, one behind the other."""
    unit, end = _native.WORKSPACE_UNIT, 0
    offsets = {}
    for name, size in _native.backward_workspace(kernel, call).items():
        offsets[name] = -(-end // unit) * unit
        end = offsets[name] + size
    workspace = allocate((end,), torch.uint8, like)
    if workspace.data_ptr() % unit != 0:  # as memory of the CPU may lie
        workspace = allocate((end + unit,), torch.uint8, like)
    start = -(-workspace.data_ptr() // unit) * unit
    for name, offset in offsets.items():
        setattr(call, name, start + offset)
    return workspace

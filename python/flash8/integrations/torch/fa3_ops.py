"""`torch.ops.flash_attn_3`, as FlashAttention-3 declares its ops, computed by flash8.

Importing this module defines the ops, for CPU and CUDA tensors. FlashAttention-3 itself defines
the same names, so a process can have one of the two: the second import fails.

`_flash_attn_forward` is made of flash8's own ops, so it is traced and differentiated; the others
carry no gradients, as there.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash8.compat import fa3_raw
from flash8.compat.arguments import bound
from flash8.kvcache import flash_attn_combine
from flash8.scheduler import get_scheduler_metadata as plan

_NAMESPACE = "flash_attn_3"

_FWD_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
    "bool is_causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=0, bool? pack_gqa=None, "
    "SymInt sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_BWD_SCHEMA = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, bool deterministic=False, "
    "SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_COMBINE_SCHEMA = (
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)"
)
_PLAN_SCHEMA = (
    "get_scheduler_metadata(SymInt batch_size, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "SymInt num_heads, SymInt num_heads_k, SymInt headdim, SymInt headdim_v, "
    "ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? leftpad_k=None, SymInt? page_size=None, SymInt max_seqlen_k_new=0, "
    "bool is_causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, bool has_softcap=False, SymInt num_splits=0, "
    "bool? pack_gqa=None, SymInt sm_margin=0) -> Tensor"
)
_FORWARD_SCHEMA = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, "
    "Tensor? qv=None, Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, "
    "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, "
    "bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, "
    "SymInt sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? sequed_q=None, Tensor? sequed_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, "
    "Tensor(dv!)? dv=None, float? softmax_scale=None, bool is_causal=False, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    "bool deterministic=False, SymInt sm_margin=0) -> Tensor"
)

_FORWARD_NAMES = tuple(inspect.signature(fa3_raw._flash_attn_forward).parameters)
_NUM_LENGTHS = 6  # cu_seqlens, seqused, max_seqlen of both sides


@torch.no_grad()
def fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_flash_attn_forward` with other defaults; torch leaves out what has the schema's."""
    given: dict[str, Any] = {"rotary_interleaved": False, "num_splits": 0}
    given |= zip(_FORWARD_NAMES, arguments, strict=False)
    return fa3_raw._flash_attn_forward(**given)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """`_flash_attn_backward`, and four tensors of FlashAttention-3's kernels, which are empty."""
    lengths = (*rest, *(None,) * _NUM_LENGTHS)[:_NUM_LENGTHS]
    arguments: tuple[Any, ...] = (*lengths, dq, dk, dv, *rest[_NUM_LENGTHS:])
    softmax_d = fa3_raw._flash_attn_backward(dout, q, k, v, out, softmax_lse, *arguments)
    return softmax_d, *(softmax_d.new_empty((0,)) for _ in range(4))


@torch.no_grad()
def fwd_combine(*arguments: Any) -> tuple[Tensor, Tensor]:
    return flash_attn_combine(*arguments)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    headdim_v: int,
    qkv_dtype: torch.dtype,
    seqused_k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    *rest: Any,
) -> Tensor:
    """`flash8.get_scheduler_metadata`, for which cu_seqlens_k and seqused_q make no difference."""
    return plan(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads,
        num_heads_k,
        headdim,
        seqused_k,
        qkv_dtype,
        headdim_v,
        cu_seqlens_q,
        cu_seqlens_k_new,
        leftpad_k,
        page_size,
        max_seqlen_k_new,
        is_causal,
        (bound(window_size_left), bound(window_size_right)),
        *rest,
    )


_KERNELS: dict[str, Callable[..., Any]] = {
    _FWD_SCHEMA: fwd,
    _BWD_SCHEMA: bwd,
    _COMBINE_SCHEMA: fwd_combine,
    _PLAN_SCHEMA: get_scheduler_metadata,
    _BACKWARD_SCHEMA: fa3_raw._flash_attn_backward,
}


def _define() -> torch.library.Library:
    if hasattr(getattr(torch.ops, _NAMESPACE), "fwd"):
        raise RuntimeError(
            f"torch.ops.{_NAMESPACE} is already defined by another package (FlashAttention-3), so "
            "flash8 cannot take its place in this process"
        )
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    for schema, function in _KERNELS.items():
        library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(schema.partition("(")[0], function, key)
    library.define(_FORWARD_SCHEMA)
    name = _FORWARD_SCHEMA.partition("(")[0]
    library.impl(name, fa3_raw._flash_attn_forward, "CompositeImplicitAutograd")
    return library


_library = _define()

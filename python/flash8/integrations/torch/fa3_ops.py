"""`torch.ops.flash_attn_3.fwd` and `.bwd`, as FlashAttention-3 declares them, computed by flash8.

Importing this module defines the ops, for CPU and CUDA tensors. FlashAttention-3 itself defines
the same names, so a process can have one of the two: the second import fails.
"""

import torch
from torch import Tensor

from flash8.backends import backend_for
from flash8.call import checks
from flash8.call.options import Options
from flash8.ops import attention as ops
from flash8.tensors.arguments import describe

_NAMESPACE = "flash_attn_3"

_FWD_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, "
    "Tensor(out!)? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, "
    "Tensor? seqused_q, Tensor? seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, float? softmax_scale, bool is_causal, SymInt window_size_left, "
    "SymInt window_size_right, SymInt attention_chunk, float softcap, bool is_rotary_interleaved, "
    "Tensor? scheduler_metadata, SymInt num_splits, bool? pack_gqa, SymInt sm_margin) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_BWD_SCHEMA = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!) dq, Tensor(dk!) dk, Tensor(dv!) dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_q, Tensor? seqused_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float? softmax_scale, bool is_causal, SymInt window_size_left, SymInt window_size_right, "
    "float softcap, bool deterministic, SymInt sm_margin) -> ()"
)


@torch.no_grad()
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    q_v: Tensor | None,
    out: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    seqlens_rotary: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    attention_chunk: int,
    softcap: float,
    is_rotary_interleaved: bool,
    scheduler_metadata: Tensor | None,
    num_splits: int,
    pack_gqa: bool | None,
    sm_margin: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(O, LSE, O of the splits, LSE of the splits); shapes as in `flash8.flash_attn_varlen_func`.

    Keys are not appended and nothing is rotated here: `flash8.flash_attn_with_kvcache` does both.
    """
    _refuse_append(
        k_new=k_new,
        v_new=v_new,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        seqlens_rotary=seqlens_rotary,
        scheduler_metadata=scheduler_metadata,
    )
    window_left, window_right = checks.window((window_size_left, window_size_right))
    options = Options(
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        page_table=page_table,
        kv_batch_idx=kv_batch_idx,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_left=window_left,
        window_right=window_right,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    geometry, options = checks.attention(q, k, v, q_v, None, out, options)
    options = ops.resolve_num_splits(q, geometry, options)
    return ops.run_forward(q, k, v, q_v, None, out, options)


@torch.no_grad()
def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    sm_margin: int,
) -> None:
    """Writes the gradients of q, k and v to dq, dk and dv."""
    window_left, window_right = checks.window((window_size_left, window_size_right))
    options = Options(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
    )
    _, options = checks.attention(q, k, v, None, None, None, options)
    unused = q.new_empty((0,))
    backend_for(q).backward(
        dout, None, q, k, v, None, None, out, softmax_lse, options, dq, dk, dv, unused, unused
    )


def _refuse_append(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            raise ValueError(
                f"{name} is not supported by torch.ops.{_NAMESPACE}.fwd of flash8, got "
                f"{describe(tensor)}; call flash8.flash_attn_with_kvcache"
            )


def _define() -> torch.library.Library:
    if hasattr(getattr(torch.ops, _NAMESPACE), "fwd"):
        raise RuntimeError(
            f"torch.ops.{_NAMESPACE} is already defined by another package (FlashAttention-3), so "
            "flash8 cannot take its place in this process"
        )
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    for schema, function in ((_FWD_SCHEMA, fwd), (_BWD_SCHEMA, bwd)):
        library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(function.__name__, function, key)
    return library


_library = _define()

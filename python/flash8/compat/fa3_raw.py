"""FlashAttention-3's forward and backward by themselves, and what its torch ops compute.

They are plain functions with every argument named: frameworks read the signatures.
"""

from typing import Any

from torch import Tensor

from flash8.compat import raw
from flash8.compat.arguments import batch_of, bound, descales, length
from flash8.kvcache import flash_attn_with_kvcache

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Forward:
    """(O, LSE, O of the splits, LSE of the splits). Differentiable, unless keys are appended.

    With k_new and v_new, or scheduler_metadata, the call is one of
    `flash8.flash_attn_with_kvcache`.
    """
    left, right = bound(window_size_left), bound(window_size_right)
    scaled = descales((q_descale, k_descale, v_descale), (q, k, v), batch_of(q, cu_seqlens_q))
    shared: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "page_table": page_table,
        "max_seqlen_q": length(max_seqlen_q),
        "softmax_scale": softmax_scale,
        "causal": causal,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": max(num_splits, 0),
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
        **scaled,
    }
    appends = any(x is not None for x in (k_new, v_new, rotary_cos, rotary_sin))
    is_cache = seqused_k is not None and cu_seqlens_k is None and seqused_q is None
    if not appends and (scheduler_metadata is None or not is_cache):
        return raw.forward(
            q,
            k,
            v,
            qv,
            out_,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            max_seqlen_k=length(max_seqlen_k),
            leftpad_k=leftpad_k,
            kv_batch_idx=kv_batch_idx,
            window_left=left,
            window_right=right,
            **shared,
        )
    for name, x in {"cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q}.items():
        if x is not None:
            raise ValueError(f"{name} cannot be combined with keys to append")
    done: Any = flash_attn_with_kvcache(
        q,
        k,
        v,
        k_new,
        v_new,
        qv,
        rotary_cos,
        rotary_sin,
        cache_seqlens=seqused_k,
        cache_batch_idx=kv_batch_idx,
        cache_leftpad=leftpad_k,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=seqlens_rotary,
        window_size=(left, right),
        rotary_interleaved=rotary_interleaved,
        scheduler_metadata=scheduler_metadata,
        out=out_,
        return_softmax_lse=True,
        **shared,
    )
    out, lse, out_partial, lse_partial = done
    return out, lse, out_partial, lse_partial


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Writes dq, dk and dv. Returns the row sums of dout * out, in the layout of softmax_lse."""
    return raw.backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        (dq, dk, dv),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=sequed_q,
        seqused_k=sequed_k,
        max_seqlen_q=length(max_seqlen_q),
        max_seqlen_k=length(max_seqlen_k),
        softmax_scale=softmax_scale,
        causal=is_causal,
        window_left=bound(window_size_left),
        window_right=bound(window_size_right),
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
    )

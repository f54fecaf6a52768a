"""FlashAttention-3's module, and the keywords that vLLM and SGLang have added to it.

Names, order and defaults are those of flash8's own functions, which are FlashAttention-3's.
Beside them, by keyword: `block_table` for page_table, `sinks` for s_aux, `return_softmax_lse` for
return_attn_probs; `fa_version` and `ver`, which choose among kernels there, have no effect. A
descale may be a number or have shape (1,) or (heads,), and is ignored for a tensor that is not
float8.

Importing this module defines `torch.ops.flash_attn_3`, unless FlashAttention-3 has.
"""

from typing import Any

import torch
from torch import Tensor

import flash8
from flash8 import (
    flash_attn_combine,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    get_scheduler_metadata,
)
from flash8.compat.arguments import batch_of, descales, length, one_of, window
from flash8.compat.fa3_raw import _flash_attn_backward, _flash_attn_forward
from flash8.compat.flash_attn.flash_attn_interface import maybe_contiguous, round_multiple

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_3_gpu",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
]

Descale = Any  # a number, or a tensor of one of several shapes
Window = Any  # a pair, a list, None

flash_attn_3_gpu = torch.ops.flash_attn_3

if not hasattr(flash_attn_3_gpu, "fwd"):
    from flash8.integrations.torch import fa3_ops  # noqa: F401


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Descale = None,
    k_descale: Descale = None,
    v_descale: Descale = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    fa_version: int | None = None,
    ver: int | None = None,
) -> Any:
    return flash8.flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        qv,
        window_size=window(window_size),
        attention_chunk=attention_chunk or 0,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs or return_softmax_lse,
        s_aux=one_of("s_aux", s_aux, "sinks", sinks),
        out=out,
        **descales((q_descale, k_descale, v_descale), (q, k, v), q.shape[0]),
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Descale = None,
    k_descale: Descale = None,
    v_descale: Descale = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    page_table: Tensor | None = None,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    fa_version: int | None = None,
    ver: int | None = None,
) -> Any:
    """With pages the lengths of the keys are seqused_k, or those of cu_seqlens_k."""
    pages = one_of("page_table", page_table, "block_table", block_table)
    if pages is not None and cu_seqlens_k is not None:
        seqused_k = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        cu_seqlens_k = None
    return flash8.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        length(max_seqlen_q),
        length(max_seqlen_k),
        seqused_q,
        seqused_k,
        softmax_scale,
        causal,
        qv,
        window_size=window(window_size),
        attention_chunk=attention_chunk or 0,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs or return_softmax_lse,
        page_table=pages,
        s_aux=one_of("s_aux", s_aux, "sinks", sinks),
        out=out,
        scheduler_metadata=None if pages is None else scheduler_metadata,
        **descales((q_descale, k_descale, v_descale), (q, k, v), batch_of(q, cu_seqlens_q)),
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Descale = None,
    k_descale: Descale = None,
    v_descale: Descale = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    fa_version: int | None = None,
    ver: int | None = None,
) -> Any:
    """O; with return_softmax_lse (O, LSE, O of the splits, LSE of the splits).

    cu_seqlens_k_new without k and v has no effect.
    """
    appends = k is not None or v is not None
    return flash8.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        qv,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        one_of("page_table", page_table, "block_table", block_table),
        cu_seqlens_q,
        cu_seqlens_k_new if appends else None,
        length(max_seqlen_q),
        rotary_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window(window_size),
        attention_chunk=attention_chunk or 0,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        return_softmax_lse=return_softmax_lse,
        s_aux=one_of("s_aux", s_aux, "sinks", sinks),
        out=out,
        **descales(
            (q_descale, k_descale, v_descale),
            (q, k_cache, v_cache),
            batch_of(q, cu_seqlens_q),
        ),
    )

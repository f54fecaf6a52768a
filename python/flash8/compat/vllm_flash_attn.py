"""vLLM's `vllm_flash_attn`, whose varlen function has an order of arguments of its own."""

from typing import Any

import torch
from torch import Tensor

import flash8
from flash8.compat.arguments import batch_of, descales, length, window

__all__ = [
    "fa_version_unsupported_reason",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "is_fa_version_supported",
]

_VERSIONS = (2, 3)


def is_fa_version_supported(fa_version: int, device: Any = None) -> bool:
    """Whether calls with this fa_version are served: on every device, by the same functions."""
    return fa_version in _VERSIONS


def fa_version_unsupported_reason(fa_version: int, device: Any = None) -> str | None:
    if is_fa_version_supported(fa_version, device):
        return None
    return f"flash8 has the interfaces of FlashAttention 2 and 3, not of {fa_version}"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    num_splits: int = 0,
    fa_version: int = 2,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> Any:
    """O, or (O, LSE) with return_softmax_lse.

    fa_version and return_attn_probs have no effect; no option is of one version alone.
    Context parallelism (cp_world_size above 1) is refused.
    """
    if not is_fa_version_supported(fa_version):
        raise ValueError(fa_version_unsupported_reason(fa_version))
    if cp_world_size != 1:
        raise NotImplementedError(f"cp_world_size must be 1 for flash8, got {cp_world_size}")
    return flash8.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        length(max_seqlen_q),
        length(max_seqlen_k),
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        qv=q_v,
        window_size=window(window_size),
        softcap=softcap,
        num_splits=num_splits,
        deterministic=deterministic,
        return_attn_probs=return_softmax_lse,
        page_table=block_table,
        s_aux=s_aux,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        out=out,
        scheduler_metadata=None if block_table is None else scheduler_metadata,
        **descales((q_descale, k_descale, v_descale), (q, k, v), batch_of(q, cu_seqlens_q)),
    )


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Any = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """`flash8.get_scheduler_metadata` without attention_chunk."""
    return flash8.get_scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        cache_seqlens,
        qkv_dtype,
        headdim_v,
        cu_seqlens_q,
        cu_seqlens_k_new,
        cache_leftpad,
        page_size,
        max_seqlen_k_new,
        causal,
        window(window_size),
        has_softcap=has_softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )

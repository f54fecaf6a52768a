"""The packed-input twins of the public attention functions: q, k, v (or k, v) in one tensor.

They take views of the packed tensor and call `flash8.attention`; gradients arrive packed, and
errors name the packed tensor.
"""

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from flash8.attention import Output, Window, attend
from flash8.call import checks
from flash8.tensors.arguments import Names, describe, require_int, require_rank, require_tensor


class Extras(TypedDict, total=False):
    """What `flash8.attention` takes by keyword only."""

    s_aux: Tensor | None
    alibi_slopes: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    out: Tensor | None
    k_mean: Tensor | None
    v_mean: Tensor | None
    v_channel_descale: Tensor | None
    smooth_k: bool


_QKV: Names = {
    **dict.fromkeys("qkv", "qkv"),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "cu_seqlens"),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "max_seqlen"),
}
_KV: Names = dict.fromkeys("kv", "kv")


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    **extras: Unpack[Extras],
) -> Output:
    """`flash_attn_func` on one tensor that holds q, k and v.

    Args as in `flash_attn_func` (its keyword-only ones too), and:
        qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q
            (batch, seqlen, num_heads_q + 2 * heads_kv, head_dim): heads of q, then k, then v.
    """
    q, k, v = _unpack_qkv(qkv, num_heads_q, leading="batch, seqlen", leading_rank=2)
    return _attend(
        _QKV,
        (q, k, v),
        extras,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    **extras: Unpack[Extras],
) -> Output:
    """`flash_attn_varlen_func` on one tensor that holds q, k and v.

    Args as in `flash_attn_varlen_func` (its keyword-only ones too), and:
        qkv: (total, 3, heads, head_dim), or with num_heads_q
            (total, num_heads_q + 2 * heads_kv, head_dim).
    """
    q, k, v = _unpack_qkv(qkv, num_heads_q, leading="total", leading_rank=1)
    return _attend(
        _QKV,
        (q, k, v),
        extras,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    **extras: Unpack[Extras],
) -> Output:
    """`flash_attn_func` on q and kv, (batch, seqlen_k, 2, heads_kv, head_dim).

    Args as in `flash_attn_func`, without qv.
    """
    k, v = _unpack_kv(kv, leading="batch, seqlen_k", leading_rank=2)
    return _attend(
        _KV,
        (q, k, v),
        extras,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    **extras: Unpack[Extras],
) -> Output:
    """`flash_attn_varlen_func` on q and kv, (total_k, 2, heads_kv, head_dim).

    Args as in `flash_attn_varlen_func`, without qv and page_table.
    """
    k, v = _unpack_kv(kv, leading="total_k", leading_rank=1)
    return _attend(
        _KV,
        (q, k, v),
        extras,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        causal=causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def _attend(
    names: Names,
    tensors: tuple[Tensor, Tensor, Tensor],
    extras: Extras,
    *,
    return_attn_probs: bool,
    **arguments: Any,
) -> Output:
    """`flash8.attention.attend` of a call's arguments, and of those that are keyword-only."""
    unknown = extras.keys() - Extras.__annotations__.keys()
    if unknown:
        raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}")
    q, k, v = tensors
    arguments = {"q": q, "k": k, "v": v, **arguments, **extras}
    seed = arguments.pop("dropout_seed", None)
    return attend(arguments, dropout_seed=seed, return_lse=return_attn_probs, names=names)


def _unpack_qkv(
    qkv: Any, num_heads_q: Any, *, leading: str, leading_rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    require_tensor("qkv", qkv, checks.INPUT_DTYPES)
    if num_heads_q is None:
        require_rank("qkv", qkv, leading_rank + 3, f"({leading}, 3, heads, head_dim)")
        _require_parts("qkv", qkv, 3)
        q, k, v = qkv.unbind(dim=-3)
        return q, k, v
    layout = f"({leading}, num_heads_q + 2 * heads_kv, head_dim) with num_heads_q"
    require_rank("qkv", qkv, leading_rank + 2, layout)
    heads = qkv.shape[-2]
    num_heads_q = require_int("num_heads_q", num_heads_q, minimum=1)
    if heads <= num_heads_q or (heads - num_heads_q) % 2 != 0:
        raise ValueError(
            f"num_heads_q must leave an even, positive number of the {heads} heads of qkv for "
            f"k and v, got {num_heads_q}"
        )
    heads_kv = (heads - num_heads_q) // 2
    if num_heads_q % heads_kv != 0:
        raise ValueError(
            f"num_heads_q must be a multiple of the {heads_kv} heads of k and v that it leaves of "
            f"the {heads} heads of qkv, got {num_heads_q}"
        )
    q, k, v = torch.split(qkv, [num_heads_q, heads_kv, heads_kv], dim=-2)
    return q, k, v


def _unpack_kv(kv: Any, *, leading: str, leading_rank: int) -> tuple[Tensor, Tensor]:
    require_tensor("kv", kv, checks.INPUT_DTYPES)
    require_rank("kv", kv, leading_rank + 3, f"({leading}, 2, heads_kv, head_dim)")
    _require_parts("kv", kv, 2)
    k, v = kv.unbind(dim=-3)
    return k, v


def _require_parts(name: str, packed: Tensor, parts: int) -> None:
    if packed.shape[-3] != parts:
        raise ValueError(
            f"{name} must have size {parts} in its third dimension from the end, "
            f"got {describe(packed)}"
        )

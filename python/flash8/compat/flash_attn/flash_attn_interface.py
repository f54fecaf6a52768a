"""FlashAttention-2's functions: dropout_p comes before softmax_scale, pages are a block_table.

Meanings, layouts and defaults are those of `flash8.flash_attn_func` and its siblings. With
return_attn_probs a function returns (O, LSE, S_dmask), S_dmask empty without dropout.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import flash8
from flash8.compat.arguments import length, window
from flash8.compat.flash_attn.raw import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    key_lengths,
)
from flash8.compat.probabilities import signed_probabilities
from flash8.tensors.philox import draw_seed

__all__ = [
    "USE_TRITON_ROCM",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

Window = Any  # a pair, a list, a tensor of two

USE_TRITON_ROCM = False


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    return (x + m - 1) // m * m


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many keys of S_dmask have one maximum subtracted: all of a row."""
    return 2**31 - 1


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = _Call(dropout_p, options, return_attn_probs)
    return call.run(flash8.flash_attn_func, (q, k, v), (q, k), deterministic)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = _Call(dropout_p, options, return_attn_probs)
    unpacked = qkv.unbind(-3)[:2] if call.wants_probabilities else ()
    return call.run(flash8.flash_attn_qkvpacked_func, (qkv,), unpacked, deterministic)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = _Call(dropout_p, options, return_attn_probs)
    unpacked = (q, kv.select(-3, 0)) if call.wants_probabilities else ()
    return call.run(flash8.flash_attn_kvpacked_func, (q, kv), unpacked, deterministic)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = _Call(dropout_p, options, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, length(max_seqlen_q), length(max_seqlen_k))
    if block_table is None:
        function = flash8.flash_attn_varlen_func
        return call.run(function, (q, k, v, *lengths), (q, k), deterministic, lengths)
    if call.wants_probabilities:
        raise ValueError("return_attn_probs with dropout cannot be combined with block_table")
    out, lse = flash8.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        None,
        lengths[2],
        lengths[3],
        num_splits=0,
        deterministic=deterministic,
        dropout_p=dropout_p,
        return_attn_probs=True,
        **key_lengths(cu_seqlens_k, None, block_table),
        **options,
    )
    return (out, lse, q.new_empty((0,))) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = _Call(dropout_p, options, return_attn_probs)
    longest = length(max_seqlen)
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    unpacked = qkv.unbind(-3)[:2] if call.wants_probabilities else ()
    function = flash8.flash_attn_varlen_qkvpacked_func
    return call.run(function, (qkv, cu_seqlens, longest), unpacked, deterministic, lengths)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    call = _Call(dropout_p, options, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, length(max_seqlen_q), length(max_seqlen_k))
    unpacked = (q, kv.select(-3, 0)) if call.wants_probabilities else ()
    function = flash8.flash_attn_varlen_kvpacked_func
    return call.run(function, (q, kv, *lengths), unpacked, deterministic, lengths)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """O, or (O, LSE) with return_softmax_lse."""
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=block_table,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=True,
        **_options(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )
    return (out, lse) if return_softmax_lse else out


# FlashAttention-1's names.
flash_attn_unpadded_func = flash_attn_varlen_func
flash_attn_unpadded_qkvpacked_func = flash_attn_varlen_qkvpacked_func
flash_attn_unpadded_kvpacked_func = flash_attn_varlen_kvpacked_func


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window(window_size),
        "softcap": max(softcap, 0.0),  # negative ones turn it off there
        "alibi_slopes": alibi_slopes,
    }


class _Call:
    """A call of one of flash8's functions, and the third part of its result."""

    def __init__(self, dropout_p: float, options: dict[str, Any], return_probs: bool) -> None:
        self._dropout_p, self._options, self._return_probs = dropout_p, options, return_probs
        self.wants_probabilities = return_probs and dropout_p > 0.0

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        qk: tuple[Tensor, ...],
        deterministic: bool,
        lengths: tuple[Any, ...] | None = None,
    ) -> Any:
        """qk: q and k as they go into the probabilities. lengths: cu_seqlens and max_seqlens."""
        seed = draw_seed(qk[0].device) if self.wants_probabilities else None
        result = function(
            *arguments,
            deterministic=deterministic,
            dropout_p=self._dropout_p,
            dropout_seed=seed,
            return_attn_probs=self._return_probs,
            **self._options,
        )
        if not self._return_probs:
            return result
        out, lse = result
        if seed is None:
            return out, lse, out.new_empty((0,))
        q, k = qk
        cu_seqlens = None if lengths is None else (lengths[0], lengths[1])
        longest = (q.shape[1], k.shape[1]) if lengths is None else (lengths[2], lengths[3])
        probabilities = signed_probabilities(
            q, k, cu_seqlens, longest, seed, self._dropout_p, self._options
        )
        return out, lse, probabilities.to(q.dtype)

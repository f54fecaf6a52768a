"""The attention function that every layer calls."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from flash8.attention import flash_attn_func, flash_attn_varlen_func
from flash8.fp8 import BlockScaling, CurrentScaling, fp8_attention
from flash8.integrations.autocast import cast_for_autocast
from flash8.integrations.transformers import packing
from flash8.integrations.transformers.fp8 import recipe_of
from flash8.integrations.transformers.layouts import (
    UNBOUNDED,
    Cached,
    Dense,
    Layout,
    Packed,
)
from flash8.kvcache import flash_attn_with_kvcache

#: Arguments of transformers' attention functions that change the result and are not served.
REFUSED = ("position_bias", "head_mask", "cache", "indices", "block_indices", "sinks")

_REMEDY = "use attn_implementation='sdpa' or 'eager' for that"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers' `AttentionInterface` defines it.

    Args:
        module: the layer; its `is_causal` counts where neither the mask nor `is_causal` says more,
            and its `config.f8_recipe` asks for FP8.
        query: (batch, heads, seqlen_q, head_dim).
        key, value: (batch, heads_kv, seqlen_k, head_dim[_v]); heads are not repeated.
        attention_mask: what `masks.make_mask` answered.
        sliding_window: tokens that a query sees, itself included, when there is no layout.
        s_aux: (heads,) attention sinks.
        kwargs: of these, cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, or else
            position_ids that restart, describe packed sequences: see `packing.resolve`.

    Returns:
        (batch, seqlen_q, heads, head_dim_v), and None in place of attention weights.

    Raises:
        ValueError: attention weights, a mask tensor, a position bias, chosen keys or a paged cache.
    """
    refuse_unsupported(attention_mask, kwargs)
    q, k, v = cast_for_autocast(query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    layout = attention_mask if isinstance(attention_mask, Layout) else None
    if layout is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        layout = Dense(causal, window_of(sliding_window, causal), packing_known=not causal)
    layout = packing.resolve(layout, q, k, kwargs)
    options: dict[str, Any] = dict(
        softmax_scale=scaling,
        causal=layout.causal,
        window_size=layout.window,
        softcap=softcap or 0.0,
        s_aux=sinks_of(s_aux, q),
        attention_chunk=layout.attention_chunk,
    )
    if isinstance(layout, Cached):
        return _run_cached(q, k, v, layout, dropout, options), None
    if isinstance(layout, Dense) and q.shape[1] < k.shape[1] and dropout == 0.0:
        # Generation over a dynamic cache: few rows of q have a kernel of their own.
        return cast(Tensor, flash_attn_with_kvcache(q, k, v, **options)), None
    options["dropout_p"] = dropout
    # Over a cache one query would have all keys quantized again: FP8 is for whole sequences.
    recipe = recipe_of(getattr(module, "config", None)) if q.shape[1] == k.shape[1] else None
    if isinstance(layout, Packed):
        return _run_packed(q, k, v, layout, recipe, options), None
    if recipe is not None:
        return cast(Tensor, fp8_attention(q, k, v, recipe, **options)), None
    return cast(Tensor, flash_attn_func(q, k, v, **options)), None


def _run_cached(
    q: Tensor, k: Tensor, v: Tensor, layout: Cached, dropout: float, options: dict[str, Any]
) -> Tensor:
    if dropout > 0.0:
        raise ValueError(
            f"attention dropout over a KV cache is not supported, got {dropout}; "
            "call model.eval() or set attention_dropout=0"
        )
    options = options | dict(cache_seqlens=layout.used, cache_leftpad=layout.leftpad)
    return cast(Tensor, flash_attn_with_kvcache(q, k, v, **options))


def _run_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Packed,
    recipe: CurrentScaling | BlockScaling | None,
    options: dict[str, Any],
) -> Tensor:
    queries, keys = layout.queries, layout.keys
    options = options | dict(
        cu_seqlens_q=queries.cu_seqlens,
        cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=queries.max_seqlen,
        max_seqlen_k=keys.max_seqlen,
    )
    packed = queries.gather(q), keys.gather(k), keys.gather(v)
    out: Any
    if recipe is None:
        out = flash_attn_varlen_func(*packed, **options)
    else:
        out = fp8_attention(*packed, recipe, **options)
    return queries.scatter(out, torch.Size((*q.shape[:-1], v.shape[-1])))


def refuse_unsupported(attention_mask: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True is not supported: attention weights are never stored; "
            "use attn_implementation='eager' for that"
        )
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask tensors are not supported beyond the 2-D padding mask that a model is "
            f"called with, got shape {tuple(attention_mask.shape)} in a layer; {_REMEDY}"
        )
    if attention_mask is not None and not isinstance(attention_mask, Layout):
        raise ValueError(
            f"attention_mask must be a padding mask or None, got {type(attention_mask).__name__}; "
            f"{_REMEDY}"
        )
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported; {_REMEDY}")


def window_of(sliding_window: int | None, causal: bool) -> tuple[int, int]:
    if sliding_window is None:
        return UNBOUNDED
    return (sliding_window - 1, 0) if causal else (sliding_window, sliding_window)


def sinks_of(s_aux: Tensor | None, q: Tensor) -> Tensor | None:
    if s_aux is None or s_aux.dtype in (torch.float32, torch.float64, q.dtype):
        return s_aux
    return s_aux.float()

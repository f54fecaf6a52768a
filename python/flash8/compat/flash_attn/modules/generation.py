"""What MHA and ParallelMHA share: rotary, a cache of keys and values, the inner attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash8.compat.flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash8.compat.flash_attn.layers.rotary import RotaryEmbedding
from flash8.compat.flash_attn.modules.core import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
)
from flash8.nn.mha import alibi_slopes

_ROTARY_STEP = 16  # of rotary_dim, where the append rotates


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of Press et al. (arXiv 2108.12409)."""
    slopes: list[float] = alibi_slopes(nheads).tolist()
    return slopes


class CachedAttention(nn.Module):
    """Attention of projected q, k and v, with the cache of `inference_params`."""

    rotary_emb: RotaryEmbedding
    inner_attn: FlashSelfAttention
    inner_cross_attn: FlashCrossAttention

    def __init__(
        self,
        causal: bool,
        layer_idx: int | None,
        rotary: dict[str, Any] | None,
        softmax_scale: float | None,
        dropout: float,
        slopes: Tensor | None,
        window_size: Any,
        use_flash_attn: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        if not use_flash_attn and (slopes is not None or tuple(window_size) != (-1, -1)):
            raise ValueError("use_alibi and window_size need use_flash_attn=True")
        self.causal = causal
        self.layer_idx = layer_idx
        self.use_flash_attn = use_flash_attn
        self.checkpointing = checkpointing
        self.rotary_emb_dim = 0 if rotary is None else rotary["dim"]
        if rotary is not None:
            self.rotary_emb = RotaryEmbedding(**rotary)
        shared = (causal, softmax_scale, dropout)
        if use_flash_attn:
            extra = {"alibi_slopes": slopes, "window_size": window_size}
            self.inner_attn = FlashSelfAttention(*shared, **extra)
            self.inner_cross_attn = FlashCrossAttention(*shared, **extra)
        else:
            self.inner_attn = SelfAttention(*shared)
            self.inner_cross_attn = CrossAttention(*shared)

    def attend(self, q: Tensor, kv: Tensor, inference_params: Any = None, **inner: Any) -> Tensor:
        """q: (batch, seqlen, heads, head_dim); kv: (batch, seqlen, 2, heads_kv, head_dim)."""
        if inference_params is None:
            if self.rotary_emb_dim > 0:
                q, kv = self.rotary_emb(q, kv)
            return self._inner(self.inner_cross_attn, q, kv, **inner)
        lengths = inference_params.lengths_per_sample
        offset = inference_params.seqlen_offset if lengths is None else lengths
        decodes = inference_params.seqlen_offset > 0
        append_rotates = decodes and self.rotary_emb_dim % _ROTARY_STEP == 0
        if self.rotary_emb_dim > 0 and not append_rotates:
            longest = inference_params.max_seqlen
            q, kv = self.rotary_emb(q, kv, seqlen_offset=offset, max_seqlen=longest)
        if not decodes:
            return self._inner(
                self.inner_cross_attn, q, self._update_kv_cache(kv, inference_params)
            )
        return self._decode(q, kv, inference_params, append_rotates)

    def attend_qkv(self, qkv: Tensor, inference_params: Any = None, **inner: Any) -> Tensor:
        """qkv: (batch, seqlen, 3, heads, head_dim), or packed."""
        if inference_params is not None:
            return self.attend(qkv.select(-3, 0), qkv.narrow(-3, 1, 2), inference_params)
        if self.rotary_emb_dim > 0:
            qkv = self.rotary_emb(qkv)
        return self._inner(self.inner_attn, qkv, **inner)

    def _inner(self, attention: nn.Module, *tensors: Tensor, **inner: Any) -> Tensor:
        out: Tensor
        if self.checkpointing:
            out = checkpoint(attention, *tensors, use_reentrant=False, **inner)
        else:
            out = attention(*tensors, **inner)
        return out

    def _decode(self, q: Tensor, kv: Tensor, inference_params: Any, rotates: bool) -> Tensor:
        batch = q.shape[0]
        cache = inference_params.key_value_memory_dict[self.layer_idx][:batch]
        lengths = inference_params.lengths_per_sample
        rotary: dict[str, Any] = {}
        if self.rotary_emb_dim > 0 and rotates:
            table = self.rotary_emb
            if table.scale is not None:
                raise ValueError("rotary_emb_scale_base (XPos) is not supported while decoding")
            table._update_cos_sin_cache(inference_params.max_seqlen, q.device, q.dtype)
            rotary = {"rotary_cos": table._cos_cached, "rotary_sin": table._sin_cached}
            rotary["rotary_interleaved"] = table.interleaved
        inner = self.inner_cross_attn
        out: Tensor = flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=inference_params.seqlen_offset if lengths is None else lengths[:batch],
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=None if inner.alibi_slopes is None else inner.alibi_slopes.float(),
            **rotary,
        )
        return out

    def _update_kv_cache(self, kv: Tensor, inference_params: Any) -> Tensor:
        """Writes kv to the layer's cache, which the first call makes; all that is used of it."""
        if self.layer_idx is None:
            raise ValueError("layer_idx must be given to the constructor for generation")
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            rows, seqlen = inference_params.max_batch_size, inference_params.max_seqlen
            caches[self.layer_idx] = kv.new_empty((rows, seqlen, *kv.shape[2:]))
        row, first = inference_params.batch_size_offset, inference_params.seqlen_offset
        rows = caches[self.layer_idx][row : row + kv.shape[0]]
        used: Tensor = rows[:, : first + kv.shape[1]]
        used[:, first:] = kv
        return used


def new_cache(
    like: Tensor, batch_size: int, max_seqlen: int, heads: tuple[int, int], dtype: Any
) -> Tensor:
    """(batch_size, max_seqlen, 2, *heads) of like's device, and its dtype if none is given."""
    dtype = like.dtype if dtype is None else dtype
    return torch.empty(batch_size, max_seqlen, 2, *heads, dtype=dtype, device=like.device)

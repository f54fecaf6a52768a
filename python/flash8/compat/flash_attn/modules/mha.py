"""Multi-head attention with its projections, by FlashAttention-2's names: its checkpoints load.

Attention itself is flash8's with and without `use_flash_attn`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flash8.compat.flash_attn.modules.core import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
)
from flash8.compat.flash_attn.modules.generation import (
    CachedAttention,
    get_alibi_slopes,
    new_cache,
)
from flash8.compat.flash_attn.modules.parallel import ParallelMHA

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "ParallelMHA",
    "SelfAttention",
    "get_alibi_slopes",
]


class MHA(CachedAttention):
    """Self-attention, or cross-attention with cross_attn.

    Args:
        num_heads_kv: heads of k and v (GQA, MQA); num_heads by default.
        layer_idx: which cache of `inference_params` is the layer's.
        return_residual: return the input too.
        checkpointing: recompute the attention in the backward.
        fused_bias_fc: without effect.
        dwconv: not supported.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Any = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dwconv:
            raise NotImplementedError("dwconv is not supported by flash8.compat's MHA")
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError("rotary_emb_dim must be 0 with cross_attn")
        heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % heads_kv != 0 or embed_dim % num_heads != 0:
            raise ValueError(
                "num_heads must be a multiple of num_heads_kv and divide embed_dim, got "
                f"num_heads={num_heads}, num_heads_kv={heads_kv}, embed_dim={embed_dim}"
            )
        rotary = {
            "dim": rotary_emb_dim,
            "base": rotary_emb_base,
            "scale_base": rotary_emb_scale_base,
            "interleaved": rotary_emb_interleaved,
            "device": device,
        }
        super().__init__(
            causal,
            layer_idx,
            rotary if rotary_emb_dim > 0 else None,
            softmax_scale,
            dropout,
            torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None,
            window_size,
            use_flash_attn,
            checkpointing,
        )
        self.embed_dim = embed_dim
        self.num_heads, self.num_heads_kv = num_heads, heads_kv
        self.head_dim = embed_dim // num_heads
        self.cross_attn = cross_attn
        self.return_residual = return_residual
        kv_dim = 2 * self.head_dim * heads_kv
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **made)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **made)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **made)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        heads = (self.num_heads_kv, self.head_dim)
        return new_cache(self.out_proj.weight, batch_size, max_seqlen, heads, dtype)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            x: (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens and max_seqlen.
            x_kv: what k and v are of, with cross_attn; x by default.
            key_padding_mask: bool (batch, seqlen), True to keep; without use_flash_attn only.
            mixer_subset: an index of the tokens that have queries, with cross_attn only.
            inference_params: the caches, the length that is used of them, and their sizes.
        """
        if key_padding_mask is not None and self.use_flash_attn:
            raise ValueError("key_padding_mask needs use_flash_attn=False, or unpad x: cu_seqlens")
        if cu_seqlens is not None and (not self.use_flash_attn or self.rotary_emb_dim > 0):
            raise ValueError("cu_seqlens needs use_flash_attn=True and rotary_emb_dim=0")
        if self.use_flash_attn:
            inner = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
        else:
            inner = {"key_padding_mask": key_padding_mask, **kwargs}
        if not self.cross_attn and self.num_heads_kv == self.num_heads:
            qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            context = self.attend_qkv(qkv, inference_params, **inner)
        else:
            q, kv = self._projected(x, x_kv, mixer_subset)
            if cu_seqlens is not None and "cu_seqlens_k" not in inner:
                inner |= {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
            context = self.attend(q, kv, inference_params, **inner)
        out: Tensor = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _projected(
        self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any
    ) -> tuple[Tensor, Tensor]:
        if self.cross_attn:
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            kv_dim = 2 * self.num_heads_kv * self.head_dim
            q, kv = self.Wqkv(x).split((self.embed_dim, kv_dim), dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return q, kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))

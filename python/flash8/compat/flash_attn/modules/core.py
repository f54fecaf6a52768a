"""The attention inside the projections: of q, k and v in one tensor, and of q over k and v."""

from typing import Any

import torch
from torch import Tensor, nn

from flash8.compat.flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash8.varlen import pad_input, unpad_input


class _Attention(nn.Module):
    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: Any = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _options(self, causal: bool | None) -> dict[str, Any]:
        slopes = self.alibi_slopes
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if slopes is None else slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Attention):
    """Attention of (batch, seqlen, 3, heads, head_dim), or (total, 3, heads, head_dim)."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Any = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """causal: instead of the module's."""
        options = self._options(causal)
        out: Tensor
        if cu_seqlens is None:
            out = flash_attn_qkvpacked_func(qkv, **options)
            return out
        if max_seqlen is None:
            raise ValueError("max_seqlen must be given with cu_seqlens, got None")
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)
        return out


class FlashCrossAttention(_Attention):
    """Attention of q, (batch, seqlen_q, heads, head_dim), over kv, (batch, seqlen_k, 2, ...); or
    packed."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Any = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """causal: instead of the module's."""
        options = self._options(causal)
        out: Tensor
        if cu_seqlens is None:
            out = flash_attn_kvpacked_func(q, kv, **options)
            return out
        if max_seqlen is None or cu_seqlens_k is None or max_seqlen_k is None:
            raise ValueError("max_seqlen, cu_seqlens_k and max_seqlen_k go with cu_seqlens")
        lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        out = flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)
        return out


class SelfAttention(FlashSelfAttention):
    """`FlashSelfAttention` with padding: FlashAttention-2's attention in plain PyTorch."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(  # type: ignore[override]
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """key_padding_mask: bool (batch, seqlen), True to keep. The output is 0 at padding."""
        if key_padding_mask is None:
            return super().forward(qkv, causal)
        kept, indices, cu_seqlens, longest, _ = unpad_input(qkv, key_padding_mask)
        out = super().forward(kept, causal, cu_seqlens, longest)
        return pad_input(out, indices, *qkv.shape[:2])


class CrossAttention(FlashCrossAttention):
    """`FlashCrossAttention` with padded keys: FlashAttention-2's attention in plain PyTorch."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """key_padding_mask: bool (batch, seqlen_k), True to keep."""
        if key_padding_mask is None:
            return super().forward(q, kv, causal)
        kept, _, cu_seqlens_k, longest, _ = unpad_input(kv, key_padding_mask)
        batch, seqlen_q = q.shape[:2]
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q
        packed = q.flatten(0, 1)
        lengths = (cu_seqlens, seqlen_q, cu_seqlens_k, longest)
        return super().forward(packed, kept, causal, *lengths).view_as(q)

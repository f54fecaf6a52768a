"""Core attention as modules: no weights, only the options of the call.

Constructor and call follow `flash_attn.modules.mha.FlashSelfAttention` and `FlashCrossAttention`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flash8.attention import Window
from flash8.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


class AlibiModule(nn.Module):
    """A module whose ALiBi slopes move with it but stay fp32, whatever its parameters become."""

    alibi_slopes: Tensor | None

    def _apply(self, fn: Any, recurse: bool = True) -> "AlibiModule":
        exact = self.alibi_slopes
        super()._apply(fn, recurse)
        moved = self.alibi_slopes
        if exact is not None and moved is not None:
            # What leaves the meta device has no values: to_empty does not ask for them.
            self.alibi_slopes = (
                torch.empty_like(moved, dtype=exact.dtype)
                if exact.is_meta
                else exact.to(moved.device)
            )
        return self


class _CoreAttention(AlibiModule):
    """The options both modules share.

    Args:
        causal: query i sees keys j <= i + seqlen_k - seqlen_q.
        softmax_scale: factor of the scores, default head_dim ** -0.5.
        attention_dropout: probability to drop an attention weight, in training mode only.
        window_size: (left, right), inclusive; -1 is unbounded.
        alibi_slopes: fp32 (heads,) or (batch, heads); kept as a buffer.
        deterministic: bitwise repeatable gradients.
        softcap: if positive, scores are capped by softcap * tanh(S / softcap).
        smooth_k: make dQ with K without its mean, as in `flash_attn_func`.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        *,
        softcap: float = 0.0,
        smooth_k: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.attention_dropout = attention_dropout
        self.window_size = window_size
        self.deterministic = deterministic
        self.softcap = softcap
        self.smooth_k = smooth_k
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def extra_repr(self) -> str:
        return (
            f"causal={self.causal}, window_size={self.window_size}, softcap={self.softcap}, "
            f"attention_dropout={self.attention_dropout}"
        )

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "deterministic": self.deterministic,
            "smooth_k": self.smooth_k,
            "alibi_slopes": self.alibi_slopes,
            "dropout_p": self.attention_dropout if self.training else 0.0,
        }


class FlashSelfAttention(_CoreAttention):
    """Self-attention over packed q, k, v."""

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention of each token over its own sequence.

        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or with cu_seqlens
                (total, 3, heads, head_dim).
            causal: overrides the constructor's for this call.
            cu_seqlens: (batch + 1,) int32.
            max_seqlen: longest sequence; required with cu_seqlens.

        Returns:
            (batch, seqlen, heads, head_dim), or (total, heads, head_dim).
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)  # type: ignore[return-value]
        return flash_attn_varlen_qkvpacked_func(  # type: ignore[return-value]
            qkv, cu_seqlens, required("max_seqlen", max_seqlen, "cu_seqlens"), **options
        )


class FlashCrossAttention(_CoreAttention):
    """Attention of q over packed k, v of another sequence."""

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
        """Attention of each query over the keys of the sequence with the same number.

        Args:
            q: (batch, seqlen_q, heads, head_dim), or with cu_seqlens (total_q, heads, head_dim).
            kv: (batch, seqlen_k, 2, heads_kv, head_dim), or (total_k, 2, heads_kv, head_dim).
            causal: overrides the constructor's for this call.
            cu_seqlens, cu_seqlens_k: (batch + 1,) int32, both or none.
            max_seqlen, max_seqlen_k: longest sequences; required with cu_seqlens.

        Returns:
            (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim).
        """
        options = self._options(causal)
        if cu_seqlens is None:
            if cu_seqlens_k is not None:
                raise ValueError("cu_seqlens_k needs cu_seqlens, got None")
            return flash_attn_kvpacked_func(q, kv, **options)  # type: ignore[return-value]
        return flash_attn_varlen_kvpacked_func(  # type: ignore[return-value]
            q,
            kv,
            cu_seqlens,
            required("cu_seqlens_k", cu_seqlens_k, "cu_seqlens"),
            required("max_seqlen", max_seqlen, "cu_seqlens"),
            required("max_seqlen_k", max_seqlen_k, "cu_seqlens"),
            **options,
        )


def required(name: str, value: Any, because_of: str) -> Any:
    """The value, or a ValueError that says which other argument asks for it."""
    if value is None:
        raise ValueError(f"{name} is required with {because_of}, got None")
    return value

"""FlashAttention-1's modules. FlashMHA also stands in for the attention of
`nn.TransformerEncoderLayer`, and loads the checkpoints of FlashAttention-2's MHA."""

from typing import Any

import torch
from torch import Tensor, nn

from flash8.compat.flash_attn.flash_attn_interface import (
    flash_attn_qkvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash8.varlen import pad_input, unpad_input


class FlashAttention(nn.Module):
    """Attention of q, k and v in one tensor."""

    def __init__(
        self,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """
        Args:
            qkv: (batch, seqlen, 3, heads, head_dim), or (total, 3, ...) with cu_seqlens and max_s.
            key_padding_mask: bool (batch, seqlen), True to keep. The output is 0 at padding.
        """
        if need_weights:
            raise ValueError("need_weights must be False: the weights are never all there")
        options: dict[str, Any] = {
            "dropout_p": self.dropout_p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": causal,
        }
        if cu_seqlens is not None:
            if max_s is None:
                raise ValueError("max_s must be given with cu_seqlens, got None")
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_s, **options), None
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **options), None
        kept, indices, lengths, longest, _ = unpad_input(qkv, key_padding_mask)
        out = flash_attn_varlen_qkvpacked_func(kept, lengths, longest, **options)
        return pad_input(out, indices, *qkv.shape[:2]), None


class FlashMHA(nn.Module):
    """Self-attention with its projections.

    Called with x alone it is FlashAttention-1's. Called with query, key and value it is
    `nn.MultiheadAttention`'s, so it can be the `self_attn` of an `nn.TransformerEncoderLayer`.
    """

    #: What `nn.TransformerEncoderLayer` asks its attention for. in_proj_bias None keeps it from
    #: calling a fused op with weights that are not here.
    batch_first = True
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        batch_first: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not batch_first:
            raise ValueError("batch_first must be True, got False")
        if embed_dim % num_heads != 0:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *tensors: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, None]:
        """
        Args:
            x: (batch, seqlen, embed_dim).
            tensors: key and value, which must be x; or key_padding_mask by position.
            key_padding_mask: (batch, seqlen). A bool one says True to keep, as FlashAttention-1
                does, unless key and value are given: then True is padding, as in torch. A floating
                one is added to the scores in torch: 0 to keep, -inf for padding.
            attn_mask: only the causal one, with is_causal.
        """
        as_in_torch = len(tensors) == 2
        if as_in_torch and any(tensor is not x for tensor in tensors):
            raise ValueError("key and value must be query itself: FlashMHA is self-attention")
        if len(tensors) == 1:
            key_padding_mask = tensors[0]
        if attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask is not supported; for a causal one pass is_causal=True, or causal=True "
                "to the constructor"
            )
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        context, _ = self.inner_attn(
            qkv,
            key_padding_mask=_kept(key_padding_mask, as_in_torch),
            causal=self.causal or is_causal,
            need_weights=need_weights,
        )
        return self.out_proj(context.flatten(-2)), None


def _kept(mask: Tensor | None, as_in_torch: bool) -> Tensor | None:
    if mask is None:
        return None
    if mask.is_floating_point():
        return mask == 0
    return ~mask if as_in_torch and mask.dtype == torch.bool else mask

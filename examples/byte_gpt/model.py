"""A small GPT over bytes, its attention in fp32, bf16 and FP8, and the rivals of the fp32 one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from flash8 import fp8, fp8_attention
from flash8.nn import CacheStep, FlashMHA, LayerCache

VOCABULARY = 256


class UnfusedMHA(FlashMHA):
    """The textbook: the matrix of scores in memory, (batch, heads, seqlen, seqlen)."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2)


class TorchMHA(FlashMHA):
    """torch's own fused attention."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class BF16MHA(FlashMHA):
    """q, k, v and O in bf16, as in mixed-precision training; so is what a cache takes up."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Tensor:
        narrow = (x.bfloat16() for x in (q, k, v))
        return self.attend_narrow(*narrow, cu_seqlens, max_seqlen).to(q.dtype)

    def attend_narrow(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Tensor:
        return super().attend(q, k, v, cu_seqlens, max_seqlen)

    def attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: LayerCache,
    ) -> Tensor:
        narrow = (x.bfloat16() for x in (q, k, v))
        return super().attend_cached(*narrow, cu_seqlens, max_seqlen, cache).to(q.dtype)


class FP8MHA(BF16MHA):
    """The same bf16 q, k, v, quantized for an FP8 forward; the backward stays 16-bit."""

    recipe = fp8.CurrentScaling()

    def attend_narrow(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Tensor:
        return fp8_attention(
            q,
            k,
            v,
            self.recipe,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            causal=True,
        )


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Config, attention: type[FlashMHA]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = attention(
            config.dim, config.heads, bias=False, causal=True, rotary_dim=config.head_dim
        )
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim, bias=False),
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: LayerCache | None,
    ) -> Tensor:
        x = x + self.attention(
            self.attention_norm(x), cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cache=cache
        )
        return x + self.mlp(self.mlp_norm(x))


class ByteGPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, config: Config, attention: type[FlashMHA] = FlashMHA) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)  # the first loss is log(256)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        step: CacheStep | None = None,
    ) -> Tensor:
        """Logits for every token.

        tokens: (batch, seqlen), or packed (total,) with cu_seqlens and max_seqlen.
        step: a step of a KV cache that holds what came before.
        """
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, cu_seqlens, max_seqlen, None if step is None else step.layer(index))
        return self.head(self.norm(x))

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

"""Multi-head attention with its projections, on padded, packed and cached inputs."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from flash8.attention import Window, flash_attn_func, flash_attn_varlen_func
from flash8.kvcache import flash_attn_with_kvcache
from flash8.nn.cache import LayerCache
from flash8.nn.core import AlibiModule, required
from flash8.nn.rotary import RotaryEmbedding
from flash8.varlen import pad_input, position_ids_from_cu_seqlens, unpad_input


class FlashMHA(AlibiModule):
    """Self-attention: project, rotate, attend, project back.

    The first four arguments are those of `torch.nn.MultiheadAttention` (inputs are batch first),
    and its state_dict loads here when q, k and v have embed_dim channels. So does that of
    FlashAttention-2's MHA.

    Args:
        embed_dim: channels of the input and the output.
        num_heads: query heads.
        dropout: probability to drop an attention weight, in training mode only.
        bias: whether both projections have one.
        num_heads_kv: key and value heads, a divisor of num_heads (GQA, MQA); num_heads by default.
        head_dim: channels of a head; embed_dim / num_heads by default.
        causal: a token sees itself and the tokens before it. Required for a cache.
        window_size: (left, right), inclusive; -1 is unbounded.
        softcap: if positive, scores are capped by softcap * tanh(S / softcap).
        softmax_scale: factor of the scores; head_dim ** -0.5 by default.
        sinks: learn one logit per head that takes weight but has no value.
        alibi: bias scores by distance, with the slopes of Press et al. (arXiv 2108.12409).
        rotary_dim: channels of q and k to rotate by position; 0 for none. A multiple of 16 to
            work with a cache.
        rotary_base, rotary_interleaved: see `RotaryEmbedding`.
        deterministic: bitwise repeatable gradients.
        smooth_k: make dQ with K without its mean, as in `flash_attn_func`.
    """

    sinks: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        window_size: Window = (-1, -1),
        softcap: float = 0.0,
        softmax_scale: float | None = None,
        sinks: bool = False,
        alibi: bool = False,
        rotary_dim: int = 0,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        deterministic: bool = False,
        smooth_k: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.head_dim = _head_dim(embed_dim, num_heads, self.num_heads_kv, head_dim)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        if not 0 <= rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim must lie in [0, {self.head_dim}], got {rotary_dim}")
        self.dropout = dropout
        self.causal = causal
        self.window_size = window_size
        self.softcap = softcap
        self.softmax_scale = softmax_scale
        self.deterministic = deterministic
        self.smooth_k = smooth_k
        heads = num_heads + 2 * self.num_heads_kv
        self.in_proj = nn.Linear(
            embed_dim, heads * self.head_dim, bias=bias, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(
            num_heads * self.head_dim, embed_dim, bias=bias, device=device, dtype=dtype
        )
        self.rotary = (
            RotaryEmbedding(rotary_dim, rotary_base, rotary_interleaved) if rotary_dim > 0 else None
        )
        zeros = torch.zeros(num_heads, device=device, dtype=dtype) if sinks else None
        self.register_parameter("sinks", None if zeros is None else nn.Parameter(zeros))
        slopes = alibi_slopes(num_heads).to(device) if alibi else None
        self.register_buffer("alibi_slopes", slopes, persistent=False)
        self.register_load_state_dict_pre_hook(_accept_other_names)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of `torch.nn.MultiheadAttention`; sinks start at zero. ALiBi's slopes
        are what they always are, after `to_empty` too."""
        nn.init.xavier_uniform_(self.in_proj.weight)
        for bias in (self.in_proj.bias, self.out_proj.bias, self.sinks):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.alibi_slopes is not None:
            self.alibi_slopes.copy_(alibi_slopes(self.num_heads))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}, "
            f"head_dim={self.head_dim}, causal={self.causal}, window_size={self.window_size}"
        )

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attention of each token over its own sequence.

        Args:
            x: (batch, seqlen, embed_dim), or packed (total, embed_dim) with cu_seqlens.
            cu_seqlens: (batch + 1,) int32.
            max_seqlen: longest sequence; required with cu_seqlens.
            key_padding_mask: (batch, seqlen) bool, True where x is padding, as in
                `torch.nn.MultiheadAttention` (the opposite of an attention mask). Padding may
                be anywhere; it is dropped before any work, so positions count real tokens.
                The output is 0 there (and its gradient unused). Waits for the device once.
            position_ids: integers, one per token of x, for the rotary embedding; by default
                tokens count from 0 in each sequence. Not with a cache, which knows them.
            cache: keys and values of the tokens before x, in x's dtype or e4m3; those of x are
                appended in place. Causal only; no gradients; dropout does not apply.

        Returns:
            The shape of x.

        Raises:
            TypeError, ValueError: naming the argument, its value and what is supported.
        """
        self._check_inputs(x, cu_seqlens, key_padding_mask, position_ids, cache)
        if key_padding_mask is not None:
            return self._forward_padded(x, key_padding_mask, position_ids)
        qkv = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.num_heads + self.num_heads_kv, self.num_heads_kv), dim=-2)
        if cache is None and self.rotary is not None:
            qk = self.rotary(
                qk, _positions(x, cu_seqlens) if position_ids is None else position_ids
            )
        q, k = qk.split((self.num_heads, self.num_heads_kv), dim=-2)
        if cache is None:
            attended = self.attend(q, k, v, cu_seqlens, max_seqlen)
        else:
            attended = self.attend_cached(q, k, v, cu_seqlens, max_seqlen, cache)
        out: Tensor = self.out_proj(attended.flatten(-2))
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> Tensor:
        """The core attention of training and evaluation: override it to compare another.

        Args:
            q: (batch, seqlen, num_heads, head_dim), or (total, ...) with cu_seqlens.
            k, v: as q, with num_heads_kv heads.
        """
        options: dict[str, Any] = {
            **self._options(),
            "deterministic": self.deterministic,
            "smooth_k": self.smooth_k,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if cu_seqlens is None:
            return flash_attn_func(q, k, v, **options)  # type: ignore[return-value]
        longest = required("max_seqlen", max_seqlen, "cu_seqlens")
        return flash_attn_varlen_func(  # type: ignore[return-value]
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options
        )

    def attend_cached(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: LayerCache,
    ) -> Tensor:
        """The core attention over a cache, which takes up k and v first: as `attend`, for q, k
        and v that are not rotated yet."""
        options = self._options()
        if self.rotary is not None:
            dtype = torch.promote_types(q.dtype, torch.float32)
            cos, sin = self.rotary.tables(cache.max_seqlen, dtype, q.device)
            options |= {
                "rotary_cos": cos,
                "rotary_sin": sin,
                "rotary_interleaved": self.rotary.interleaved,
            }
        if cu_seqlens is not None:
            options |= {
                "cu_seqlens_q": cu_seqlens,
                "cu_seqlens_k_new": cu_seqlens,
                "max_seqlen_q": required("max_seqlen", max_seqlen, "cu_seqlens"),
            }
        return flash_attn_with_kvcache(  # type: ignore[return-value]
            q,
            cache.k,
            cache.v,
            k=k,
            v=v,
            cache_seqlens=cache.cache_seqlens,
            cache_batch_idx=cache.cache_batch_idx,
            page_table=cache.page_table,
            k_descale=cache.k_descale,
            v_descale=cache.v_descale,
            **options,
        )

    def _options(self) -> dict[str, Any]:
        return {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "s_aux": self.sinks,
            "alibi_slopes": self.alibi_slopes,
        }

    def _forward_padded(
        self, x: Tensor, key_padding_mask: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        kept, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, ~key_padding_mask)
        if position_ids is not None:
            position_ids = position_ids.expand(x.shape[:2]).reshape(-1)[indices]
        out = self.forward(
            kept, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, position_ids=position_ids
        )
        return pad_input(out, indices, x.shape[0], x.shape[1])

    def _check_inputs(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        key_padding_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LayerCache | None,
    ) -> None:
        rank, meaning = (3, "(batch, seqlen, embed_dim)")
        if cu_seqlens is not None:
            rank, meaning = (2, "(total, embed_dim) with cu_seqlens")
        if x.dim() != rank:
            raise ValueError(f"x must be {meaning}, got shape {tuple(x.shape)}")
        if key_padding_mask is not None and (cu_seqlens is not None or cache is not None):
            raise ValueError("key_padding_mask goes with neither cu_seqlens nor cache")
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            raise TypeError(
                f"key_padding_mask must be bool, True for padding, got {key_padding_mask.dtype}"
            )
        if cache is not None and not self.causal:
            raise ValueError("cache needs causal attention, got causal=False")
        if cache is not None and position_ids is not None:
            raise ValueError("position_ids must be None with a cache, which knows the positions")


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return torch.arange(x.shape[1], device=x.device)
    return position_ids_from_cu_seqlens(cu_seqlens, x.shape[0])


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes of Press et al. (arXiv 2108.12409), (num_heads,) fp32: for a power of two n
    they are 2^(-8 i / n), i = 1 .. n; else every other slope of 2n fills up those of n."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def _head_dim(embed_dim: int, num_heads: int, num_heads_kv: int, head_dim: int | None) -> int:
    if num_heads <= 0 or num_heads_kv <= 0 or num_heads % num_heads_kv != 0:
        raise ValueError(
            f"num_heads_kv must be a positive divisor of num_heads = {num_heads}, got "
            f"{num_heads_kv}"
        )
    if head_dim is None and embed_dim % num_heads != 0:
        raise ValueError(
            f"embed_dim must be divisible by num_heads = {num_heads} unless head_dim is given, "
            f"got {embed_dim}"
        )
    return embed_dim // num_heads if head_dim is None else head_dim


def _accept_other_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """`torch.nn.MultiheadAttention` and FlashAttention-2's MHA keep the same input projection
    under other names."""
    for kind in ("weight", "bias"):
        for theirs in (f"{prefix}in_proj_{kind}", f"{prefix}Wqkv.{kind}"):
            if theirs in state_dict:
                state_dict[f"{prefix}in_proj.{kind}"] = state_dict.pop(theirs)

"""Rotary position embedding under FlashAttention-2's names (Su et al., arXiv 2104.09864)."""

import torch
from torch import Tensor, nn

from flash8.compat.flash_attn.ops.triton.rotary import apply_rotary, written
from flash8.tensors.rotary import rotate

Offset = int | Tensor


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """A quarter turn of every pair of channels."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """x: (batch, seqlen, heads, head_dim). cos, sin: (seqlen, rotary_dim / 2), or with batch."""
    return rotate(x, cos, sin, interleaved=interleaved)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offset = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """See `flash8.compat.flash_attn.ops.triton.rotary.apply_rotary`."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offset = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k, in place where no gradient is wanted: take the result.

    qkv: (batch, seqlen, 3, heads, head_dim), or with num_heads_q
    (batch, seqlen, num_heads_q + 2 * heads_kv, head_dim).
    """
    if qkv.dim() == 5:
        q, k, v = qkv.unbind(2)
    elif num_heads_q is None:
        raise ValueError(f"num_heads_q must be given for qkv of shape {tuple(qkv.shape)}")
    else:
        heads_kv = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split((num_heads_q, heads_kv, heads_kv), dim=2)
    q = apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=seqlen_offsets)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    k = apply_rotary_emb(k, cos_k, sin_k, interleaved, seqlen_offsets=seqlen_offsets)
    rotated = torch.stack((q, k, v), 2) if qkv.dim() == 5 else torch.cat((q, k, v), 2)
    return written(qkv, rotated)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: Offset = 0,
) -> Tensor:
    """Rotates k, in place where no gradient is wanted: take the result.

    kv: (batch, seqlen, 2, heads_kv, head_dim).
    """
    k, v = kv.unbind(2)
    k = apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=seqlen_offsets)
    return written(kv, torch.stack((k, v), 2))


class RotaryEmbedding(nn.Module):
    """Rotates q and k by position, in place where no gradient is wanted.

    Args:
        dim: channels to rotate.
        base: the longest wavelength is about 2 pi * base.
        interleaved: channels 2i and 2i + 1 make a pair instead of i and i + dim / 2.
        scale_base: XPos (Sun et al., arXiv 2212.10554): scores also decay with distance.
        pos_idx_in_fp32: of older releases; angles are always computed in float64 here.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._frequencies(device).float(), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device) / self.dim
        return self.base**-exponents

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kept = self._cos_cached
        fits = kept is not None and kept.device == device and kept.dtype == dtype
        fits = fits and seqlen <= self._seq_len_cached
        if fits and not (self.training and kept is not None and kept.is_inference()):
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, dtype=torch.float64, device=device)
        angles = torch.outer(positions, self._frequencies(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (positions - seqlen // 2) / self.scale_base
        scale = self.scale.to(positions) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: Offset = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv as in `apply_rotary_emb_qkv_`; with kv it is q alone, and both are returned.

        max_seqlen: how far positions go; needed where seqlen_offset is a tensor.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("max_seqlen must be given with the first seqlen_offset of a tensor")
        cos_k = cos if self._cos_k_cached is None else self._cos_k_cached
        sin_k = sin if self._sin_k_cached is None else self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

"""One QKV projection in FP8: its arguments, checked, and the shapes of what it makes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash8.call import scaled_mm as call
from flash8.call.scaled_mm import WIDE, Product
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    require_bool,
    require_float,
    require_int,
    require_rank,
    require_shape,
    require_tensor,
    to_int32,
)
from flash8.tensors.descales import num_blocks, num_packed_blocks
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import Norm, norm_of
from flash8.tensors.rotary import Rope, token_positions
from flash8.tensors.v_colmajor import colmajor_shape

#: Columns of rotary tables come in eights, as in `flash_attn_with_kvcache`.
_ROTARY_UNIT = 16


class Projection(NamedTuple):
    """A checked call: heads of scale_a * scale_b * (a @ b) + bias, those of q and k normalised and
    rotated, quantized by 128 tokens.

    a: (batch, seqlen, K), or (total, K) with cu_seqlens; b: (K, N). scale_a is that of a's rows.
    """

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    bias: Tensor | None
    heads_q: int
    heads_kv: int
    rope: Rope | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    cu_seqlens: Tensor | None = None  # int32 (batch + 1,)
    seqused: Tensor | None = None  # int32 (batch,)

    @property
    def rows(self) -> Tensor:
        """a as (tokens, K)."""
        return self.a.flatten(0, -2)

    @property
    def product(self) -> Product:
        """The product of all tokens, in fp32."""
        return Product(self.rows, self.b, self.scale_a, self.scale_b, self.bias, torch.float32)

    @property
    def head_dim(self) -> int:
        return self.b.shape[1] // (self.heads_q + 2 * self.heads_kv)

    @property
    def batch(self) -> int:
        return self.a.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def data_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k and v."""
        tokens, packed = self.a.shape[:-1], self.cu_seqlens is not None
        q, k = ((*tokens, heads, self.head_dim) for heads in (self.heads_q, self.heads_kv))
        return q, k, colmajor_shape(torch.Size(k), self.batch, packed)

    def descale_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k and v."""
        if self.cu_seqlens is None:
            first, blocks = self.batch, num_blocks(self.a.shape[1])
        else:
            first, blocks = 1, num_packed_blocks(self.a.shape[0], self.batch)
        q, kv = ((first, heads, blocks) for heads in (self.heads_q, self.heads_kv))
        return q, kv, kv


def check(
    a: Any,
    b: Any,
    scale_a: Any,
    scale_b: Any,
    bias: Any,
    heads: tuple[Any, Any],
    rotary: tuple[Any, Any, Any, Any],
    norms: tuple[Any, Any, Any],
    cu_seqlens: Any,
    seqused: Any,
) -> Projection:
    """rotary: cos, sin, the first positions, interleaved. norms: weights of q and k, eps.

    Raises TypeError and ValueError, naming the argument, its value and what is supported.
    """
    require_tensor("a", a, E4M3)
    if cu_seqlens is None:
        require_rank("a", a, 3, "(batch, seqlen, K); (total, K) needs cu_seqlens")
    else:
        require_rank("a", a, 2, "(total, K) with cu_seqlens")
        require_tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES, a)
        require_rank("cu_seqlens", cu_seqlens, 1, "(batch + 1,)")
        if cu_seqlens.shape[0] < 1:
            raise ValueError("cu_seqlens must have batch + 1 elements, at least 1, got 0")
    if a.shape[-1] > 1 and a.stride(-1) != 1:
        raise ValueError(f"a must have K contiguous, got strides {a.stride()}: call .contiguous()")
    if isinstance(scale_a, Tensor) and scale_a.dim() == 3 and a.dim() == 3:
        require_shape("scale_a", scale_a, (*a.shape[:2], scale_a.shape[2]), "(batch, seqlen, ...)")
        scale_a = scale_a.reshape(-1, scale_a.shape[2])
    rows = a.flatten(0, -2)
    call.check(rows, b, scale_a, scale_b, bias, None, torch.float32, None, False, 1)
    found = Projection(a, b, scale_a, scale_b, bias, *_heads(b, *heads))
    found = found._replace(cu_seqlens=to_int32(cu_seqlens))
    if seqused is not None:
        require_tensor("seqused", seqused, INDEX_DTYPES, a)
        require_shape("seqused", seqused, (found.batch,), "(batch,)")
        found = found._replace(seqused=to_int32(seqused))
    q_norm, k_norm = _norms(found, *norms)
    return found._replace(rope=_rope(found, *rotary), q_norm=q_norm, k_norm=k_norm)


def _heads(b: Tensor, heads_q: Any, heads_kv: Any) -> tuple[int, int]:
    heads_q = require_int("heads_q", heads_q, minimum=1)
    heads_kv = require_int("heads_kv", heads_kv, minimum=1)
    if heads_q % heads_kv != 0:
        raise ValueError(f"heads_q must be a multiple of heads_kv, got {heads_q} and {heads_kv}")
    heads = heads_q + 2 * heads_kv
    if b.shape[1] == 0 or b.shape[1] % heads != 0:
        raise ValueError(
            f"b must have (heads_q + 2 heads_kv) * head_dim columns, a multiple of {heads}, got "
            f"{b.shape[1]}"
        )
    return heads_q, heads_kv


def _rope(found: Projection, cos: Any, sin: Any, offsets: Any, interleaved: Any) -> Rope | None:
    require_bool("rotary_interleaved", interleaved)
    if cos is None and sin is None:
        if offsets is not None:
            raise ValueError("rotary_seqlens goes with rotary_cos and rotary_sin, got neither")
        return None
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"rotary_cos and rotary_sin must be given together, got {missing}=None")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        require_tensor(name, table, WIDE, found.a)
        require_rank(name, table, 2, "(seqlen_rotary, rotary_dim / 2)")
    require_shape("rotary_sin", sin, tuple(cos.shape), "rotary_cos's shape")
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % _ROTARY_UNIT != 0 or not 0 < rotary_dim <= found.head_dim:
        raise ValueError(
            f"rotary_cos must have rotary_dim / 2 columns, rotary_dim a multiple of {_ROTARY_UNIT} "
            f"up to head_dim = {found.head_dim}, got shape {tuple(cos.shape)}"
        )
    if cos.shape[0] == 0:
        raise ValueError(f"rotary_cos must have a row for every position, got {tuple(cos.shape)}")
    if offsets is not None:
        require_tensor("rotary_seqlens", offsets, INDEX_DTYPES, found.a)
        require_shape("rotary_seqlens", offsets, (found.batch,), "(batch,)")
    return Rope(cos, sin, to_int32(offsets), interleaved)


def _norms(found: Projection, q_weight: Any, k_weight: Any, eps: Any) -> tuple[Norm | None, ...]:
    eps = require_float("norm_eps", eps)
    most = torch.finfo(torch.float32).max
    if not 0.0 <= eps <= most:
        raise ValueError(f"norm_eps must be from 0 to {most:.3g}, got {eps}")
    for name, weight in (("q_norm_weight", q_weight), ("k_norm_weight", k_weight)):
        if weight is not None:
            require_tensor(name, weight, WIDE, found.a)
            require_shape(name, weight, (found.head_dim,), "(head_dim,)")
    return norm_of(q_weight, eps), norm_of(k_weight, eps)


def check_positions(found: Projection) -> None:
    """That every token's position has a row in the tables. Reads data, so of CPU tensors only."""
    rope = found.rope
    if rope is None:
        return
    offsets = rope.offsets
    if offsets is None:
        offsets = torch.zeros(found.batch, dtype=torch.int64)
    positions = token_positions(found.a, offsets, found.cu_seqlens)
    if found.cu_seqlens is not None:  # rows after the last sequence have none
        positions = positions[: int(found.cu_seqlens[-1])]
    if positions.numel() == 0:
        return
    first, last = positions.min().item(), positions.max().item()
    if first < 0 or last >= rope.cos.shape[0]:
        raise ValueError(
            f"rotary_cos must have a row for every position from {first} to {last}, got "
            f"{rope.cos.shape[0]} rows"
        )

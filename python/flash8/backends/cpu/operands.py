"""The operands of one unit, laid out for tiles: heads first, in the dtype of accumulation.

Query heads that share a KV head are stacked along the rows of a tile (PackGQA), so one matrix
product serves the whole group and the gradients of K and V sum over it by themselves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.backends.cpu.descales import Descales, key_factor, load_descales
from flash8.backends.cpu.sequences import Unit
from flash8.call.checks import FP8
from flash8.call.options import Options
from flash8.tensors.descales import checked
from flash8.tensors.float8 import widened

#: Elements of a score tile per KV head, and the bounds of its sides.
_TILE_AREA = 1 << 16
_MAX_BLOCK_M = 256
_MIN_BLOCK_N = 256
#: The KV block of the FP8 kernels: the block over which P has one reference exponent.
FP8_BLOCK_N = 128


@dataclass(frozen=True)
class Operands:
    """q, k, v (and qv, s_aux, ALiBi slopes) of one unit. G query heads share a KV head."""

    q: Tensor  # (B, heads_kv, G, seqlen_q, head_dim), times softmax_scale unless float8
    k: Tensor  # (B, heads_kv, seqlen_k, head_dim)
    v: Tensor  # (B, heads_kv, seqlen_k, head_dim_v)
    qv: Tensor | None  # (B, heads_kv, G, seqlen_q, head_dim_v), times softmax_scale
    sink: Tensor | None  # (heads_kv, G, 1): broadcasts over rows
    tree_mask: Tensor | None  # (seqlen_q), a word of bits each; B is 1 then
    slopes: Tensor | None  # (1 or B, heads_kv, G, 1, 1)
    batch_heads: Tensor  # int64 (B, heads_kv, G): batch * heads + head, names a dropout mask
    descales: Descales
    k_mean: Tensor | None  # (B or 1, heads_kv, 1, 1, head_dim): what k lacks
    v_mean: Tensor | None  # (B or 1, heads_kv, 1, 1, head_dim_v)
    v_channel_descale: Tensor | None  # likewise
    scale: float
    dtype: torch.dtype  # of q; of wider ones that stand for float8, where K or V are multiplied

    @property
    def group(self) -> int:
        return self.q.shape[2]

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[3]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[2]

    def blocks(self) -> tuple[int, int]:
        """(kBlockM, kBlockN): tall enough to amortise, small enough to stay in cache."""
        block_m = min(self.seqlen_q, max(16, _MAX_BLOCK_M // self.group))
        if self.descales.grid is not None:
            return block_m, self.descales.grid[0]
        if self.dtype == FP8:
            return block_m, FP8_BLOCK_N
        block_n = max(_MIN_BLOCK_N, _TILE_AREA // (block_m * self.group))
        return block_m, block_n - block_n % 8

    def lse_shift(self, rows: slice) -> Tensor | None:
        """softmax_scale * q . k_mean, (B, heads_kv, G, M): what k's mean adds to every score."""
        if self.k_mean is None:
            return None
        shift = (self.q[:, :, :, rows] * self.k_mean).sum(dim=-1)
        factor = self.descales.q_rows(rows.start, rows.stop)
        return shift if factor is None else shift * factor

    def split_rows(self, stacked: Tensor) -> Tensor:
        """(B, heads_kv, G * M, ...) as (B, heads_kv, G, M, ...)."""
        rows: Tensor = stacked.unflatten(2, (self.group, -1))
        return rows


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def heads_first(tokens: Tensor, heads_kv: int, dtype: torch.dtype) -> Tensor:
    """(B, seqlen, heads, d) as a contiguous (B, heads_kv, G, seqlen, d)."""
    grouped: Tensor = tokens.unflatten(2, (heads_kv, tokens.shape[2] // heads_kv))
    rows = grouped.permute(0, 2, 3, 1, 4)
    if rows.dtype == FP8 and dtype == torch.float32 and rows.device.type == "cpu":
        return widened(rows)
    return rows.to(dtype).contiguous()


def tokens_first(x: Tensor) -> Tensor:
    """(B, heads_kv, G, seqlen, d) as (B, seqlen, heads, d): the inverse of `heads_first`."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def load(
    unit: Unit,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    s_aux: Tensor | None,
    options: Options,
) -> Operands:
    """Gathers the operands of a unit."""
    dtype = accumulation_dtype(q.dtype)
    heads, heads_kv = q.shape[-2], k.shape[-2]
    grouped = (heads_kv, heads // heads_kv)
    scale = options.scale(q, qv)
    float8_q = q.dtype == FP8
    page = k.shape[1] if options.page_table is not None else 0
    entries = torch.arange(unit.batch.start, unit.batch.stop, device=q.device)
    batch_heads = entries[:, None] * heads + torch.arange(heads, device=q.device)
    slopes = options.alibi_slopes
    if slopes is not None:
        slopes = slopes[None] if slopes.dim() == 1 else slopes[unit.batch]
        slopes = slopes.to(dtype).unflatten(1, grouped)[..., None, None]
    words = options.tree_mask
    channels = options.v_channel_descale
    channels = None if channels is None else checked(channels)
    paged = options.page_table is not None
    k_rows, v_rows = unit.keys.tokens(k), unit.keys.tokens(v)
    k_factor = key_factor(unit, options.k_descale, k, paged)
    v_factor = key_factor(unit, options.v_descale, v, paged)
    if k_factor is not None:
        k_rows, options = k_rows.to(dtype) * k_factor, options._replace(k_descale=None)
    if v_factor is not None:
        v_rows, options = v_rows.to(dtype) * v_factor, options._replace(v_descale=None)
    exact = k_factor is not None or v_factor is not None
    q_rows = heads_first(unit.queries.tokens(q), heads_kv, dtype)
    return Operands(
        q=q_rows if float8_q else q_rows * scale,
        k=heads_first(k_rows, heads_kv, dtype).squeeze(2),
        v=heads_first(v_rows, heads_kv, dtype).squeeze(2),
        qv=None if qv is None else heads_first(unit.queries.tokens(qv), heads_kv, dtype) * scale,
        sink=None if s_aux is None else s_aux.to(dtype).unflatten(0, grouped)[..., None],
        tree_mask=None if words is None else unit.queries.tokens(words)[0],
        slopes=slopes,
        batch_heads=batch_heads.unflatten(1, grouped),
        descales=load_descales(unit, q, options, scale, grouped, page),
        k_mean=_channels(options.k_mean, unit, dtype),
        v_mean=_channels(options.v_mean, unit, dtype),
        v_channel_descale=_channels(channels, unit, dtype),
        scale=scale,
        dtype=dtype if float8_q and exact else q.dtype,
    )


def _channels(given: Tensor | None, unit: Unit, dtype: torch.dtype) -> Tensor | None:
    """(heads_kv, d) or (batch, heads_kv, d), broadcasting over (B, heads_kv, G, M, d)."""
    if given is None:
        return None
    entries = given[None] if given.dim() == 2 else given[unit.batch]
    return entries.to(dtype)[:, :, None, None]

"""Attention written for reading, in float64: what every test compares with.

Nothing of flash8 is imported here.  The scores of one sequence are materialised, the mask is a
boolean matrix made from index arithmetic, sequences are walked in a Python loop, and gradients
come from plain torch autograd.

`dtype` chooses the precision of the matrix products (float64 unless said).  With a 16-bit dtype the
same lines become the "same-precision PyTorch emulation" of tolerances.py: S, P and O are rounded to
that type, softmax itself runs in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# ------------------------------------------------------------------------------------ one sequence


def visible(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
) -> Tensor:
    """Boolean (seqlen_q, seqlen_k): may query i look at key j?  Bottom-right aligned."""
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)[None, :]
    left, right = int(window_size[0]), int(window_size[1])
    if causal:
        right = 0
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        mask &= key >= position - left
    if right >= 0:
        mask &= key <= position + right
    if attention_chunk > 0:
        first = position - position % attention_chunk
        mask &= (key >= first) & (key < first + attention_chunk)
    return mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sink: Tensor | None = None,
    qv: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q (sq, h, d), k (sk, hk, d), v (sk, hk, dv), mask (sq, sk) -> O (sq, h, dv), LSE (h, sq)."""
    seqlen_q, heads, _ = q.shape
    seqlen_k, heads_kv, _ = k.shape
    k = k.repeat_interleave(heads // heads_kv, dim=1)
    v = v.repeat_interleave(heads // heads_kv, dim=1)

    s = torch.einsum("ihd,jhd->hij", q, k * scale)
    if qv is not None:
        s = s + torch.einsum("ihd,jhd->hij", qv * scale, v)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if softcap > 0.0:
        s = softcap * torch.tanh(s / softcap)
    if slopes is not None:
        position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
        distance = (position - torch.arange(seqlen_k)[None, :]).abs()
        s = s - slopes.to(s.dtype)[:, None, None] * distance.to(s.dtype)
    s = s.masked_fill(~mask, float("-inf"))
    if sink is not None:
        column = sink.to(s.dtype)[:, None, None].expand(heads, seqlen_q, 1)
        s = torch.cat([s, column], dim=-1)

    anything = torch.isfinite(s).any(dim=-1, keepdim=True)
    peak = s.detach().amax(dim=-1, keepdim=True) if s.shape[-1] else s.new_zeros(heads, seqlen_q, 1)
    e = torch.exp(s - torch.where(anything, peak, torch.zeros_like(peak)))
    total = torch.where(anything, e.sum(dim=-1, keepdim=True), torch.ones_like(peak))
    p = (e / total)[..., :seqlen_k]
    lse = torch.where(anything, peak + torch.log(total), torch.full_like(peak, float("-inf")))

    if keep is not None:
        p = torch.where(keep, p * keep_scale(dropout_p), torch.zeros_like(p))
    return torch.einsum("hij,jhd->ihd", p.to(v.dtype), v), lse.squeeze(-1)


# ------------------------------------------------------------------------- where sequences live


@dataclass
class Keys:
    """Finds the keys of a sequence: dense (b, s, ...), packed (total, ...), or paged."""

    cu_seqlens: Tensor | None = None
    seqused: Tensor | None = None
    leftpad: Tensor | None = None
    page_table: Tensor | None = None
    batch_idx: Tensor | None = None

    def used(self, x: Tensor, b: int) -> tuple[int, int]:
        """First and last-plus-one logical slot of sequence b."""
        if self.seqused is not None:
            end = int(self.seqused[b])
        elif self.cu_seqlens is not None:
            end = int(self.cu_seqlens[b + 1] - self.cu_seqlens[b])
        elif self.page_table is not None:
            end = self.page_table.shape[1] * x.shape[1]
        else:
            end = x.shape[1]
        return (int(self.leftpad[b]) if self.leftpad is not None else 0), end

    def slot(self, x: Tensor, b: int, logical: Tensor) -> tuple[Tensor, ...]:
        """Index of the storage rows that hold the logical slots of sequence b."""
        row = int(self.batch_idx[b]) if self.batch_idx is not None else b
        if self.page_table is not None:
            page_size = x.shape[1]
            return self.page_table[row].long()[logical // page_size], logical % page_size
        if self.cu_seqlens is not None:
            return (logical + int(self.cu_seqlens[b]),)
        return torch.full_like(logical, row), logical

    def logical(self, x: Tensor, b: int) -> Tensor:
        first, end = self.used(x, b)
        return torch.arange(first, max(first, end))

    def has_work(self, b: int) -> bool:
        return self.batch_idx is None or int(self.batch_idx[b]) != -1

    def exists(self, x: Tensor, b: int) -> Tensor:
        """Which slots of sequence b have a page: a hidden one may have any number."""
        logical = self.logical(x, b)
        if self.page_table is None:
            return torch.ones_like(logical, dtype=torch.bool)
        page, _ = self.slot(x, b, logical)
        return (page >= 0) & (page < x.shape[0])

    def take(self, x: Tensor, b: int) -> Tensor:
        """The rows of sequence b, zeros where there is no page."""
        exists = self.exists(x, b)
        rows = x.new_zeros(exists.shape[0], *x.shape[-2:])
        rows[exists] = x[self.slot(x, b, self.logical(x, b)[exists])]
        return rows


def _descale(x: Tensor, descale: Tensor | None, b: int, heads: int) -> Tensor:
    """x (rows, heads, d) times a scalar or a (batch, heads_kv) descale."""
    if descale is None:
        return x
    per_head = descale.to(x.dtype).reshape(-1) if descale.numel() == 1 else descale[b].to(x.dtype)
    return x * per_head.repeat_interleave(heads // per_head.numel())[None, :, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_table: Tensor | None = None,
    batch_idx: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    mask_fn=visible,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """All layouts of the public API: O like q with head_dim_v, LSE (b, h, sq) or (h, total)."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    qv = qv.to(dtype) if qv is not None else None
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    heads, head_dim, head_dim_v = q.shape[-2], q.shape[-1], v.shape[-1]
    if softmax_scale is None:
        softmax_scale = (head_dim + (head_dim_v if qv is not None else 0)) ** -0.5
    keys = Keys(cu_seqlens_k, seqused_k, leftpad_k, page_table, batch_idx)

    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(*q.shape[:-1], head_dim_v, dtype=dtype)
    lse_shape = (heads, q.shape[0]) if packed else (batch, heads, q.shape[1])
    lse = torch.full(lse_shape, float("-inf"), dtype=wide)
    for b in range(batch):
        if packed:
            start, length = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1] - cu_seqlens_q[b])
        else:
            start, length = 0, q.shape[1]
        if seqused_q is not None:
            length = int(seqused_q[b])
        rows = slice(start, start + length)
        at = (rows,) if packed else (b, rows)
        if not keys.has_work(b):
            continue
        exists = keys.exists(k, b)
        mask = mask_fn(length, exists.numel(), causal, window_size, attention_chunk)
        assert not mask[:, ~exists].any(), "a query sees a page that does not exist"
        q_b = _descale(q[at], q_descale, b, heads)
        k_b = _descale(keys.take(k, b), k_descale, b, k.shape[-2])
        v_b = _descale(keys.take(v, b), v_descale, b, v.shape[-2])
        keep = None
        if dropout_p > 0.0:
            full = dropout_keep(dropout_seed, b, heads, length, k_b.shape[0], dropout_p)
            keep = torch.from_numpy(full)
        o_b, lse_b = attend(
            q_b,
            k_b,
            v_b,
            mask,
            softmax_scale,
            softcap,
            _slopes(alibi_slopes, b),
            s_aux,
            qv[at] if qv is not None else None,
            keep,
            dropout_p,
        )
        out[at] = o_b
        if packed:
            lse[:, rows] = lse_b
        else:
            lse[b, :, rows] = lse_b
    return out, lse


def _slopes(alibi_slopes: Tensor | None, b: int) -> Tensor | None:
    if alibi_slopes is None or alibi_slopes.dim() == 1:
        return alibi_slopes
    return alibi_slopes[b]


def combine(out_partial: Tensor, lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """(splits, b, s, h, d) and (splits, b, s, h) -> O (b, s, h, d), LSE (b, s, h), in float64."""
    o, parts = out_partial.double(), lse_partial.double()
    peak = parts.amax(dim=0)
    anything = torch.isfinite(peak)
    weight = torch.exp(parts - torch.where(anything, peak, torch.zeros_like(peak)))
    total = weight.sum(dim=0)
    safe = torch.where(anything, total, torch.ones_like(total))
    o = torch.where((weight > 0)[..., None], o * weight[..., None], torch.zeros_like(o))
    return o.sum(dim=0) / safe[..., None], torch.where(anything, peak + torch.log(safe), peak)


# -------------------------------------------------------------------------- cache and rotary


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (s, h, d); the first 2 * cos.shape[1] dims turn by the angle of their row's position."""
    half = cos.shape[1]
    c, s = cos.double()[positions][:, None, :], sin.double()[positions][:, None, :]
    y = x.double().clone()
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = y[..., first].clone(), y[..., second].clone()
    y[..., first] = a * c - b * s
    y[..., second] = a * s + b * c
    return y


@dataclass
class CacheStep:
    """One call of flash_attn_with_kvcache, as data: new tokens, rotary tables, where they go."""

    cache_seqlens: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_seqlens: Tensor | None = None
    rotary_interleaved: bool = True
    page_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None

    def new_rows(self, x: Tensor, b: int) -> Tensor:
        if self.cu_seqlens_k_new is None:
            return x[b]
        return x[int(self.cu_seqlens_k_new[b]) : int(self.cu_seqlens_k_new[b + 1])]

    def base(self, b: int) -> int:
        source = self.rotary_seqlens if self.rotary_seqlens is not None else self.cache_seqlens
        return int(source[b])

    def appended(self, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the caches with the new tokens written, and the lengths after that."""
        k_cache, v_cache, lengths = k_cache.clone(), v_cache.clone(), self.cache_seqlens.clone()
        if self.k is None:
            return k_cache, v_cache, lengths
        keys = Keys(page_table=self.page_table, batch_idx=self.cache_batch_idx)
        for b in range(lengths.numel()):
            if not keys.has_work(b):
                continue
            k_new, v_new = self.new_rows(self.k, b), self.new_rows(self.v, b)
            step = torch.arange(k_new.shape[0])
            if self.rotary_cos is not None:
                k_new = rotate(
                    k_new,
                    self.rotary_cos,
                    self.rotary_sin,
                    self.base(b) + step,
                    self.rotary_interleaved,
                )
            where = keys.slot(k_cache, b, int(lengths[b]) + step)
            k_cache[where] = k_new.to(k_cache.dtype)
            v_cache[where] = v_new.to(v_cache.dtype)
            lengths[b] += k_new.shape[0]
        return k_cache, v_cache, lengths

    def rotated_q(self, q: Tensor, moves: bool) -> Tensor:
        """q turned; when the mask is neither causal nor local every query sits at the base."""
        if self.rotary_cos is None:
            return q
        q = q.clone()
        for b in range(self.cache_seqlens.numel()):
            cu = self.cu_seqlens_q
            at = slice(int(cu[b]), int(cu[b + 1])) if cu is not None else b
            step = torch.arange(q[at].shape[0]) * int(moves)
            turned = rotate(
                q[at],
                self.rotary_cos,
                self.rotary_sin,
                self.base(b) + step,
                self.rotary_interleaved,
            )
            q[at] = turned.to(q.dtype)
        return q

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, **options):
        """O, LSE and the caches after the call.  options as for oracle.attention."""
        k_after, v_after, lengths = self.appended(k_cache, v_cache)
        window = options.get("window_size", (-1, -1))
        moves = options.get("causal", False) or tuple(map(int, window)) != (-1, -1)
        out, lse = attention(
            self.rotated_q(q, moves or options.get("attention_chunk", 0) > 0),
            k_after,
            v_after,
            cu_seqlens_q=self.cu_seqlens_q,
            seqused_k=lengths,
            leftpad_k=self.cache_leftpad,
            page_table=self.page_table,
            batch_idx=self.cache_batch_idx,
            **options,
        )
        return out, lse, k_after, v_after


# -------------------------------------------------------------------------------- dropout


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
    """Philox4x32 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    counter (..., 4) and the result (..., 4) are 32-bit words held in uint64.
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., w].astype(np.uint64) for w in range(4))
    k0, k1 = key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF
    for _ in range(rounds):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1)


def dropout_keep(
    seed: int, batch_index: int, heads: int, seqlen_q: int, seqlen_k: int, p: float
) -> np.ndarray:
    """Boolean (heads, seqlen_q, seqlen_k), True = kept, of one batch entry."""
    groups = (seqlen_k + 7) // 8
    shape = (heads, seqlen_q, groups)
    head, row, group = np.indices(shape, dtype=np.uint64)
    counter = np.stack(
        [group, row, np.uint64(batch_index * heads) + head, np.zeros(shape, np.uint64)], axis=-1
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), rounds=7)
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
    values = halves.reshape(heads, seqlen_q, groups * 8)[..., :seqlen_k]
    return values >= np.uint64(threshold(p))


def threshold(p: float) -> int:
    """Of the 65536 values of a draw so many drop."""
    return round(p * 65536)


def keep_scale(p: float) -> float:
    """By the share of the values that keep; without any, nothing is left to scale."""
    return 65536 / (65536 - threshold(p)) if threshold(p) < 65536 else 0.0

"""A small model of an FP8 attention kernel, right or wrong on purpose.

One head: S exact, P in e4m3 per key block, P V accumulated either exactly or as Hopper's FP8
tensor cores do.  With its defaults it is a correct kernel, so flash8 must agree with it; every
other setting is a mistake that kernels have shipped with, and the bounds must catch it.

The accumulator (bit-exact on published vectors of microsoft/MMA-Sim): per 32 products, everything
is truncated to a multiple of 2^(E - 13), E the largest exponent among products and accumulator,
summed exactly, and written back with 13 bits of mantissa, rounded toward zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
K_STEP = 32  # contraction of one FP8 wgmma instruction
MANTISSA = 13


def to_e4m3(x: Tensor) -> Tensor:
    """Saturating cast, as cvt.rn.satfinite does."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def quantise(x: Tensor, heads_per_scale: int = 1) -> tuple[Tensor, Tensor]:
    """x (b, s, h, d) -> e4m3 and descale (b, h / heads_per_scale) = amax / 448."""
    amax = x.abs().amax(dim=(1, 3)).unflatten(1, (-1, heads_per_scale)).amax(-1)
    descale = amax.float() / FP8_MAX
    full = descale.repeat_interleave(heads_per_scale, 1)[:, None, :, None]
    return to_e4m3(x / full), descale


def _exponent(x: Tensor) -> Tensor:
    """Exponent of |x| in [1, 2) * 2^e, very small for 0."""
    return torch.where(x == 0, torch.full_like(x, -200.0), torch.frexp(x.abs())[1].to(x.dtype) - 1)


def _truncate(x: Tensor, unit: Tensor) -> Tensor:
    return torch.trunc(x / unit) * unit


def tensor_core(p: Tensor, v: Tensor, accumulator: Tensor) -> Tensor:
    """accumulator + p @ v, (M, K) by (K, N), in float64 with the rounding of FP8 wgmma."""
    for start in range(0, p.shape[1], K_STEP):
        products = p[:, start : start + K_STEP, None] * v[None, start : start + K_STEP]
        top = torch.maximum(_exponent(products).amax(dim=1), _exponent(accumulator))
        unit = torch.exp2(top - MANTISSA)
        total = _truncate(products, unit[:, None]).sum(dim=1) + _truncate(accumulator, unit)
        accumulator = _truncate(total, torch.exp2(_exponent(total) - MANTISSA))
    return accumulator


@dataclass(frozen=True)
class Kernel:
    """Settings; the defaults are a good kernel: block-local reference, offset 8, promotion."""

    block: int = 128
    offset: float = 8.0  # log2 of the largest P
    growth: float = 24.0  # how far below the running maximum a block's reference may stand
    block_local: bool = True  # False: the reference is the running maximum
    hardware_sum: bool = False  # True: accumulate as the tensor cores do
    promote: bool = True  # False: one accumulator for all blocks
    sum_rounded_p: bool = False  # True: row_sum adds what was rounded to e4m3
    lazy: float = 0.0  # rescale only when the maximum grew by more than this (log2)

    def run(self, q: Tensor, k: Tensor, v: Tensor, v_descale: float = 1.0) -> tuple[Tensor, Tensor]:
        """q, k, v (rows, d), dequantised but for v: O and LSE in float64, blocks in order."""
        logits = (q.double() @ k.double().T) * q.shape[-1] ** -0.5 * math.log2(math.e)
        v = v.double()
        rows = logits.shape[0]
        running = torch.full((rows,), -math.inf, dtype=torch.float64)
        reference, row_sum = running.clone(), torch.zeros(rows, dtype=torch.float64)
        o = torch.zeros(rows, v.shape[1], dtype=torch.float64)
        for start in range(0, logits.shape[1], self.block):
            s = logits[:, start : start + self.block]
            running = torch.maximum(running, s.amax(dim=1))
            new = self._reference(s, running, reference)
            alpha = torch.exp2(reference - new)
            p = torch.exp2(s - new[:, None] + self.offset)
            p8 = to_e4m3(p.float()).double()
            row_sum = row_sum * alpha + (p8 if self.sum_rounded_p else p).sum(dim=1)
            o = self._accumulate(o * alpha[:, None], p8, v[start : start + self.block])
            reference = new
        lse = (reference - self.offset + torch.log2(row_sum)) / math.log2(math.e)
        return o / row_sum[:, None] * v_descale, lse

    def _reference(self, s: Tensor, running: Tensor, previous: Tensor) -> Tensor:
        if self.block_local:
            return torch.maximum(s.amax(dim=1), running - self.growth)
        return torch.where(running - previous > self.lazy, running, previous)

    def _accumulate(self, o: Tensor, p: Tensor, v: Tensor) -> Tensor:
        if not self.hardware_sum:
            return o + p @ v
        if self.promote:
            return o + tensor_core(p, v, torch.zeros_like(o))
        return tensor_core(p, v, o)

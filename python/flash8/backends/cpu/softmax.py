"""Online softmax over KV blocks: running reference, running sum, and the rescaling of O.

`step` takes the scores of one block and returns P and the factor by which everything accumulated
so far must be multiplied; P is rounded as the matrix product that follows would see it.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from flash8.backends.cpu.study import Study
from flash8.tensors.float8 import E4M3, rounded

_LOG2_E = math.log2(math.e)
_MINUS_INF = float("-inf")


class Softmax(Protocol):
    """Rows are (B, heads_kv, G, M); scores have the keys of a block as one more dimension."""

    def step(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(P, alpha) of a block of scores; `s` is overwritten."""

    def finish(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        """(factor that normalises O, LSE), the sink logit included."""

    def row_sum(self) -> Tensor:
        """The sum of P over the keys; times that factor it is 1, or what the sink leaves."""


def softmax_for(dtype: torch.dtype, rows: tuple[int, ...], like: Tensor, study: Study) -> Softmax:
    """The softmax that the kernels use for q of `dtype`, or the one that is studied."""
    if dtype == E4M3:
        growth = BlockLocalSoftmax.GROWTH if study.p_scaling == "block_local" else 0.0
        offset = 0.0 if study.p_scaling == "none" else BlockLocalSoftmax.OFFSET
        return BlockLocalSoftmax(rows, like, growth, offset)
    return OnlineSoftmax(rows, like, dtype)


def _finite(reference: Tensor) -> Tensor:
    """The reference with 0 in rows that have seen no key, where any finite value serves."""
    return torch.where(reference == _MINUS_INF, 0.0, reference)


def _inverse(row_sum: Tensor) -> Tensor:
    return torch.where(row_sum == 0.0, 0.0, 1.0 / row_sum)


class OnlineSoftmax:
    """Milakov and Gimelshein (arXiv 1805.02867): the reference is the running maximum."""

    def __init__(self, rows: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> None:
        self._row_max = like.new_full(rows, _MINUS_INF)
        self._row_sum = like.new_zeros(rows)
        self._round_to = dtype if dtype in (torch.float16, torch.bfloat16) else None

    def step(self, s: Tensor) -> tuple[Tensor, Tensor]:
        row_max = torch.maximum(self._row_max, s.amax(dim=-1))
        reference = _finite(row_max)
        p = s.sub_(reference[..., None]).exp_()
        alpha = (self._row_max - reference).exp_()
        self._row_sum = self._row_sum * alpha + p.sum(dim=-1)
        self._row_max = row_max
        return (p if self._round_to is None else p.to(self._round_to).to(p.dtype)), alpha

    def row_sum(self) -> Tensor:
        return self._row_sum

    def finish(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        row_max, row_sum = self._row_max, self._row_sum
        alpha = torch.ones_like(row_sum)
        if sink is not None:
            row_max = torch.maximum(row_max, sink)
            reference = _finite(row_max)
            alpha = (self._row_max - reference).exp_()
            row_sum = row_sum * alpha + (sink - reference).exp_()
        return alpha * _inverse(row_sum), _finite(row_max) + row_sum.log()


class BlockLocalSoftmax:
    """FP8: the reference belongs to the block, so P uses all of e4m3 wherever the maximum is.

    In log2 units, per block: m_ref = max(m_block, m_running - 24), P = e4m3(2^8 * 2^(s - m_ref)),
    and what is accumulated is multiplied by 2^(m_ref_prev - m_ref), at most 2^24. row_sum adds the
    fp32 P, not the rounded one. Without growth the reference is the running maximum. The factor
    2^8 is kept apart: beside a large m_ref a sum would lose the 8.
    """

    OFFSET = 8.0  # the largest P is 2^8, under e4m3's 448
    GROWTH = 24.0

    def __init__(
        self, rows: tuple[int, ...], like: Tensor, growth: float = GROWTH, offset: float = OFFSET
    ) -> None:
        self._growth, self._offset = growth, offset
        self._factor = 2.0**offset
        self._row_max = like.new_full(rows, _MINUS_INF)
        self._reference = like.new_full(rows, _MINUS_INF)
        self._row_sum = like.new_zeros(rows)

    def step(self, s: Tensor) -> tuple[Tensor, Tensor]:
        s.mul_(_LOG2_E)
        block_max = s.amax(dim=-1)
        self._row_max = torch.maximum(self._row_max, block_max)
        reference = torch.maximum(block_max, self._row_max - self._growth)
        shift = _finite(reference)
        p = s.sub_(shift[..., None]).exp2_().mul_(self._factor)
        alpha = (self._reference - shift).exp2_()
        self._row_sum = self._row_sum * alpha + p.sum(dim=-1)
        self._reference = reference
        return rounded(p), alpha

    def row_sum(self) -> Tensor:
        return self._row_sum

    def finish(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        reference, row_sum = self._reference, self._row_sum
        alpha = torch.ones_like(row_sum)
        if sink is not None:
            scaled = sink * _LOG2_E
            top = torch.maximum(self._row_max, scaled)
            shift = _finite(top)
            alpha = (reference - shift).exp2_()
            row_sum = row_sum * alpha + (scaled - shift).exp2_() * self._factor
            reference = top
        lse = (_finite(reference) + (row_sum.log2() - self._offset)) / _LOG2_E
        return alpha * _inverse(row_sum), lse

"""Accumulating O = sum of P V over KV blocks, with promotion.

The tensor cores' FP8 accumulator has 14 bits, so a long sum loses what is small against it. The
kernels therefore start a fresh accumulator T for each block and finish the block with
O = alpha * O + T in fp32, at the price of the multiplication that rescales O anyway.
"""

from torch import Tensor

from flash8.backends.cpu import tensor_core
from flash8.backends.cpu.products import product
from flash8.backends.cpu.study import Study
from flash8.tensors.float8 import E4M3


def float8_matmul(
    a: Tensor,
    b: Tensor,
    study: Study,
    c: Tensor | None = None,
    dtypes: tensor_core.Dtypes = (E4M3, E4M3),
) -> Tensor:
    """c + a @ b of float8 values held in fp32, as the study asks for it."""
    if study.accumulation == "hopper":
        return tensor_core.matmul(a, b, c, dtypes)
    product = a @ b
    return product if c is None else product.add_(c)


class Accumulator:
    """O of a block of queries, (B, heads_kv, G, M, head_dim_v)."""

    def __init__(self, rows: tuple[int, ...], values: Tensor) -> None:
        self._o = values.new_zeros((*rows, values.shape[-1]))

    def add(self, alpha: Tensor, p: Tensor, values: Tensor, hidden: Tensor | None) -> None:
        """O = alpha * O + P V; alpha (B, heads_kv, G, M), P (..., M, N), V (B, heads_kv, N, d),
        hidden (M, N) as in `product`."""
        values = product(p.flatten(2, 3), values, hidden)
        self._o.mul_(alpha[..., None]).add_(values.view_as(self._o))

    def finish(self) -> Tensor:
        return self._o


class Float8Accumulator:
    """The same for e4m3 P and V: T collects products until it is promoted, that is added to O."""

    def __init__(self, rows: tuple[int, ...], values: Tensor, study: Study) -> None:
        self._o = values.new_zeros((*rows, values.shape[-1]))
        self._t: Tensor | None = None
        self._keys = 0  # in T
        self._study = study

    def add(self, alpha: Tensor, p: Tensor, values: Tensor, hidden: Tensor | None) -> None:
        self._o.mul_(alpha[..., None])
        if self._t is not None:
            self._t.mul_(alpha[..., None])
        stacked = p.flatten(2, 3)
        begin, limit = 0, self._study.promotion_keys
        while begin < values.shape[2]:
            end = values.shape[2]
            if limit is not None:
                end = min(end, begin + limit - self._keys)
            part = None if hidden is None else hidden[:, begin:end]
            self._collect(stacked[..., begin:end], values[:, :, begin:end], part)
            begin = end
            if self._keys == limit:
                self._promote()
        if self._study.promotes_blocks:
            self._promote()

    def finish(self) -> Tensor:
        self._promote()
        return self._o

    def _collect(self, p: Tensor, values: Tensor, hidden: Tensor | None) -> None:
        t = None if self._t is None else self._t.flatten(2, 3)

        def matmul(p: Tensor, values: Tensor) -> Tensor:
            return float8_matmul(p, values, self._study, t)

        self._t = product(p, values, hidden, matmul).view_as(self._o)
        self._keys += values.shape[2]

    def _promote(self) -> None:
        if self._t is not None:
            self._o.add_(self._t)
        self._t, self._keys = None, 0


def accumulator_for(
    float8: bool, rows: tuple[int, ...], values: Tensor, study: Study
) -> Accumulator | Float8Accumulator:
    """The accumulator the kernels use for float8 or wider operands; rows (B, heads_kv, G, M)."""
    return Float8Accumulator(rows, values, study) if float8 else Accumulator(rows, values)

"""FP8 matrix products with groups along K, gradients of the weights of experts, beside their peers.

On a GPU: the experts of DeepSeek-V3 and of Mixtral, with even and uneven groups, by row and by
blocks, beside torch._scaled_grouped_mm, which wants groups of multiples of 16 rows, a
flash8.gemm.scaled_mm for each group, and torch._grouped_mm in bf16. Without a GPU: a small shape,
on the CPU backend. A peer is first compared with products in fp32, and timed only if it is right.
Writes bench/results/grouped_k_gemm_cuda.json, on a GPU only.

usage: python bench/bench_grouped_k_gemm.py [--device cpu]
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench_gemm import compare, widened
from bench_grouped_gemm import BF16, Case, parts, run
from flash8 import gemm


@dataclass(frozen=True)
class Operands:
    """dy (rows, N) and x (rows, K) of a layer, in bf16 and quantized by columns: (N, rows) and
    (K, rows). Scales by row are those of a group, (groups * N,) and (groups * K,)."""

    dy: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    offs: Tensor


def operands(case: Case, device: str) -> Operands:
    generator = torch.Generator(device).manual_seed(0)
    dy, x = (
        torch.randn(case.rows, size, generator=generator, device=device).to(BF16)
        for size in (case.n, case.k)
    )
    if case.granularity == "1x128":
        (a, scale_a), (b, scale_b) = gemm.quantize(dy.t(), "1x128"), gemm.quantize(x.t(), "128x128")
    else:
        (a, scale_a), (b, scale_b) = by_row(case, dy), by_row(case, x)
    offs = torch.tensor(case.sizes, dtype=torch.int32).cumsum(0).int().to(device)
    return Operands(dy, x, a, b, scale_a, scale_b, offs)


def by_row(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) transposed, with a scale for each of its columns in each group."""
    data = torch.zeros(x.shape[1], x.shape[0] + -x.shape[0] % 16, device=x.device)
    data = data.to(torch.float8_e4m3fn)
    scales = x.new_ones((case.groups, x.shape[1]), dtype=torch.float32)
    for group, rows in parts(case):
        if rows.stop > rows.start:
            part, scale = gemm.quantize(x[rows].t(), "row")
            data[:, rows], scales[group] = part[:, : rows.stop - rows.start], scale[:, 0]
    return data, scales.view(-1)


def _flash8(case: Case, given: Operands) -> Callable[[], Tensor]:
    scale_b = given.scale_b.t() if case.granularity == "1x128" else given.scale_b
    return lambda: gemm.grouped_scaled_mm(given.a, given.b.t(), given.scale_a, scale_b, given.offs)


def _one_by_one(case: Case, given: Operands) -> Callable[[], Tensor]:
    unit = 128 if case.granularity == "1x128" else 16
    if any(size % unit for size in case.sizes):
        raise ValueError(f"a product for each group wants groups of multiples of {unit} rows")
    out = given.dy.new_empty((case.groups, case.n, case.k))

    def scales(group: int, rows: slice) -> tuple[Tensor, Tensor]:
        if case.granularity == "1x128":
            blocks = slice(rows.start // 128, rows.stop // 128)
            return given.scale_a[:, blocks], given.scale_b[:, blocks].t()
        of_a, of_b = given.scale_a.view(case.groups, -1), given.scale_b.view(case.groups, -1)
        return of_a[group, :, None], of_b[group, None]

    def call() -> Tensor:
        for group, rows in parts(case):
            of_a, of_b = scales(group, rows)
            gemm.scaled_mm(given.a[:, rows], given.b[:, rows].t(), of_a, of_b, out=out[group])
        return out

    return call


def _torch(case: Case, given: Operands) -> Callable[[], Tensor]:
    if case.granularity != "row":
        raise ValueError("torch._scaled_grouped_mm scales by row")
    if any(size % 16 for size in case.sizes):
        raise ValueError("torch._scaled_grouped_mm wants groups of multiples of 16 rows")
    scales = given.scale_a, given.scale_b
    return lambda: torch._scaled_grouped_mm(
        given.a, given.b.t(), *scales, given.offs, out_dtype=BF16
    )


def _bf16(case: Case, given: Operands) -> Callable[[], Tensor]:
    dy, x = given.dy.t(), given.x
    return lambda: torch._grouped_mm(dy, x, offs=given.offs)


PEERS = {
    "flash8": _flash8,
    "flash8.gemm.scaled_mm for each group": _one_by_one,
    "torch._scaled_grouped_mm": _torch,
    "bf16": _bf16,
}


def reference(case: Case, given: Operands) -> Tensor:
    """In fp32, of the quantized operands."""
    products = []
    for group, rows in parts(case):
        if case.granularity == "1x128":
            a = widened("1x128", given.a, given.scale_a)[:, rows]
            b = widened("1x128", given.b, given.scale_b)[:, rows]
        else:
            of_a, of_b = (x.view(case.groups, -1, 1) for x in (given.scale_a, given.scale_b))
            a, b = given.a[:, rows].float() * of_a[group], given.b[:, rows].float() * of_b[group]
        products.append(a @ b.t())
    return torch.stack(products)


@torch.no_grad()
def measure(case: Case, device: str, time_call: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    given = operands(case, device)
    yield from compare(case, given, reference(case, given), PEERS, time_call)


def main() -> None:
    run("grouped_k_gemm", __doc__, measure, lambda case: f"{case.n} x {case.k} x {case.rows}")


if __name__ == "__main__":
    main()

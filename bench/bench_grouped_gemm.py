"""Grouped FP8 matrix products beside their peers, in one run.

On a GPU: the experts of DeepSeek-V3 and of Mixtral, with even and uneven groups, by row and by
blocks, beside torch._scaled_grouped_mm, DeepGEMM where it can be imported and groups are multiples
of its 128 rows, and a flash8.gemm.scaled_mm for each group. Without a GPU: a small shape, on the
CPU backend. A peer is first compared with products in fp32, and timed only if it is right. Writes
bench/results/grouped_gemm_cuda.json, on a GPU only.

usage: python bench/bench_grouped_gemm.py [--device cpu]
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import environment
from bench_gemm import RESULTS, clock, compare, widened
from flash8 import gemm
from partial import while_there_is_time, write_json

BF16 = torch.bfloat16
#: Groups, N and K of a device's experts.
SHAPES = {
    "cuda": {
        "DeepSeek-V3 gate, up": (8, 4096, 7168),
        "DeepSeek-V3 down": (8, 7168, 2048),
        "Mixtral gate, up": (8, 28672, 4096),
    },
    "cpu": {"small": (4, 136, 272)},
}
ROWS = {"cuda": (256, 4096, 16384), "cpu": (100,)}
GRANULARITIES = ("row", "1x128")


@dataclass(frozen=True)
class Case:
    layer: str
    rows: int
    groups: int
    n: int
    k: int
    granularity: str
    even: bool

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.n * self.k

    @property
    def sizes(self) -> list[int]:
        """Rows of the groups: as many of each, or group i about i times as many as the first."""
        weights = [1 if self.even else i + 1 for i in range(self.groups)]
        ends = [self.rows * sum(weights[: i + 1]) // sum(weights) for i in range(self.groups)]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Operands:
    a: Tensor
    b: Tensor  # (groups, N, K)
    scale_a: Tensor
    scale_b: Tensor  # of (groups, N, K)
    offs: Tensor


def operands(case: Case, device: str) -> Operands:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.rows, case.k, generator=generator, device=device)
    weights = torch.randn(case.groups, case.n, case.k, generator=generator, device=device)
    a, scale_a = gemm.quantize(x, case.granularity)
    of_weight = "128x128" if case.granularity == "1x128" else case.granularity
    quantized = [gemm.quantize(weight, of_weight) for weight in weights]
    b, scale_b = (torch.stack(parts) for parts in zip(*quantized, strict=True))
    offs = torch.tensor(case.sizes, dtype=torch.int32).cumsum(0).int().to(device)
    return Operands(a, b, scale_a, scale_b, offs)


def parts(case: Case) -> Iterator[tuple[int, slice]]:
    begin = 0
    for group, size in enumerate(case.sizes):
        yield group, slice(begin, begin + size)
        begin += size


def _flash8(case: Case, given: Operands) -> Callable[[], Tensor]:
    b, scale_b = given.b.mT, given.scale_b.mT
    return lambda: gemm.grouped_scaled_mm(given.a, b, given.scale_a, scale_b, given.offs)


def _one_by_one(case: Case, given: Operands) -> Callable[[], Tensor]:
    out = given.a.new_empty((case.rows, case.n), dtype=BF16)

    def call() -> Tensor:
        for group, rows in parts(case):
            of_b = given.b[group].t(), given.scale_b[group].t()
            gemm.scaled_mm(given.a[rows], of_b[0], given.scale_a[rows], of_b[1], out=out[rows])
        return out

    return call


def _torch(case: Case, given: Operands) -> Callable[[], Tensor]:
    if case.granularity != "row":
        raise ValueError("torch._scaled_grouped_mm scales by row")
    scale_a, scale_b = given.scale_a[:, 0], given.scale_b[:, :, 0]
    return lambda: torch._scaled_grouped_mm(
        given.a, given.b.mT, scale_a, scale_b, given.offs, out_dtype=BF16
    )


def _deep_gemm(case: Case, given: Operands) -> Callable[[], Tensor]:
    if case.granularity != "1x128" or any(size % 128 for size in case.sizes):
        raise ValueError("DeepGEMM scales by blocks and wants groups that are multiples of 128")
    import deep_gemm

    out = given.a.new_empty((case.rows, case.n), dtype=BF16)
    sizes = torch.tensor(case.sizes, device=given.a.device)
    indices = torch.arange(case.groups, device=given.a.device).repeat_interleave(sizes).int()

    def call() -> Tensor:
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (given.a, given.scale_a), (given.b, given.scale_b), out, indices
        )
        return out

    return call


PEERS = {
    "flash8": _flash8,
    "flash8.gemm.scaled_mm for each group": _one_by_one,
    "torch._scaled_grouped_mm": _torch,
    "DeepGEMM": _deep_gemm,
}


def cases(device: str) -> Iterator[Case]:
    for layer, (groups, n, k) in SHAPES[device].items():
        for rows in ROWS[device]:
            for granularity in GRANULARITIES:
                for even in (True, False):
                    yield Case(layer, rows, groups, n, k, granularity, even)


def reference(case: Case, given: Operands) -> Tensor:
    """In fp32, of the quantized operands."""
    a = widened(case.granularity, given.a, given.scale_a)
    products = [
        a[rows] @ widened(case.granularity, given.b[group], given.scale_b[group]).t()
        for group, rows in parts(case)
    ]
    return torch.cat(products)


@torch.no_grad()
def measure(case: Case, device: str, time_call: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    given = operands(case, device)
    yield from compare(case, given, reference(case, given), PEERS, time_call)


def main() -> None:
    run("grouped_gemm", __doc__, measure, lambda case: f"{case.rows} x {case.n} x {case.k}")


def run(
    name: str,
    description: str,
    measured: Callable[..., Iterator[dict[str, Any]]],
    sizes: Callable[[Case], str],
) -> None:
    """Measures all cases, prints each row and keeps them as <name>_cuda.json, on a GPU only."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    os.environ.setdefault("FLASH8_KERNELS", "on")
    results: dict[str, Any] = {"environment": environment.describe(), "rows": []}
    for case in while_there_is_time(cases(device)):
        for row in measured(case, device, clock(device)):
            results["rows"].append(row)
            said = row.get("refused") or f"{row['median_ms']:.4f} ms, {row['tflops']:.3g} TFLOP/s"
            groups = f"{case.groups} {'even' if case.even else 'uneven'} groups"
            shape = f"{case.layer} {sizes(case)} in {groups}, {case.granularity}"
            print(f"{shape}, {row['peer']}: {said}", flush=True)
        if device == "cuda":
            write_json(RESULTS / f"{name}_cuda.json", results)
    if device != "cuda":
        print(f"bench_{name}: torch sees no CUDA device; this is the CPU backend's")


if __name__ == "__main__":
    main()

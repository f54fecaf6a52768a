"""The GEMM kernel's tiles side by side, by one CTA and by two that share B, which only a GPU can
decide between.

Every choice multiplies the same matrices, by row and by blocks, of a model's shapes and of squares.
Each is compared with the product in fp64 first (`verify/gemm.py`). Writes
bench/results/gemm_choices.json and gemm_choices.md; without a GPU it says so. What wins belongs in
python/flash8/backends/hopper/gemm_variants.py.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import environment
from bench_gemm import RESULTS
from flash8 import gemm
from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.gemm_variants import CLUSTERED_GEMMS, GemmVariant
from flash8.backends.hopper.verify import gemm as verify
from flash8.call.scaled_mm import Product
from partial import while_there_is_time, write_json

#: M, N and K.
SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (4096, 7168, 16384), (8192, 28672, 4096))


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def choices() -> Iterator[GemmVariant]:
    """Each tile alone and in clusters."""
    for variant in CLUSTERED_GEMMS:
        yield from (replace(variant, cluster=False), variant)


def product_of(variant: GemmVariant, case: Case, device: str) -> Product:
    generator = torch.Generator(device).manual_seed(0)
    of_a, of_b = ("row", "row") if variant.scales == "outer" else ("1x128", "128x128")
    x, weight = (
        torch.randn(rows, case.k, generator=generator, device=device).bfloat16()
        for rows in (case.m, case.n)
    )
    (a, scale_a), (b, scale_b) = gemm.quantize(x, of_a), gemm.quantize(weight, of_b)
    return Product(a, b.t(), scale_a, scale_b.t(), None, torch.bfloat16, variant.fast_accum)


class Run:
    """One choice on one product, ready to be launched."""

    def __init__(self, variant: GemmVariant, case: Case, device: str = "cuda") -> None:
        self._variant, self._product = variant, product_of(variant, case, device)
        self.out = self._product.a.new_empty((case.m, case.n), dtype=torch.bfloat16)

    def __call__(self) -> Tensor:
        hopper.launch(self._variant, self._product, self.out)
        return self.out


def measure(variant: GemmVariant) -> Iterator[dict[str, Any]]:
    """A row per case; what is wrong is not timed."""
    from gpu_timing import time_call

    fault = verify.find_fault(variant, torch.device("cuda"))
    for case in (Case(*shape) for shape in SHAPES):
        row: dict[str, Any] = {"choice": variant.name, **asdict(case)}
        if fault is not None:
            row["fault"] = fault
        else:
            row |= time_call(Run(variant, case)).as_dict()
            row["tflops"] = case.flops / row["median_ms"] * 1e-9
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """TFLOP/s by choice and shape."""
    shapes = list(dict.fromkeys((row["m"], row["n"], row["k"]) for row in rows))
    titles = (f"{m} x {n} x {k}" for m, n, k in shapes)
    lines = ["| kernel | " + " | ".join(titles) + " |", "|---|" + "---|" * len(shapes)]
    for name in dict.fromkeys(row["choice"] for row in rows):
        of_shape = {(x["m"], x["n"], x["k"]): x for x in rows if x["choice"] == name}
        found = [of_shape.get(shape, {}) for shape in shapes]
        cells = (f"{x['tflops']:.0f}" if "tflops" in x else x.get("fault", "") for x in found)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if not torch.cuda.is_available():
        print("bench_gemm_choices: torch sees no CUDA device; the choices are not measured here")
        return
    os.environ.setdefault("FLASH8_KERNELS", "on")
    rows: list[dict[str, Any]] = []
    results = {"environment": environment.describe(), "rows": rows}
    for variant in while_there_is_time(choices()):
        print(variant.name, flush=True)
        rows += measure(variant)
        write_json(RESULTS / "gemm_choices.json", results)
    (RESULTS / "gemm_choices.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

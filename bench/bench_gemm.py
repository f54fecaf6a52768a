"""FP8 matrix products beside their peers, with and without quantization, in one run.

On a GPU: the projections of Llama-3 8B and 70B and of DeepSeek-V3, by tensor, row and blocks,
beside torch._scaled_mm, DeepGEMM and FBGEMM where these can be imported, and a bf16 product.
Without a GPU: small shapes, on the CPU backend. A peer is first compared with a product in fp32,
and timed only if it is right. Writes bench/results/gemm_cuda.json, on a GPU only.

usage: python bench/bench_gemm.py [--device cpu] [--rows M ...]
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import environment
from flash8 import gemm
from flash8.call.split_k import SMALL_M
from partial import while_there_is_time, write_json

RESULTS = Path(__file__).resolve().parent / "results"
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
#: N and K of a model's projections. What decides most comes first, as time may run out.
SHAPES = {
    "DeepSeek-V3": {
        "o": (7168, 16384),
        "q_a, kv_a": (2112, 7168),
        "q_b": (24576, 1536),
        "kv_b": (32768, 512),
        "shared gate, up": (4096, 7168),
        "shared down": (7168, 2048),
    },
    "Llama-3 8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate, up": (28672, 4096),
        "down": (4096, 14336),
    },
    "Llama-3 70B": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate, up": (57344, 8192),
        "down": (8192, 28672),
    },
}
SMALL = {"small": {"square": (256, 256), "ragged": (264, 400)}}
ROWS = {"cuda": (4096, 16, 1, 64, 8192), "cpu": (1, 64)}
GRANULARITIES = ("tensor", "row", "1x128")
#: Of the product of e4m3, relative to its fp32 reference from the same operands.
TOLERANCE = 5e-3
REFUSALS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Case:
    model: str
    layer: str
    m: int
    n: int
    k: int
    granularity: str

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Operands:
    """x (M, K) and weight (N, K) in bf16, and both quantized: data and scale."""

    x: Tensor
    weight: Tensor
    a: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]


def operands(case: Case, device: str) -> Operands:
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(rows, case.k, generator=generator, device=device).to(BF16)
        for rows in (case.m, case.n)
    )
    of_weight = "128x128" if case.granularity == "1x128" else case.granularity
    return Operands(x, weight, gemm.quantize(x, case.granularity), gemm.quantize(weight, of_weight))


def _flash8(case: Case, given: Operands) -> Callable[[], Tensor]:
    (a, scale_a), (b, scale_b) = given.a, given.b
    return lambda: gemm.scaled_mm(a, b.t(), scale_a, scale_b.t())


def _flash8_split(case: Case, given: Operands) -> Callable[[], Tensor]:
    if case.m > SMALL_M:
        raise ValueError(f"K is split up to {SMALL_M} rows")
    (a, scale_a), (b, scale_b) = given.a, given.b
    return lambda: gemm.scaled_mm(a, b.t(), scale_a, scale_b.t(), split_k=0)


def _flash8_quantizing(case: Case, given: Operands) -> Callable[[], Tensor]:
    b, scale_b = given.b

    def call() -> Tensor:
        a, scale_a = gemm.quantize(given.x, case.granularity)
        return gemm.scaled_mm(a, b.t(), scale_a, scale_b.t())

    return call


def _torch(case: Case, given: Operands) -> Callable[[], Tensor]:
    (a, scale_a), (b, scale_b) = given.a, given.b
    if case.granularity == "1x128":
        # As it wants them: those of A column by column, those of B row by row.
        scale_a, scale_b = scale_a.t().contiguous().t(), scale_b.contiguous()
    else:
        scale_b = scale_b.view(1, -1)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a, scale_b.t() if case.granularity == "1x128" else scale_b, out_dtype=BF16
    )


def _bf16(case: Case, given: Operands) -> Callable[[], Tensor]:
    return lambda: given.x @ given.weight.t()


def _deep_gemm(case: Case, given: Operands) -> Callable[[], Tensor]:
    if case.granularity != "1x128":
        raise ValueError("DeepGEMM scales by blocks")
    import deep_gemm

    out = given.x.new_empty((case.m, case.n))

    def call() -> Tensor:
        deep_gemm.fp8_gemm_nt(given.a, given.b, out)
        return out

    return call


def _fbgemm(case: Case, given: Operands) -> Callable[[], Tensor]:
    if case.granularity != "row":
        raise ValueError("FBGEMM is called with scales by row")
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401  its ops

    (a, scale_a), (b, scale_b) = given.a, given.b
    scales = scale_a.flatten(), scale_b.flatten()
    return lambda: torch.ops.fbgemm.f8f8bf16_rowwise(a, b, *scales)


PEERS = {
    "flash8": _flash8,
    "flash8, split_k=0": _flash8_split,
    "flash8, quantizing x": _flash8_quantizing,
    "torch._scaled_mm": _torch,
    "DeepGEMM": _deep_gemm,
    "FBGEMM": _fbgemm,
    "bf16": _bf16,
}


def cases(device: str, rows: tuple[int, ...]) -> Iterator[Case]:
    for model, layers in (SHAPES if device == "cuda" else SMALL).items():
        for layer, (n, k) in layers.items():
            for m in rows:
                for granularity in GRANULARITIES:
                    yield Case(model, layer, m, n, k, granularity)


def widened(granularity: str, data: Tensor, scale: Tensor) -> Tensor:
    """A quantized operand, (rows, K), in fp32."""
    if granularity == "1x128":
        if scale.shape[0] < data.shape[0]:
            scale = scale.repeat_interleave(128, 0)[: data.shape[0]]
        scale = scale.repeat_interleave(128, 1)[:, : data.shape[1]]
    return data.float() * scale


def reference(case: Case, given: Operands) -> Tensor:
    """In fp32, of the quantized operands."""
    a, b = (widened(case.granularity, *x) for x in (given.a, given.b))
    return a @ b.t()


@torch.no_grad()
def measure(case: Case, device: str, time_call: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    given = operands(case, device)
    yield from compare(case, given, reference(case, given), PEERS, time_call)


def compare(
    case: Any, given: Any, want: Tensor, peers: dict[str, Any], time_call: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    """A row for each of the peers: what it takes, or why not. What is wrong is not timed."""
    for name, prepare in peers.items():
        row: dict[str, Any] = {**asdict(case), "peer": name}
        try:
            call = prepare(case, given)
            error = ((call().float() - want).norm() / want.norm()).item()
            limit = 0.1 if name == "bf16" else TOLERANCE  # which is of what is not quantized
            if not error <= limit:
                row["refused"] = f"wrong: relative error {error:.2g}, above {limit}"
            else:
                row["error"] = error
                row |= time_call(call)
                row["tflops"] = case.flops / row["median_ms"] * 1e-9
        except REFUSALS as refusal:
            row["refused"] = f"{type(refusal).__name__}: {refusal}".splitlines()[0][:200]
        yield row


def time_on_cpu(call: Callable[[], object]) -> dict[str, Any]:
    call()
    times = []
    for _ in range(5):
        begin = time.process_time()
        call()
        times.append((time.process_time() - begin) * 1e3)
    return {"median_ms": sorted(times)[2], "runs": len(times)}


def clock(device: str) -> Callable[[Callable[[], object]], dict[str, Any]]:
    if device != "cuda":
        return time_on_cpu
    from gpu_timing import time_call

    return lambda call: time_call(call).as_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="M; other results are not written")
    options = parser.parse_args()
    device = options.device
    os.environ.setdefault("FLASH8_KERNELS", "on")
    results: dict[str, Any] = {"environment": environment.describe(), "rows": []}
    path = RESULTS / f"gemm_{device}.json"
    for case in while_there_is_time(cases(device, tuple(options.rows or ROWS[device]))):
        for row in measure(case, device, clock(device)):
            results["rows"].append(row)
            said = row.get("refused") or f"{row['median_ms']:.4f} ms, {row['tflops']:.3g} TFLOP/s"
            shape = f"{case.model} {case.layer} {case.m} x {case.n} x {case.k}"
            print(f"{shape} {case.granularity}, {row['peer']}: {said}", flush=True)
        if device == "cuda" and not options.rows:
            write_json(path, results)
    if device != "cuda":
        print("bench_gemm: torch sees no CUDA device; what this printed is the CPU backend's")


if __name__ == "__main__":
    main()

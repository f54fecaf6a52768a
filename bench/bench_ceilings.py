"""The ceilings of this GPU: copy bandwidth, and the BF16 and FP8 matrix rates, on random data."""

import json
from pathlib import Path
from typing import Any

import torch

import environment
from gpu_timing import time_call

_COPY_BYTES = 8 << 30
_MATRIX_SIZES = (4096, 8192, 16384)


def copy_rate() -> dict[str, Any]:
    source = torch.randint(-128, 128, (_COPY_BYTES // 2,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    timing = time_call(lambda: target.copy_(source), runs=10)
    moved = 2 * source.numel()
    return {"bytes": moved, "tb_per_s": moved / timing.median_ms * 1e-9, **timing.as_dict()}


def bf16_rate(size: int) -> dict[str, Any]:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    timing = time_call(lambda: a @ b)
    return {"size": size, "tflops": 2 * size**3 / timing.median_ms * 1e-9, **timing.as_dict()}


def fp8_rate(size: int) -> dict[str, Any]:
    fp8 = torch.float8_e4m3fn
    a, b = (torch.randn(size, size, device="cuda").to(fp8) for _ in range(2))
    one = torch.ones((), device="cuda")

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    timing = time_call(product)
    return {"size": size, "tflops": 2 * size**3 / timing.median_ms * 1e-9, **timing.as_dict()}


def main() -> None:
    if not torch.cuda.is_available():
        print("bench_ceilings: torch sees no CUDA device, nothing to measure")
        return
    results = {
        "environment": environment.describe(),
        "copy": copy_rate(),
        "bf16_matmul": [bf16_rate(size) for size in _MATRIX_SIZES],
        "fp8_matmul": [fp8_rate(size) for size in _MATRIX_SIZES],
    }
    path = Path(__file__).parent / "results" / "gpu_ceilings.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"copy {results['copy']['tb_per_s']:.2f} TB/s")
    for name in ("bf16_matmul", "fp8_matmul"):
        for row in results[name]:
            print(f"{name} {row['size']}: {row['tflops']:.0f} TFLOP/s")


if __name__ == "__main__":
    main()

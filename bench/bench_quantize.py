"""The quantizer on a GPU: GB/s of its kernels against the copy rate measured in the same run.

Beside each row the same call in plain torch operations. Bytes are those of
bench/quantizer_traffic.py; "needed" bytes over time is the rate to compare with the copy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import environment
from bench_ceilings import copy_rate
from flash8.backends.cpu import quantize as portable
from flash8.backends.hopper import quantize as quantizer
from flash8.call.request import Request
from flash8.tensors.hadamard import Rotation
from flash8.tensors.rotary import Rope
from gpu_timing import time_call
from partial import while_there_is_time, write_json
from quantizer_traffic import traffic

HEADS = 8


def cases(tokens: int, head_dim: int, device: str = "cuda") -> dict[str, Request]:
    x = torch.randn(1, tokens, HEADS, head_dim, dtype=torch.bfloat16, device=device)
    tables = torch.rand(tokens, head_dim // 2, device=device)
    rotation = Rotation(head_dim)
    mean = torch.randn(HEADS, head_dim, device=device)
    one, amax = torch.ones((), device=device), torch.zeros((), device=device)
    pages = x.view(tokens // 64, 64, HEADS, head_dim)
    steps = {"rotation": rotation, "mean": mean}
    return {
        "block": Request(x, "block"),
        "block, transposed": Request(x, "block", v_colmajor=True),
        "block, rotation": Request(x, "block", rotation=rotation),
        "block, rope by neighbours": Request(x, "block", rope=Rope(tables, tables)),
        "block, rope by halves": Request(x, "block", rope=Rope(tables, tables, None, False)),
        "block, rope, mean, rotation": Request(x, "block", rope=Rope(tables, tables), **steps),
        "page of 64": Request(pages, "page"),
        "tensor, delayed scaling": Request(x, "tensor", descale=one, amax=amax),
        "head": Request(x, "head"),
        "tensor": Request(x, "tensor"),
        "block, mean of its own": Request(x, "block", smooth=True),
    }


def measure(name: str, request: Request) -> dict[str, Any]:
    moved, needed = traffic(request)
    kernels = time_call(lambda: quantizer.quantize(request))
    operations = time_call(lambda: portable.quantize(request), runs=5)
    return {
        "case": name,
        "shape": list(request.x.shape),
        "launches": list(quantizer.jobs(request)),
        "bytes_moved": moved,
        "bytes_needed": needed,
        "needed_gb_per_s": needed / kernels.median_ms * 1e-6,
        "kernels": kernels.as_dict(),
        "torch_operations": operations.as_dict(),
    }


def main() -> None:
    if not torch.cuda.is_available():
        print("bench_quantize: torch sees no CUDA device, nothing to measure")
        return
    ceiling = copy_rate()
    results = {"environment": environment.describe(), "copy": ceiling, "rows": []}
    path = Path(__file__).parent / "results" / "quantize_gpu.json"
    for tokens, head_dim, name, request in while_there_is_time(_all_cases()):
        row = measure(name, request)
        results["rows"].append(row)
        write_json(path, results)
        share = row["needed_gb_per_s"] / ceiling["tb_per_s"] / 1000
        times = f"{row['kernels']['median_ms']:.3f} ms, torch operations "
        times += f"{row['torch_operations']['median_ms']:.3f} ms"
        print(f"{tokens} x {head_dim} {name}: {times}, {share:.0%} of the copy rate", flush=True)


def _all_cases() -> Iterator[tuple[int, int, str, Request]]:
    for tokens, head_dim in ((131072, 128), (131072, 64), (131072, 256), (16384, 128)):
        for name, request in cases(tokens, head_dim).items():
            yield tokens, head_dim, name, request


if __name__ == "__main__":
    main()

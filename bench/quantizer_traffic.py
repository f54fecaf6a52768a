"""Bytes that the quantizer's launches move, against the bytes that any quantizer must move.

Counted from the launches that `flash8.backends.hopper.quantize` plans, not measured: every pass
reads x once, the cast writes the result. Needed: x once, the result once, descales, tables and
means.

usage: python bench/quantizer_traffic.py    (writes bench/results/quantizer_traffic.*)
"""

import json
from pathlib import Path
from typing import Any

import torch

from flash8.backends.hopper import quantize as quantizer
from flash8.call.request import Request
from flash8.tensors.hadamard import Rotation
from flash8.tensors.rotary import Rope

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS, HEADS, HEAD_DIM = 16384, 8, 128
_READS_X = ("mean", "amax", "cast")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> dict[str, Request]:
    """K or V of one sequence; what a kernel makes of them does not depend on values."""
    x = _empty(1, TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    pages = _empty(TOKENS // 64, 64, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    tables = _empty(TOKENS, HEAD_DIM // 2)
    rope, rotation = Rope(tables, tables), Rotation(HEAD_DIM)
    mean = _empty(HEADS, HEAD_DIM)
    return {
        "block": Request(x, "block"),
        "block, transposed": Request(x, "block", v_colmajor=True),
        "block, rope, given mean, rotation": Request(
            x, "block", rotation=rotation, mean=mean, rope=rope
        ),
        "page of 64": Request(pages, "page"),
        "tensor, delayed scaling": Request(x, "tensor", descale=_empty(), amax=_empty()),
        "head": Request(x, "head"),
        "tensor": Request(x, "tensor"),
        "block, mean of its own": Request(x, "block", smooth=True),
        "head, mean of its own, rotation": Request(x, "head", smooth=True, rotation=rotation),
    }


def traffic(request: Request) -> tuple[int, int]:
    """Bytes moved and bytes needed, tables and scales once."""
    x, jobs = request.x, quantizer.jobs(request)
    read = x.numel() * x.element_size()
    written = torch.Size(request.data_shape()).numel()
    small = 4 * torch.Size(request.descale_shape()).numel()
    small += 4 * torch.Size(request.mean_shape()).numel()
    if request.mean is not None:
        small += 4 * request.mean.numel()
    tables = 0
    if request.rope is not None:
        tables = 4 * (request.rope.cos.numel() + request.rope.sin.numel())
    partial = 0
    if "mean" in jobs:
        partial = 2 * 4 * quantizer.partial_mean_shape(request).numel()  # written, and read
        partial += 2 * 4 * torch.Size(request.mean_shape()).numel()
    passes = sum(job in _READS_X for job in jobs)
    return passes * (read + tables) + written + small + partial, read + tables + written + small


def rows() -> list[dict[str, Any]]:
    found = []
    for name, request in cases().items():
        moved, needed = traffic(request)
        launches = list(quantizer.jobs(request))
        found.append({"case": name, "launches": launches, "moved": moved, "needed": needed})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| scales and steps | launches | MB moved | MB needed | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        moved, needed = row["moved"], row["needed"]
        launches = ", ".join(row["launches"])
        figures = f"{moved / 1e6:.1f} | {needed / 1e6:.1f} | {moved / needed:.2f}"
        lines.append(f"| {row['case']} | {launches} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = rows()
    (RESULTS / "quantizer_traffic.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "quantizer_traffic.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()

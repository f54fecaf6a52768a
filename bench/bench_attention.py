"""Attention forward and backward beside its peers, correctness first, in one run.

On a GPU the shapes are those of the FlashAttention-3 paper and of Llama-3 in BF16; on a CPU small
ones in float32. Writes bench/results/attention_<device>.json and a Markdown table beside it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import environment
import torch
from attention_peers import Peer, peers, reference
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
_HIDDEN = 2048
_TOKENS = 16384
_MAX_CHECKED = 2048  # the reference materialises scores: longer shapes are checked at this length


@dataclass(frozen=True)
class Shape:
    """One row of the benchmark."""

    batch: int
    seqlen: int
    heads: int
    heads_kv: int
    head_dim: int
    causal: bool

    def flops(self, *, backward: bool) -> float:
        """Matrix FLOPs: 4 * b * h * s^2 * d, half if causal; 3.5 times that with the backward."""
        forward = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        forward *= 0.5 if self.causal else 1.0
        return forward * (3.5 if backward else 1.0)


def gpu_shapes() -> list[Shape]:
    paper = [
        Shape(max(1, _TOKENS // seqlen), seqlen, _HIDDEN // d, _HIDDEN // d, d, causal)
        for d in (64, 128, 256)
        for seqlen in (512, 2048, 8192, 16384)
        for causal in (False, True)
    ]
    llama = [Shape(1, 8192, 32, 8, 128, True), Shape(1, 8192, 64, 8, 128, True)]
    return paper + llama


def cpu_shapes() -> list[Shape]:
    return [
        Shape(8, 256, 8, 8, 64, True),
        Shape(1, 1024, 8, 8, 64, True),
        Shape(1, 1024, 8, 2, 64, True),
        Shape(1, 4096, 4, 4, 64, True),
        Shape(1, 4096, 4, 4, 64, False),
    ]


def inputs(shape: Shape, device: str, dtype: torch.dtype, seqlen: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        size = (shape.batch, seqlen, heads, shape.head_dim)
        x = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    return draw(shape.heads), draw(shape.heads_kv), draw(shape.heads_kv)


def error(peer: Peer, shape: Shape, device: str, dtype: torch.dtype) -> float:
    """Relative error of O on fresh random data, |o - ref| / |ref|."""
    q, k, v = (
        x.detach()[:1] for x in inputs(shape, device, dtype, min(shape.seqlen, _MAX_CHECKED))
    )
    expected = reference(q, k, v, shape.causal)
    with torch.no_grad():
        actual = peer.call(q, k, v, shape.causal).float()
    return ((actual - expected).norm() / expected.norm()).item()


def measure(peer: Peer, shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {"peer": peer.name, **asdict(shape)}
    try:
        row["error"] = error(peer, shape, device, dtype)
        q, k, v = inputs(shape, device, dtype, shape.seqlen)
        dout = torch.randn_like(q)

        def forward() -> Tensor:
            with torch.no_grad():
                return peer.call(q, k, v, shape.causal)

        def both() -> object:
            return torch.autograd.grad(peer.call(q, k, v, shape.causal), (q, k, v), dout)

        for name, call, backward in (("forward", forward, False), ("both", both, True)):
            timing = timer(device)(call)
            rate = shape.flops(backward=backward) / timing["median_ms"] * 1e-9
            row[name] = {**timing, "tflops": rate}
    except (RuntimeError, ValueError, TypeError) as refusal:
        row["refused"] = str(refusal).splitlines()[0][:200]
    return row


def timer(device: str) -> Callable[[Callable[[], object]], dict[str, Any]]:
    if device == "cuda":
        from gpu_timing import time_call

        return lambda call: time_call(call).as_dict()
    return _time_on_cpu


def _time_on_cpu(call: Callable[[], object], runs: int = 7) -> dict[str, Any]:
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median_ms": statistics.median(times), "best_ms": min(times), "runs": runs}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| shape (b, s, h/hk, d) | causal | peer | forward ms | fwd+bwd ms | relL2 |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        shape = (
            f"{row['batch']}, {row['seqlen']}, {row['heads']}/{row['heads_kv']}, {row['head_dim']}"
        )
        if "refused" in row:
            cells = ["refused", "", ""]
        else:
            cells = [f"{row[name]['median_ms']:.2f}" for name in ("forward", "both")]
            cells.append(f"{row['error']:.1e}")
        lines.append(f"| {shape} | {row['causal']} | {row['peer']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = gpu_shapes() if device == "cuda" else cpu_shapes()
    rows = []
    for number, shape in enumerate(shapes, 1):
        for peer in peers(device):
            print(f"[{number}/{len(shapes)}] {shape} {peer.name}", flush=True)
            rows.append(measure(peer, shape, device, dtype))
    results = {"environment": environment.describe(), "dtype": str(dtype), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"attention_{device}.json").write_text(json.dumps(results, indent=2) + "\n")
    text = table(rows)
    (RESULTS / f"attention_{device}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

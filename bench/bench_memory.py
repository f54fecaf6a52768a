"""Peak memory of attention's forward and backward over the sequence length, on this CPU.

Beside flash8 runs attention as it is written down: S = Q K^T, P = softmax(S), O = P V by torch's
operations, which keep S and P. Each measurement is a process of its own; what counts is how far its
resident memory rises above what it is before the call, when inputs and gradients are there.
Writes bench/results/memory_cpu.json and docs/images/memory.png.

usage: python bench/bench_memory.py
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "memory_cpu.json"
IMAGE = HERE.parent / "docs" / "images" / "memory.png"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MOST_WRITTEN_DOWN = 8192  # 4 GB
HEADS, WIDTH = 4, 64
MIB = 2**20


def resident(which: str) -> int:
    """Bytes of memory: VmRSS now, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(method: str, length: int) -> int:
    """Bytes that a call takes. In a process of its own."""
    import torch

    import flash8

    def written_down(q, k, v):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * WIDTH**-0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    attention = flash8.flash_attn_func if method == "flash8" else written_down
    small = [torch.randn(1, 64, HEADS, WIDTH).requires_grad_() for _ in "qkv"]
    attention(*small).sum().backward()  # what is loaded at first
    inputs = [torch.randn(1, length, HEADS, WIDTH).requires_grad_() for _ in "qkv"]
    dout = torch.randn(1, length, HEADS, WIDTH)
    for x in inputs:
        x.grad = torch.zeros_like(x)
    forget_peak()
    before = resident("VmRSS")
    attention(*inputs).backward(dout)
    return resident("VmHWM") - before


def everything() -> dict[str, list[int | None]]:
    def in_a_process(method: str, length: int) -> int | None:
        if method != "flash8" and length > MOST_WRITTEN_DOWN:
            return None
        command = [sys.executable, str(Path(__file__)), "--one", method, str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(method, length, f"{int(done.stdout) / MIB:.1f} MiB", flush=True)
        return int(done.stdout)

    return {
        method: [in_a_process(method, length) for length in LENGTHS]
        for method in ("flash8", "written down")
    }


def draw(results: dict) -> None:
    from plots import BAD, OURS, lines, picture

    length, written = results["lengths"], results["bytes"]["written down"]
    last = max(i for i, x in enumerate(written) if x is not None)
    times = written[last] / results["bytes"]["flash8"][last]
    title = f"At {length[last] // 1024}k tokens flash8 takes {times:.0f} times less memory"
    with picture(IMAGE, title) as axes:
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel=f"tokens ({HEADS} heads, d = {WIDTH}, fp32, CPU)")
        axes.set(ylabel="MiB above the inputs, forward and backward")
        curves = {
            "flash8": [x / MIB for x in results["bytes"]["flash8"]],
            "S and P kept": [None if x is None else x / MIB for x in written],
        }
        lines(axes, length, curves, (OURS, BAD))
        axes.set_xticks(length, [f"{n / 1024:g}k" for n in length])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "LENGTH"), help=argparse.SUPPRESS)
    parser.add_argument("--draw", action="store_true", help="only the picture, of the stored file")
    options = parser.parse_args()
    if options.one:
        print(measure(options.one[0], int(options.one[1])))
        return
    if not options.draw:
        import environment

        results = {"environment": environment.describe(), "lengths": LENGTHS, "bytes": everything()}
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()

"""Attention beside its peers, correctness first, in one run; then a table and plots from the JSON.

On a GPU: the FlashAttention-3 paper's shapes, Llama-3's, packed documents and decoding, in BF16
and FP8: the forward, and the forward with the backward, whose dQ is summed in any order or in one.
Without a GPU: small shapes in float32, and what is committed of a GPU is only drawn.
Writes bench/results/attention_<device>.json, .md and .png.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import attention_report
import environment
from attention_cases import Case, cpu_cases, gpu_cases, inputs, reference, reference_gradients
from attention_peers import Absent, Peer, RefusedError, peers
from partial import while_there_is_time, write_json

RESULTS = Path(__file__).parent / "results"
Clock = Callable[[Callable[[], object]], dict[str, Any]]
_MATRIX_SIZE = {"cuda": 8192, "cpu": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--suite", help="only the cases of one suite; prints, writes nothing")
    options = parser.parse_args()
    device = options.device
    if device != "cuda":
        print("bench_attention: torch sees no CUDA device; the GPU's cases are not measured here")
    os.environ.setdefault("FLASH8_KERNELS", "on")
    cases = gpu_cases() if device == "cuda" else cpu_cases()
    cases = [case for case in cases if options.suite in (None, case.suite)]
    path = RESULTS / f"attention_{device}.json"

    def keep(results: dict[str, Any]) -> None:
        if options.suite is None:
            write_json(path, results)

    results = run(cases, list(peers(device)), device, clock(device), keep)
    if options.suite is not None:
        print(attention_report.tables(results))
        return
    attention_report.main()


def run(
    cases: list[Case],
    candidates: list[Peer | Absent],
    device: str,
    time_call: Clock,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Every peer on every case; the matrix rate before and after, in the same run.

    `keep` gets the results so far after every row. Slow peers come last, the rows in the order of
    the cases.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rate = matrix_rate(device, dtype, time_call)
    present = [peer for peer in candidates if isinstance(peer, Peer)]
    work = [
        (case, peer)
        for case in cases
        for peer in present
        if case.kind in peer.kinds and peer.wants(case)
    ]
    work.sort(key=lambda pair: pair[1].slow)  # stable
    results: dict[str, Any] = {
        "environment": environment.describe(),
        "dtype": str(dtype),
        "matrix_tflops": {"before": rate, "after": rate},
        "absent": {peer.name: peer.reason for peer in candidates if isinstance(peer, Absent)},
        "rows": [],
    }
    measured = {}
    for pair in while_there_is_time(progress(work)):
        case, peer = pair
        measured[pair] = measure(peer, case, device, dtype, time_call)
        results["rows"] = [
            measured[case, peer] for case in cases for peer in present if (case, peer) in measured
        ]
        keep(results)
    results["matrix_tflops"]["after"] = matrix_rate(device, dtype, time_call)
    keep(results)
    return results


def progress(work: list[tuple[Case, Peer]]) -> Iterator[tuple[Case, Peer]]:
    """A bar if tqdm is there, and a line per case if it is not."""
    try:
        from tqdm import tqdm
    except ImportError:
        for number, (case, peer) in enumerate(work, 1):
            print(f"[{number}/{len(work)}] {attention_report.label(asdict(case))} {peer.name}")
            yield case, peer
        return
    with tqdm(work, unit="case") as bar:
        for case, peer in bar:
            bar.set_postfix_str(f"{attention_report.label(asdict(case))} {peer.name}")
            yield case, peer


def measure(
    peer: Peer, case: Case, device: str, dtype: torch.dtype, time_call: Clock
) -> dict[str, Any]:
    """One row. What is wrong is not timed; what a peer cannot do is written down."""
    size = dtype.itemsize
    row: dict[str, Any] = {"peer": peer.name, **asdict(case)}
    row |= {"least_bytes": case.least_bytes(size), "score_bytes": case.score_bytes(size)}

    def timed(name: str, function: Callable[[], object]) -> None:
        row[name] = timing = time_call(function)
        flops = case.flops(backward=name == "both")
        timing["tflops"] = flops / timing["median_ms"] * 1e-9
        timing["peak_bytes"] = peak_bytes(function, device)

    try:
        row["error"] = error(peer, case.checked(), device, dtype)
        if not row["error"] <= peer.tolerance:
            row["refused"] = f"wrong: relative error {row['error']:.2g}, above {peer.tolerance}"
            return row
        call = inputs(case, device, dtype)
        attend = peer.prepare(call)
        if peer.forward:
            timed("forward", torch.no_grad()(lambda: attend(call.q, call.k, call.v)))
    except _REFUSALS as refusal:
        row["refused"] = _in_a_line(refusal)
        return row
    if not peer.backward or case.kind == "decode":
        return row
    try:
        worst = row["gradient_error"] = gradient_error(peer, case.checked(), device, dtype)
        if not worst <= peer.gradient_tolerance:
            bound = peer.gradient_tolerance
            row["backward_refused"] = f"wrong: relative error {worst:.2g}, above {bound}"
            return row
        tensors, dout = (call.q, call.k, call.v), torch.randn_like(call.q)
        timed("both", lambda: torch.autograd.grad(attend(*tensors), tensors, dout))
    except _REFUSALS as refusal:
        row["backward_refused"] = _in_a_line(refusal)
    return row


_REFUSALS = (RefusedError, RuntimeError, ValueError, TypeError)


def _in_a_line(refusal: Exception) -> str:
    return f"{type(refusal).__name__}: {refusal}".splitlines()[0][:200]


@torch.no_grad()
def error(peer: Peer, case: Case, device: str, dtype: torch.dtype) -> float:
    """Relative error of O on fresh random data, |o - ref| / |ref|."""
    call = inputs(case, device, dtype, seed=1)
    expected = reference(call)
    actual = peer.prepare(call)(call.q, call.k, call.v).float()
    return ((actual - expected).norm() / expected.norm()).item()


def gradient_error(peer: Peer, case: Case, device: str, dtype: torch.dtype) -> float:
    """The largest relative error of dQ, dK and dV on fresh random data."""
    call = inputs(case, device, dtype, seed=1)
    generator = torch.Generator(device=device).manual_seed(2)
    dout = torch.randn(call.q.shape, generator=generator, device=device, dtype=dtype)
    tensors = (call.q, call.k, call.v)
    found = torch.autograd.grad(peer.prepare(call)(*tensors), tensors, dout)
    expected = reference_gradients(call, dout)
    pairs = list(zip(found, expected, strict=True))
    return max(((x.float() - y).norm() / y.norm()).item() for x, y in pairs)


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """What a call allocates at most above what is there; None where torch does not count."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def matrix_rate(device: str, dtype: torch.dtype, time_call: Clock) -> float:
    """TFLOP/s of a large square product in the type of the benchmark."""
    size = _MATRIX_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / time_call(lambda: a @ b)["median_ms"] * 1e-9


def clock(device: str) -> Clock:
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
    times.sort()
    quintiles = statistics.quantiles(times, n=5)
    median = statistics.median(times)
    return {"median_ms": median, "p20_ms": quintiles[0], "p80_ms": quintiles[3], "runs": runs}


if __name__ == "__main__":
    main()

"""flash8 on CPU tensors beside torch's SDPA: the same calls in the same process, turn by turn.

With one thread the CPU time of the process is taken, which other processes disturb little; with
more it is wall time. Of several turns the best counts. Packed sequences are no call of SDPA: it is
given them padded, with a causal mask, which needs no other, and one by one.

Writes bench/results/cpu.json and cpu.md, with one thread unless said.

usage: python bench/bench_cpu.py [--threads N] [--seconds S]
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import environment
from flash8 import flash_attn_func, flash_attn_varlen_func
from partial import write_json

RESULTS = Path(__file__).resolve().parent / "results"
HEAD_DIM = 64
MIXED = (37, 128, 300, 91, 512, 200, 64, 150)
SHORT = (17, 20, 33, 5, 9, 40, 28, 31, 60, 12, 17, 20, 33, 5, 9, 40)
Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Dense:
    seqlen_q: int
    seqlen_k: int
    heads: int = 8
    heads_kv: int = 8
    causal: bool = True

    def __str__(self) -> str:
        mask = ", causal" if self.causal and self.seqlen_q > 1 else ""
        keys = f" on {self.seqlen_k}" if self.seqlen_q != self.seqlen_k else ""
        return f"1 x {self.seqlen_q}{keys}, h {self.heads}/{self.heads_kv}{mask}"

    @property
    def has_gradients(self) -> bool:
        return self.seqlen_q > 1

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def tokens(seqlen: int, heads: int) -> Tensor:
            return torch.randn(1, seqlen, heads, HEAD_DIM, dtype=dtype)

        keys = [tokens(self.seqlen_k, self.heads_kv) for _ in range(2)]
        return tokens(self.seqlen_q, self.heads), *keys

    def calls(self, q: Tensor, k: Tensor, v: Tensor) -> Calls:
        causal = self.causal and self.seqlen_q > 1  # from the top left, in SDPA

        def sdpa() -> Tensor:
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            gqa = self.heads != self.heads_kv
            o = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=gqa)
            return o.transpose(1, 2)

        return {"flash8": lambda: flash_attn_func(q, k, v, causal=self.causal), "SDPA": sdpa}


@dataclass(frozen=True)
class Packed:
    lengths: tuple[int, ...]
    heads: int = 8

    def __str__(self) -> str:
        lengths = sorted(self.lengths)
        return f"{len(lengths)} packed, {lengths[0]} to {lengths[-1]}, h {self.heads}, causal"

    @property
    def has_gradients(self) -> bool:
        return True

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        total = sum(self.lengths)
        return tuple(torch.randn(total, self.heads, HEAD_DIM, dtype=dtype) for _ in range(3))

    def calls(self, q: Tensor, k: Tensor, v: Tensor) -> Calls:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32)
        batch, longest = len(self.lengths), max(self.lengths)
        places = torch.cat([b * longest + torch.arange(n) for b, n in enumerate(self.lengths)])

        def pad(x: Tensor) -> Tensor:
            rows = x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, places, x)
            return rows.view(batch, longest, *x.shape[1:]).transpose(1, 2)

        def padded() -> Tensor:
            o = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True)
            return o.transpose(1, 2).flatten(0, 1)[places]

        def one_by_one() -> Tensor:
            parts = zip(*(x.transpose(0, 1).split(self.lengths, 1) for x in (q, k, v)), strict=True)
            found = [
                F.scaled_dot_product_attention(*(x[None] for x in part), is_causal=True)[0]
                for part in parts
            ]
            return torch.cat(found, dim=1).transpose(0, 1)

        def flash8() -> Tensor:
            lengths = (cu_seqlens, cu_seqlens, longest, longest)
            return flash_attn_varlen_func(q, k, v, *lengths, causal=True)

        return {"flash8": flash8, "SDPA, padded": padded, "SDPA, one by one": one_by_one}


CASES: tuple[Dense | Packed, ...] = (
    Dense(128, 128),
    Dense(512, 512),
    Dense(2048, 2048),
    Dense(2048, 2048, heads_kv=2),
    Dense(2048, 2048, causal=False),
    Dense(8192, 8192, heads=2, heads_kv=2),
    Dense(1, 1024),
    Dense(1, 8192),
    Packed((128,) * 8),
    Packed(MIXED),
    Packed(SHORT),
)


def best_times(calls: Calls, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of the best turn of each, all taking turns for about so long."""
    found = {}
    for name, call in calls.items():
        start = clock()
        call()
        found[name] = clock() - start
    turns = max(2, min(200, int(seconds / sum(found.values()))))
    for _ in range(turns):
        for name, call in calls.items():
            start = clock()
            call()
            found[name] = min(found[name], clock() - start)
    return {name: 1e3 * best for name, best in found.items()}


def with_gradients(calls: Calls, inputs: tuple[Tensor, ...], dout: Tensor) -> Calls:
    def run(call: Callable[[], Tensor]) -> Tensor:
        return torch.autograd.grad(call(), inputs, dout)[0]

    return {name: lambda call=call: run(call) for name, call in calls.items()}  # type: ignore[misc]


def measure(
    case: Dense | Packed, dtype: torch.dtype, seconds: float, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    inputs = case.inputs(dtype)
    calls = case.calls(*inputs)
    results = [call() for call in calls.values()]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=2e-2, atol=2e-2)
    head = {"case": str(case), "dtype": str(dtype).removeprefix("torch.")}
    yield head | {"what": "forward", "ms": best_times(calls, seconds, clock)}
    if case.has_gradients:
        leaves = tuple(x.requires_grad_() for x in inputs)
        both = with_gradients(calls, leaves, torch.randn_like(results[0]))
        yield head | {"what": "forward and backward", "ms": best_times(both, seconds, clock)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| call | dtype | | flash8 ms | SDPA ms | flash8 / SDPA |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        own, *others = row["ms"].items()
        for name, ms in others:
            how = name.removeprefix("SDPA").removeprefix(", ")
            lines.append(
                f"| {row['case']} | {row['dtype']} | {row['what']} | {own[1]:.3g} | "
                f"{ms:.3g}{f' ({how})' if how else ''} | {own[1] / ms:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    results: dict[str, Any] = {"environment": environment.describe(), "rows": []}
    for case, dtype in itertools.product(CASES, (torch.float32, torch.bfloat16)):
        for row in measure(case, dtype, arguments.seconds, clock):
            results["rows"].append(row)
            print(table([row]).splitlines()[2], flush=True)
    suffix = "" if arguments.threads == 1 else f"_{arguments.threads}_threads"
    write_json(RESULTS / f"cpu{suffix}.json", results)
    facts = results["environment"]
    timed = "CPU time" if arguments.threads == 1 else "wall time"
    head = f"{facts['cpu']}, torch {facts['torch']}, {arguments.threads} thread(s), {timed}, "
    head += f"head_dim {HEAD_DIM}, {facts['date']}\n\n"
    (RESULTS / f"cpu{suffix}.md").write_text(head + table(results["rows"]))


if __name__ == "__main__":
    main()

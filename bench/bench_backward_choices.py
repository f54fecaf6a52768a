"""The backward's compile-time choices side by side, which only a GPU can decide between.

Every choice runs the same calls, dense and causal: how dQ is summed, by bulk reductions of what is
staged in shared memory, by reductions from registers, or staged and in one order. The three kernels
of a variant are timed together, without the forward; gradients are compared with the reference
first. Writes bench/results/backward_choices.json and .md; without a GPU it says so.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import environment
import flash8
from attention_cases import Case, dense, inputs, reference_gradients
from bench_choices import table
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import streams
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.call.options import Options
from partial import while_there_is_time, write_json

RESULTS = Path(__file__).resolve().parent / "results"
_HIDDEN, _TOKENS, _LENGTHS = 2048, 16384, (8192, 2048)
TOLERANCE = 0.03  # relative error of dQ, dK and dV, each


def choices() -> Iterator[BackwardVariant]:
    """What tells most is first."""
    for head_dim in (128, 64, 256, 96):
        for dq, deterministic in (("staged", False), ("reduced", False), ("staged", True)):
            yield BackwardVariant(
                "bf16", head_dim, head_dim, mask="causal", dq=dq, deterministic=deterministic
            )


class Run:
    """One choice on the tensors of one case, ready to be launched."""

    def __init__(
        self, variant: BackwardVariant, case: Case, *, device: str = "cuda", seed: int = 0
    ) -> None:
        self.call = inputs(case, device, torch.bfloat16, seed=seed)
        q, k, v = (x.detach() for x in (self.call.q, self.call.k, self.call.v))
        out, lse = flash8.flash_attn_func(q, k, v, causal=case.causal, return_attn_probs=True)
        generator = torch.Generator(device=device).manual_seed(seed + 1)
        self.dout = torch.randn(q.shape, generator=generator, device=device, dtype=q.dtype)
        self.gradients = [torch.empty_like(x) for x in (q, k, v)]
        given = hopper.Given(self.dout, None, q, k, v, out, lse)
        options = Options(causal=case.causal, window_right=0 if case.causal else -1)
        self._planned = hopper.plan(given, None, options, *self.gradients, variant)

    def __call__(self) -> None:
        hopper.launch(self._planned, streams.current_stream(self.dout))

    def error(self) -> float:
        """The largest of dQ, dK and dV."""
        self()
        expected = reference_gradients(self.call, self.dout)
        pairs = list(zip(self.gradients, expected, strict=True))
        return max(((x.float() - y).norm() / y.norm()).item() for x, y in pairs)


def cases(variant: BackwardVariant) -> Iterator[Case]:
    heads = _HIDDEN // variant.head_dim
    for seqlen in _LENGTHS:
        shape = (_TOKENS // seqlen, seqlen, heads, heads, variant.head_dim)
        yield dense("backward choices", *shape, variant.mask == "causal")


def measure(variant: BackwardVariant) -> Iterator[dict[str, Any]]:
    """A row per case; what is wrong is not timed."""
    from gpu_timing import time_call

    for case in cases(variant):
        row: dict[str, Any] = {"choice": variant.name, **asdict(case)}
        row["error"] = Run(variant, case.checked(), seed=1).error()
        if row["error"] <= TOLERANCE:
            row |= time_call(Run(variant, case)).as_dict()
            flops = case.flops(backward=True) - case.flops(backward=False)
            row["tflops"] = flops / row["median_ms"] * 1e-9
        yield row


def main() -> None:
    if not torch.cuda.is_available():
        print("bench_backward_choices: torch sees no CUDA device; nothing is measured here")
        return
    os.environ.setdefault("FLASH8_KERNELS", "on")
    rows: list[dict[str, Any]] = []
    results = {"environment": environment.describe(), "rows": rows}
    for variant in while_there_is_time(choices()):
        print(variant.name, flush=True)
        rows += measure(variant)
        write_json(RESULTS / "backward_choices.json", results)
    (RESULTS / "backward_choices.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

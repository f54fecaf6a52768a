"""The forward kernel's compile-time choices side by side, which only a GPU can decide between.

Every choice runs the same calls, dense and causal at head_dim 128 and 256: how V comes, what has a
descale, how many exponentials are polynomials (at head_dim 64 too, in bf16, where they take as long
as the products), whether two CTAs share loads. Each is compared
with the reference first. Writes bench/results/choices.json and choices.md; without a GPU it says
so. What wins belongs in hopper/forward/config.cuh and python/flash8/backends/heuristics.py.
"""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import environment
from attention_cases import Case, dense, inputs, reference
from flash8 import _native, fp8
from flash8.backends.hopper import forward as hopper
from flash8.backends.hopper import streams
from flash8.backends.hopper.variants import ForwardVariant
from flash8.call.options import Options
from flash8.call.unwrap import unwrap
from flash8.compiler import Unit, kernel_image
from partial import while_there_is_time, write_json

RESULTS = Path(__file__).resolve().parent / "results"
_HIDDEN, _TOKENS = 2048, 16384
_COMPILERS = 8  # at a time


@dataclass(frozen=True)
class Choice:
    """A variant, and the -D options that no variant has a field for."""

    variant: ForwardVariant
    polynomial_every: int = 0

    @property
    def name(self) -> str:
        every = self.polynomial_every
        return self.variant.name + (f", polynomial 1 in {every}" if every else "")

    @property
    def tolerance(self) -> float:
        return 0.1 if self.variant.dtype == "e4m3" else 0.02

    def unit(self) -> Unit:
        """The variant's own where the choice adds nothing to it."""
        unit, every = self.variant.unit(), self.polynomial_every
        if every == 0:
            return unit
        defines = (*unit.defines, ("FLASH8_POLYNOMIAL_EVERY", str(every)))
        return replace(unit, defines=defines, name=f"{unit.name}_polynomial{every}")


def choices() -> Iterator[Choice]:
    """All of them are for dense calls with one KV head per query head."""
    masks = ("none", "causal")
    for mask, every in itertools.product(masks, (0, 16, 8, 4)):
        yield Choice(ForwardVariant("bf16", 64, 64, mask=mask), every)
    for head_dim, mask in itertools.product((128, 256), masks):
        yield Choice(ForwardVariant("bf16", head_dim, head_dim, mask=mask))
        for scales, v_colmajor in itertools.product(("head", "block"), (False, True)):
            variant = ForwardVariant(
                "e4m3", head_dim, head_dim, mask=mask, scales=scales, v_colmajor=v_colmajor
            )
            for every in (0, 8, 4) if head_dim == 128 else (0,):
                yield Choice(variant, every)
            if mask == "none":
                yield Choice(replace(variant, cluster=True))
        if mask == "none":
            yield Choice(ForwardVariant("bf16", head_dim, head_dim, cluster=True))


class Run:
    """One choice on the tensors of one case, ready to be launched."""

    def __init__(
        self,
        choice: Choice,
        kernel: _native.Kernel,
        case: Case,
        *,
        device: str = "cuda",
        seed: int = 0,
    ) -> None:
        self.call = inputs(case, device, torch.bfloat16, seed=seed)
        q, k, v = self._operands(choice)
        given = {"q": q, "k": k, "v": v, "causal": case.causal}
        given |= unwrap(given)
        query, key, value = given["q"], given["k"], given["v"]
        options = Options.of(given)._replace(window_right=0 if case.causal else -1)
        self.out = torch.empty_like(self.call.q)
        rows = (*self.out.shape[:1], case.heads, case.seqlen_q)
        self._lse = self.out.new_empty(rows, dtype=torch.float32)
        planned = hopper.plan(query, key, value, None, options, self.out, self._lse)
        self._planned = planned._replace(kernel=kernel)
        self._tensors = (query, key, value)  # which the plan points to

    def _operands(self, choice: Choice) -> tuple[Any, Any, Any]:
        variant, tensors = choice.variant, (self.call.q, self.call.k, self.call.v)
        if variant.dtype != "e4m3":
            return tensors
        q, k = (fp8.quantize(x, variant.scales) for x in tensors[:2])
        return q, k, fp8.quantize(tensors[2], variant.scales, v_colmajor=variant.v_colmajor)

    def __call__(self) -> Tensor:
        kernel, device, call, dynamic_schedule, _ = self._planned
        stream = streams.current_stream(self.out)
        if dynamic_schedule:
            call.scheduler.tile_count = streams.get_tile_count(self.out.device, stream).data_ptr()
        _native.launch_forward(kernel, device, stream, call, 0)
        return self.out

    def error(self) -> float:
        expected = reference(self.call)
        return ((self().float() - expected).norm() / expected.norm()).item()


def cases(choice: Choice) -> Iterator[Case]:
    head_dim, causal = choice.variant.head_dim, choice.variant.mask == "causal"
    heads = _HIDDEN // head_dim
    for seqlen in (2048, 8192, 16384):
        yield dense("choices", _TOKENS // seqlen, seqlen, heads, heads, head_dim, causal)


def measure(choice: Choice, kernel: _native.Kernel) -> Iterator[dict[str, Any]]:
    """A row per case; what is wrong is not timed."""
    from gpu_timing import time_call

    for case in cases(choice):
        row: dict[str, Any] = {"choice": choice.name, **asdict(case)}
        row["error"] = Run(choice, kernel, case.checked(), seed=1).error()
        if row["error"] <= choice.tolerance:
            row |= time_call(Run(choice, kernel, case)).as_dict()
            row["tflops"] = case.flops(backward=False) / row["median_ms"] * 1e-9
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """TFLOP/s by choice and sequence length, causal and not apart by the kernel's name."""
    lengths = sorted({row["seqlen_q"] for row in rows})
    lines = [
        "| kernel | " + " | ".join(map(str, lengths)) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for name in dict.fromkeys(row["choice"] for row in rows):
        found = {row["seqlen_q"]: row for row in rows if row["choice"] == name}
        cells = [_cell(found[n]) for n in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    return f"{row['tflops']:.0f}" if "tflops" in row else f"wrong: {row['error']:.2g}"


def main() -> None:
    if not torch.cuda.is_available():
        print("bench_choices: torch sees no CUDA device; the choices are not measured here")
        return
    os.environ.setdefault("FLASH8_KERNELS", "on")
    driver, listed = _native.Driver.process(), list(choices())
    with ThreadPoolExecutor(_COMPILERS) as compilers:
        images = list(compilers.map(lambda choice: kernel_image(choice.unit(), "cubin"), listed))
    rows: list[dict[str, Any]] = []
    results = {"environment": environment.describe(), "rows": rows}
    work = enumerate(zip(listed, images, strict=True), 1)
    for number, (choice, image) in while_there_is_time(work):
        print(f"[{number}/{len(listed)}] {choice.name}", flush=True)
        rows += measure(choice, _native.Library(driver, image).kernel())
        write_json(RESULTS / "choices.json", results)
    (RESULTS / "choices.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

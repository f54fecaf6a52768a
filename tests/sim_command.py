"""`flash8 sim`: a forward kernel on the simulated device, checked, and its timeline as a picture.

The command line loads this file from the folder that `--simulator` or FLASH8_SIMULATOR names, or
from a checkout's tests/: the package itself knows no simulator.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flash8
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from flash8.compiler import CompileError, CompilerNotFoundError, MissingVariantError

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest

from flash8_sim import timeline
from simulated_device import SimulatedDevice

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
_BLOCK = 128  # rows that share a descale of the granularity "block"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flash8 sim",
        description="Run a forward kernel on the simulated device under its checks, compare O with "
        "the CPU backend, and draw what producer, consumers and tensor cores did. Times are "
        "logical, no speed.",
    )
    parser.add_argument("variant", choices=[variant.name for variant in SHIPPED], metavar="VARIANT")
    parser.add_argument("--seqlen-q", type=int, default=256, metavar="N")
    parser.add_argument("--seqlen-k", type=int, default=512, metavar="N")
    parser.add_argument("--heads", type=int, default=1, metavar="N")
    parser.add_argument("--ctas", type=int, default=1, metavar="N", help="multiprocessors")
    parser.add_argument("--cta", type=int, default=0, metavar="N", help="the CTA to draw")
    parser.add_argument(
        "--seed", type=int, default=0, help="0: by logical time; others: adversarial schedules"
    )
    parser.add_argument("--output", type=Path, default=Path("timeline.png"), metavar="FILE.png")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE.json", help="the events, for Chrome's trace viewer"
    )
    parser.epilog = "variants: " + ", ".join(variant.name for variant in SHIPPED)
    return parser


def _draw(variant: ForwardVariant, options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of flash_attn_func that this variant serves, with values that repeat."""
    generator = torch.Generator().manual_seed(options.seed)

    def tensor(rows: int, head_dim: int) -> Tensor:
        x = torch.randn(1, rows, options.heads, head_dim, generator=generator)
        return x.to(_DTYPES[variant.dtype])

    call: dict[str, Any] = {
        "q": tensor(options.seqlen_q, variant.head_dim),
        "k": tensor(options.seqlen_k, variant.head_dim),
        "v": tensor(options.seqlen_k, variant.head_dim_v),
        "causal": variant.mask == "causal",
        "softcap": 30.0 if variant.softcap else 0.0,
    }
    if variant.mask == "local":
        call["window_size"] = (options.seqlen_k // 4, 0)
    if variant.scales != "none":
        for name in ("q", "k", "v"):
            shape = [1, options.heads]
            if variant.scales == "block":
                shape.append(-(-call[name].shape[1] // _BLOCK))
            call[f"{name}_descale"] = 0.5 + torch.rand(shape, generator=generator)
    return call


def _run(options: argparse.Namespace) -> None:
    variant = next(v for v in SHIPPED if v.name == options.variant)
    call = _draw(variant, options)
    device = SimulatedDevice()
    with device.serving_cpu_tensors(pytest.MonkeyPatch(), seed=options.seed):
        device.configure(
            seed=options.seed, strict_global=False, timeline=True, multiprocessors=options.ctas
        )
        try:
            out = flash8.flash_attn_func(**call)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{device.last_error()}") from error
        report, trace = device.report(), device.timeline()
    if report.get("kernel") != "flash8_forward":
        raise RuntimeError(f"the Hopper backend refuses calls of {variant.name}")
    error = (out.double() - flash8.flash_attn_func(**call).double()).abs().max()
    rows = timeline.lanes(trace, cta=options.cta)
    title = (
        f"{variant.name}: seqlen_q {options.seqlen_q}, seqlen_k {options.seqlen_k}, "
        f"heads {options.heads}, CTA {options.cta} of {options.ctas}, seed {options.seed}"
    )
    timeline.draw(rows, options.output, title=title)
    print(f"{title}\nno finding; |O - O of the CPU backend| is at most {error:.2e}")
    for name, counts in report["statistics"]["by_role"].items():
        print(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    print(f"picture: {options.output}")
    if options.trace:
        options.trace.write_text(json.dumps(trace))
        print(f"trace: {options.trace}")


def main(arguments: Sequence[str]) -> int:
    """Run `flash8 sim` on its arguments; 1 when there is a finding or something is missing."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (
        CompileError,
        CompilerNotFoundError,
        MissingVariantError,
        ImportError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:
        print(f"flash8 sim: {error}", file=sys.stderr)
        return 1
    return 0

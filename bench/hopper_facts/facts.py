"""Settles on a Hopper GPU what flash8's numerics assume; writes results/hopper_facts.json.

1. FP8 WGMMA accumulates with 13 mantissa bits, toward zero; BF16 WGMMA with 25.
2. cvt.rn.satfinite.e4m3x2.f32 saturates at 448, keeps NaN, and rounds to nearest even.
3. The rate of ex2.approx.f16x2 against ex2.approx.ftz.f32.

usage: python bench/hopper_facts/facts.py [--cubin FILE] [--quick]
Without --cubin, nvcc compiles facts.cu; --quick runs each kernel once, for compute-sanitizer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accumulation import BF16_BITS, FP8_BITS, step
from driver import Module
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import environment  # noqa: E402  (bench/ is a folder of scripts, not a package)

_PROBLEMS = 24
_M, _N, _THREADS = 64, 8, 128
_ITERATIONS, _CHAINS = 4096, 8


def compile_cubin() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "facts.cubin"
        architecture = "-gencode=arch=compute_90a,code=sm_90a"
        source = str(HERE / "facts.cu")
        command = ["nvcc", "-cubin", architecture, "-O3", "-std=c++17", source, "-o", str(target)]
        subprocess.run(command, check=True)
        return target.read_bytes()


def operands(dtype: torch.dtype, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random a, b, c whose magnitudes span 2^-spread to 2^spread, so that alignment matters."""
    generator = torch.Generator().manual_seed(seed)
    k = 32 if dtype == torch.float8_e4m3fn else 16

    def draw(*shape: int) -> Tensor:
        scale = 2.0 ** (torch.rand(shape, generator=generator) * 2 * spread - spread)
        return torch.randn(shape, generator=generator) * scale

    a, b = draw(_PROBLEMS, _M, k).to(dtype), draw(_PROBLEMS, _N, k).to(dtype)
    return a, b, draw(_PROBLEMS, _M, _N)


def check_accumulation(module: Module, name: str, dtype: torch.dtype, bits: int) -> dict[str, Any]:
    mismatches, total = 0, 0
    examples: list[dict[str, float]] = []
    for seed, spread in enumerate((0.0, 2.0, 4.0, 8.0)):
        a, b, c = operands(dtype, spread if dtype != torch.float8_e4m3fn else spread / 2, seed)
        d = torch.full_like(c, float("nan")).cuda()
        bytes_a, bytes_b = (x.view(torch.uint8).contiguous().cuda() for x in (a, b))
        module.launch(name, _PROBLEMS, _THREADS, bytes_a, bytes_b, c.cuda(), d)
        for problem in range(_PROBLEMS):
            expected = step(a[problem].double(), b[problem].double(), c[problem].double(), bits)
            actual = d[problem].double().cpu()
            wrong = actual != expected
            mismatches += int(wrong.sum())
            total += wrong.numel()
            for m, n in wrong.nonzero()[:1].tolist():
                pair = {"expected": expected[m, n].item(), "actual": actual[m, n].item()}
                examples.append({"spread": spread, **pair})
    return {"bits": bits, "compared": total, "mismatches": mismatches, "examples": examples[:5]}


def check_truncation(module: Module, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A = B = 0 and a C of 24 significant bits: how many of them come back?"""
    k = 32 if dtype == torch.float8_e4m3fn else 16
    a = torch.zeros(1, _M, k).to(dtype).view(torch.uint8).cuda()
    b = torch.zeros(1, _N, k).to(dtype).view(torch.uint8).cuda()
    c = torch.full((1, _M, _N), 2.0 - 2.0**-23, device="cuda")
    d = torch.empty_like(c)
    module.launch(name, 1, _THREADS, a, b, c, d)
    bits = (d.view(torch.int32)[0, 0, 0].item()) & 0x7FFFFF
    trailing = 23 if bits == 0 else (bits & -bits).bit_length() - 1
    return {"returned": d[0, 0, 0].item(), "mantissa_bits_kept": 23 - trailing}


def check_conversion(module: Module) -> dict[str, Any]:
    """Every float32 whose low 16 bits are 0, 1, 0x8000 or 0xFFFF, against a NumPy-free model."""
    high = torch.arange(65536, dtype=torch.int64) << 16
    patterns = torch.cat([high | low for low in (0, 1, 0x8000, 0xFFFF)])
    values = patterns.to(torch.int32).view(torch.float32)
    actual = torch.empty(values.numel(), dtype=torch.uint8, device="cuda")
    blocks = -(-values.numel() // _THREADS)
    module.launch("convert_e4m3", blocks, _THREADS, values.cuda(), actual, values.numel())
    got = actual.cpu()
    nan = values.isnan()
    expected = values.nan_to_num(0.0, posinf=448.0, neginf=-448.0).clamp(-448.0, 448.0)
    expected_bytes = expected.to(torch.float8_e4m3fn).view(torch.uint8)
    differ = (got != expected_bytes) & ~nan
    return {
        "compared": values.numel(),
        "mismatches": int(differ.sum()),
        "nan_kept": bool(((got[nan] & 0x7F) == 0x7F).all()),
        "plus_infinity": int(got[values == float("inf")][0]),
        "minus_infinity": int(got[values == float("-inf")][0]),
    }


def rates(module: Module) -> dict[str, Any]:
    results = {}
    threads = 1024
    for name, per_instruction in (("ex2_f32_rate", 1), ("ex2_f16x2_rate", 2)):
        sink = torch.empty(threads, device="cuda")
        cycles = torch.empty(1, dtype=torch.int64, device="cuda")
        for _ in range(3):
            module.launch(name, 1, threads, sink, cycles)
        operations = threads * _ITERATIONS * _CHAINS * per_instruction
        results[name] = {"results_per_cycle_per_sm": operations / cycles.item()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cubin", type=Path, help="facts.cu compiled for sm_90a")
    parser.add_argument("--quick", action="store_true", help="run each kernel once, write nothing")
    arguments = parser.parse_args()
    cubin = arguments.cubin
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("hopper_facts: this needs a Hopper GPU, and torch sees none")
        return
    module = Module(cubin.read_bytes() if cubin else compile_cubin())
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    if arguments.quick:
        check_truncation(module, "fp8_step", fp8)
        check_truncation(module, "bf16_step", bf16)
        check_conversion(module)
        return
    results = {
        "environment": environment.describe(),
        "fp8_truncation": check_truncation(module, "fp8_step", fp8),
        "bf16_truncation": check_truncation(module, "bf16_step", bf16),
        "fp8_accumulation": check_accumulation(module, "fp8_step", fp8, FP8_BITS),
        "bf16_accumulation": check_accumulation(module, "bf16_step", bf16, BF16_BITS),
        "e4m3_conversion": check_conversion(module),
        "exponentials": rates(module),
    }
    path = HERE.parent / "results" / "hopper_facts.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(
        json.dumps({key: value for key, value in results.items() if key != "environment"}, indent=2)
    )


if __name__ == "__main__":
    main()

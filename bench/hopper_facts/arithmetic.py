"""How the hardware computes: WGMMA's accumulation, and the conversion to e4m3."""

from typing import Any

import numpy as np

from . import formats
from .accumulation import BF16_BITS, FP8_BITS, step
from .driver import Device, Module

_M, _N, _ROW_BYTES, _THREADS = 64, 8, 32, 128
_KINDS = {
    "fp8": (formats.e4m3_codes, formats.e4m3_values, 32, FP8_BITS),
    "bf16": (formats.bf16_codes, formats.bf16_values, 16, BF16_BITS),
}


def run(device: Device, module: Module, *, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in _KINDS:
        found[f"{kind}_truncation"] = _truncation(device, module, kind)
        found[f"{kind}_accumulation"] = _accumulation(device, module, kind, 1 if quick else 24)
    return found | {"e4m3_conversion": _conversion(device, module)}


def _truncation(device: Device, module: Module, kind: str) -> dict[str, Any]:
    """A = B = 0 and a C of 24 significant bits: how many behind the leading one come back?"""
    zeros = [device.zeros(rows * _ROW_BYTES, np.uint8) for rows in (_M, _N)]
    given = np.full((_M, _N), 2.0 - 2.0**-23, np.float32)
    d = device.buffer(np.full_like(given, np.nan))
    module.launch(f"{kind}_step", 1, _THREADS, *zeros, device.buffer(given), d)
    returned = d.read()
    bits = int(returned.view(np.int32)[0, 0]) & 0x7FFFFF
    trailing = 23 if bits == 0 else (bits & -bits).bit_length() - 1
    expected = min(_KINDS[kind][3], 23)
    kept = 23 - trailing
    return {
        "returned": float(returned[0, 0]),
        "mantissa_bits_kept": kept,
        "as_expected": kept == expected and bool((returned == returned[0, 0]).all()),
    }


def _accumulation(device: Device, module: Module, kind: str, problems: int) -> dict[str, Any]:
    """Random operands, whose magnitudes span up to 2^-8 to 2^8, against the model, bit by bit."""
    encode, decode, depth, bits = _KINDS[kind]
    mismatches, total = 0, 0
    examples: list[dict[str, float]] = []
    for seed, spread in enumerate((0.0, 2.0, 4.0, 8.0)):
        spread *= 0.5 if kind == "fp8" else 1.0
        generator = np.random.default_rng(seed)
        a, b, c = (
            generator.standard_normal(shape) * 2.0 ** generator.uniform(-spread, spread, shape)
            for shape in ((problems, _M, depth), (problems, _N, depth), (problems, _M, _N))
        )
        codes, start = [encode(x) for x in (a, b)], c.astype(np.float32)
        d = device.buffer(np.full_like(start, np.nan))
        given = [device.buffer(x) for x in (*codes, start)]
        module.launch(f"{kind}_step", problems, _THREADS, *given, d)
        actual = d.read().astype(np.float64)
        for i in range(problems):
            want = step(*(decode(x[i]) for x in codes), start[i].astype(np.float64), bits)
            wrong = np.argwhere(actual[i] != want)
            mismatches, total = mismatches + len(wrong), total + want.size
            for m, n in wrong[:1]:
                values = {"expected": float(want[m, n]), "actual": float(actual[i, m, n])}
                examples.append({"spread": spread, **values})
    return {
        "bits": bits,
        "compared": total,
        "mismatches": mismatches,
        "as_expected": mismatches == 0,
        "examples": examples[:5],
    }


def _conversion(device: Device, module: Module) -> dict[str, Any]:
    """cvt.rn.satfinite.e4m3x2.f32 of every fp32 whose low 16 bits are 0, 1, 0x8000 or 0xFFFF."""
    high = np.arange(65536, dtype=np.uint32) << 16
    values = np.concatenate([high | low for low in (0, 1, 0x8000, 0xFFFF)]).view(np.float32)
    codes = device.zeros(values.size, np.uint8)
    blocks = -(-values.size // _THREADS)
    module.launch("convert_e4m3", blocks, _THREADS, device.buffer(values), codes, values.size)
    got, nan = codes.read(), np.isnan(values)
    mismatches = int(((got != formats.e4m3_codes(values)) & ~nan).sum())
    nan_kept = bool(((got[nan] & 0x7F) == 0x7F).all())
    return {
        "compared": values.size,
        "mismatches": mismatches,
        "nan_kept": nan_kept,
        "plus_infinity": int(got[values == np.inf][0]),
        "minus_infinity": int(got[values == -np.inf][0]),
        "as_expected": mismatches == 0 and nan_kept,
    }

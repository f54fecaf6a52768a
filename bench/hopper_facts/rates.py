"""What instructions cost on one multiprocessor, or on all of them at once.

Every kernel's results are compared with what they must be: a rate of a wrong program is no rate.
"""

from typing import Any

import numpy as np

from . import formats
from .driver import Device, Module

_CHAINS = 8


def _spread(cycles: np.ndarray) -> dict[str, float]:
    return {"cycles": float(np.median(cycles)), "cycles_max": float(cycles.max())}


# ------------------------------------------------------------------------- arithmetic (rates.cu)


def arithmetic(device: Device, module: Module, *, quick: bool) -> dict[str, Any]:
    """Results a cycle and SM of ex2 in fp32 and in fp16 pairs, and of e4m3 pairs to fp16."""
    iterations, threads = (4, 64) if quick else (2048, 1024)
    first = np.arange(threads)[:, None] + np.arange(_CHAINS)
    found = {}
    for name, results in (("ex2_f32", 1), ("ex2_f16x2", 2), ("unpack_e4m3", 2)):
        sink, cycles = device.zeros((threads, _CHAINS), np.uint32), device.zeros(1, np.int64)
        right = []
        for n in (1, iterations):  # e4m3 turns into zeros soon: one step shows more
            module.launch(name, 1, threads, sink, cycles, n)
            right.append(_MODELS[name](first, sink.read(), n))
        count = threads * _CHAINS * iterations
        taken = int(cycles.read()[0])
        found[name] = {
            "cycles": taken,
            "instructions_per_cycle": count / 32 / taken,
            "results_per_cycle": count * results / taken,
            "as_expected": all(right),
        }
    return found


def _is_ex2_f32(first: np.ndarray, got: np.ndarray, iterations: int) -> bool:
    x = -1.0 - 0.001 * first
    for _ in range(min(iterations, 64)):  # x = 2^-x converges
        x = 2.0**-x
    return bool(np.allclose(got.view(np.float32), x, rtol=1e-5))


def _is_ex2_f16x2(first: np.ndarray, got: np.ndarray, iterations: int) -> bool:
    codes = np.stack([0x3800 + (first & 127), 0x3C00 + (first & 127)], -1)
    x = formats.fp16_values(codes)
    for _ in range(min(iterations, 64)):
        x = 2.0**-x
    values = formats.fp16_values(np.stack([got & 0xFFFF, got >> 16], -1))
    return bool(np.allclose(values, x, rtol=3e-3))


def unpacked(registers: np.ndarray, times: int) -> np.ndarray:
    """The low half's two e4m3 values as fp16, over and over."""
    for _ in range(times):
        low, high = registers & 0xFF, (registers >> 8) & 0xFF
        if times > 1 and not (registers & 0xFFFF).any():
            return np.zeros_like(registers)
        halves = [formats.fp16_codes(formats.e4m3_values(x)).astype(np.uint32) for x in (low, high)]
        registers = halves[0] | (halves[1] << 16)
    return registers


def _is_unpacked(first: np.ndarray, got: np.ndarray, iterations: int) -> bool:
    return np.array_equal(got, unpacked((0x3830 + first % 64).astype(np.uint32), iterations))


_MODELS = {"ex2_f32": _is_ex2_f32, "ex2_f16x2": _is_ex2_f16x2, "unpack_e4m3": _is_unpacked}


# ---------------------------------------------------------------------------- mma.sync (mma.cu)

_MMA_CHAINS = 4


def mma(device: Device, module: Module, *, quick: bool) -> dict[str, Any]:
    """HMMA.16816 alone, with four conversions from e4m3 for each, and those alone."""
    iterations, threads = (4, 64) if quick else (2048, 512)
    found = {}
    for name in ("mma_alone", "mma_unpacked", "unpack_alone"):
        a = device.zeros((threads, _MMA_CHAINS, 4), np.uint32)
        d = device.buffer(np.full((threads, _MMA_CHAINS, 4), np.nan, np.float32))
        cycles = device.zeros(1, np.int64)
        right = []
        for n in (1, iterations):
            module.launch(name, 1, threads, a, d, cycles, n)
            registers, sums = _mma_expected(name, threads, n)
            right.append(np.array_equal(a.read(), registers))
            right.append(bool(np.allclose(d.read(), sums, rtol=1e-3, atol=1e-2)))
        taken = int(cycles.read()[0])
        groups = threads // 32 * _MMA_CHAINS * iterations
        found[name] = {
            "cycles": taken,
            "cycles_per_product" if name != "unpack_alone" else "cycles_per_4_unpacks": taken
            / groups,
            "as_expected": all(right),
        }
    return found


def _mma_expected(name: str, threads: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """A's registers in the end, and D: the sums over a row of A, since B is ones."""
    first = np.arange(threads)[:, None] + np.arange(_MMA_CHAINS * 4)
    registers = (0x3830 + first % 64).astype(np.uint32).reshape(threads, _MMA_CHAINS, 4)
    sums = np.zeros((threads, _MMA_CHAINS, 4))
    for n in range(iterations):
        if name != "mma_alone":
            registers = unpacked(registers, 1)
        if name == "unpack_alone":
            if not registers.any():
                break
            continue
        pairs = np.stack([registers & 0xFFFF, registers >> 16], -1)
        by_register = formats.fp16_values(pairs).sum(-1)  # (threads, chains, 4)
        rows = np.stack([by_register[..., i] + by_register[..., i + 2] for i in (0, 1)], -1)
        quads = rows.reshape(-1, 4, _MMA_CHAINS, 2).sum(1, keepdims=True)
        rows = np.broadcast_to(quads, (threads // 4, 4, _MMA_CHAINS, 2)).reshape(rows.shape)
        step = rows.repeat(2, axis=-1)  # d0, d1: row lane / 4; d2, d3: eight rows below
        if name == "mma_alone":
            return registers, sums + step * iterations
        sums = sums + step
        if n > 8 and not step.any():
            break
    return registers, sums


# ------------------------------------------------------------------------------- wgmma (wgmma.cu)

_REPEATS, _SLICES, _WARPGROUPS = 8, 4, 2


def wgmma(device: Device, module: Module, *, quick: bool) -> dict[str, Any]:
    """Cycles of an m64nNk16 product per SM, on one SM and on all, alone and beside stores.

    "tensor_cycles" and "shared_cycles" are what 2048 multiply-adds and 128 bytes a cycle would
    allow: the larger one is what should be measured if an operand costs its bytes.
    """
    iterations = 1 if quick else 512
    cases = [
        (f"wgmma_n{n}_{where}", n, where, stores)
        for n, where in ((64, "shared"), (64, "registers"), (128, "shared"), (192, "shared"))
        for stores in ((0, 4) if quick else (0, 1, 4, 8))
        if not quick or stores == 0 or n == 64
    ]
    found: dict[str, Any] = {}
    for name, n, where, stores in cases:
        for blocks in (1,) if quick else (1, device.multiprocessors):
            key = f"{name}, {stores} stores, {'all SMs' if blocks > 1 else 'one SM'}"
            found[key] = _wgmma(device, module, name, n, where, stores, blocks, iterations)
    return found


def _wgmma(
    device: Device,
    module: Module,
    name: str,
    n: int,
    where: str,
    stores: int,
    blocks: int,
    iterations: int,
) -> dict[str, Any]:
    generator = np.random.default_rng(n)
    a, b = (generator.integers(-2, 3, shape).astype(np.float32) for shape in ((2, 64, 64), (n, 64)))
    given = [device.buffer(formats.bf16_codes(x)) for x in (a, b)]
    d = device.buffer(np.full((blocks, _WARPGROUPS, 64, n), np.nan, np.float32))
    cycles = device.zeros((blocks, 2), np.int64)
    for _ in range(2):
        module.launch(name, blocks, 384, *given, d, cycles, iterations, stores)
    products, storing = cycles.read().T
    each = _REPEATS * _SLICES * iterations
    want = _REPEATS * iterations * np.einsum("gmk,nk->gmn", a, b)
    taken = float(np.median(products)) / (each * _WARPGROUPS)
    stored = 128 * 16 * stores * _REPEATS * iterations
    operands = (64 + n if where == "shared" else n) * 32
    return {
        "cycles_per_product": taken,
        "tensor_cycles": 64 * n * 16 / 2048,
        "shared_cycles": (operands + stored / (each * _WARPGROUPS)) / 128,
        "products": _spread(products),
        "stores": {**_spread(storing), "bytes": stored},
        "as_expected": bool((d.read() == want).all()),
    }


# ---------------------------------------------------------------------- additions into L2 (l2.cu)

_TILE_BYTES = 64 * 128 * 4


def l2(device: Device, module: Module, *, quick: bool) -> dict[str, Any]:
    """Bytes a cycle and SM that reach L2 as fp32 additions, from one SM and from all."""
    iterations, most = (3, 4) if quick else (256, device.multiprocessors)
    found: dict[str, Any] = {}
    for name in ("bulk_reduce", "red_rows", "red_fragments"):
        for blocks in (most,) if quick else (1, most):
            tiles = max(2, blocks)
            for where, first, span in (("apart", 2, 2), ("over the same tiles", 1, tiles)):
                count = 2 * blocks if where == "apart" else tiles
                target = device.zeros((count, 64 * 128), np.float32)
                cycles = device.zeros(blocks, np.int64)
                arguments = (target, cycles, iterations, first, span, count)
                for _ in range(2):
                    module.launch(name, blocks, 256, *arguments)
                want = np.zeros(count)
                for block in range(blocks):
                    np.add.at(want, (block * first + np.arange(iterations) % span) % count, 2.0)
                taken = cycles.read()
                found[f"{name}, {blocks} SMs, {where}"] = {
                    "bytes_per_cycle_per_sm": _TILE_BYTES * iterations / float(np.median(taken)),
                    "slowest": _TILE_BYTES * iterations / float(taken.max()),
                    "as_expected": bool((target.read() == want[:, None]).all()),
                }
    return found

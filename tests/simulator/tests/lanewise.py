"""Runs one instruction over arrays: element i is computed by thread i."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import flash8_sim as S

_REGISTER = {1: ("b16", "u8"), 2: ("b16", "b16"), 4: ("b32", "b32"), 8: ("b64", "b64")}


def lanewise_ptx(instructions: str, in_bytes: Sequence[int], out_bytes: Sequence[int]) -> str:
    """A kernel that loads a0, a1, ... , runs `instructions`, and stores d0, d1, ..."""
    names = [f"in{i}" for i in range(len(in_bytes))] + [f"out{i}" for i in range(len(out_bytes))]
    lines = [
        ".reg .b32 thread, cta, %index; .reg .b64 %address, %base; .reg .pred p, q, r;",
        ".reg .b32 t<8>; .reg .b64 u<8>; .reg .b16 h<8>;",
        "mov.u32 thread, %tid.x; mov.u32 cta, %ctaid.x; mad.lo.u32 %index, cta, 32, thread;",
    ]
    for i, size in enumerate(in_bytes):
        register, memory = _REGISTER[size]
        lines.append(f".reg .{register} a{i}; ld.param.u64 %base, [in{i}];")
        lines.append(
            f"mad.wide.u32 %address, %index, {size}, %base; ld.global.{memory} a{i}, [%address];"
        )
    for i, size in enumerate(out_bytes):
        lines.append(f".reg .{_REGISTER[size][0]} d{i};")
    lines.append(instructions)
    for i, size in enumerate(out_bytes):
        lines.append(f"ld.param.u64 %base, [out{i}]; mad.wide.u32 %address, %index, {size}, %base;")
        lines.append(f"st.global.{_REGISTER[size][1]} [%address], d{i};")
    lines.append("ret;")
    return S.kernel("\n".join(lines), parameters=", ".join(f".param .u64 {n}" for n in names))


def lanewise(
    sim: S.Simulator, instructions: str, inputs: Sequence[np.ndarray], *outputs: type
) -> list[np.ndarray]:
    """Results of `instructions` for every element of the (equally long) inputs."""
    count = len(inputs[0]) if inputs else 32
    padded = (count + 31) // 32 * 32
    filled = [np.concatenate([x, np.zeros(padded - count, x.dtype)]) for x in inputs]
    out_types = [np.dtype(o) for o in outputs]
    ptx = lanewise_ptx(instructions, [x.itemsize for x in filled], [o.itemsize for o in out_types])
    module = sim.load(ptx)
    ins = [sim.buffer(x) for x in filled]
    outs = [sim.zeros(padded, o) for o in out_types]
    module.launch("k", *ins, *outs, grid=padded // 32)
    results = [o.read()[:count] for o in outs]
    for buffer in (*ins, *outs):
        buffer.free()
    module.unload()
    return results


def interesting_floats(count: int, seed: int = 0) -> np.ndarray:
    """Float32 of every kind: random bits, small and large, halfway cases of narrower formats."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    special = np.array(
        [
            0,
            -0.0,
            1,
            -1,
            np.inf,
            -np.inf,
            np.nan,
            448,
            464,
            463.99,
            465,
            57344,
            61440,
            65504,
            65520,
            1e-40,
            2**-9,
            2**-10,
            1.5 * 2**-9,
            2**-24,
            2**-25,
            2**-126,
            3.4e38,
        ],
        np.float32,
    )
    scaled = (rng.standard_normal(count) * 2.0 ** rng.integers(-30, 20, count)).astype(np.float32)
    return np.concatenate([special, bits.view(np.float32), scaled])

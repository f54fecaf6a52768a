# ruff: noqa: E501 - PTX text reads better unbroken
"""How fast the simulator itself is on one core: warp instructions, copies, and tile pairs of attention.

A tile pair is what one KV block of a head_dim 128 forward multiplies: S = Q K^T and O += P V, both
128 x 128 x 128. The least of several runs counts. It says how long tests take, nothing of a GPU.

usage: python -m flash8_sim.benchmark
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

import flash8_sim as S

ROUNDS = 5
TILE = 128
DESCRIPTOR = (1 << 62) | (64 << 32) | (1 << 16)  # 128-byte swizzle, eight rows every 1024 bytes
ACC = ", ".join(f"acc{i}" for i in range(TILE // 2))
OPERANDS = 2 * TILE * TILE * 2  # bytes: A and B of 16 bits

ALU = """
.reg .b32 i, a<8>; .reg .f32 f<8>; .reg .pred p;
mov.u32 i, 0; {start}
$LOOP: {work} add.u32 i, i, 1; setp.lt.u32 p, i, {count}; @p bra $LOOP;
ret;
"""


def least_seconds(run: Callable[[], None]) -> float:
    """The least of ROUNDS runs, in seconds of this thread on a core."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        run()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def instructions_per_second(sim: S.Simulator) -> float:
    """Warp instructions a second of integer and fp32 arithmetic, with all checks."""
    start = " ".join(f"mov.u32 a{j}, {j}; mov.f32 f{j}, 0f3F800000;" for j in range(8))
    work = " ".join(
        f"mad.lo.u32 a{j}, a{j}, 3, i; fma.rn.f32 f{j}, f{j}, f{j}, f{j};" for j in range(8)
    )
    module = sim.load(S.kernel(ALU.format(start=start, work=work, count=2000)))
    seconds = least_seconds(lambda: module.launch("k", block=128))
    return float(sim.report()["statistics"]["warp_instructions"]) / seconds


COPY = """
.reg .b32 i, t, c, a, b, e, f; .reg .b64 g, h, x; .reg .pred p;
ld.param.u64 g, [from]; ld.param.u64 h, [to]; mov.u32 t, %tid.x; mov.u32 c, %ctaid.x; mad.lo.u32 t, c, 128, t;
mov.u32 i, t;
$LOOP: mul.wide.u32 x, i, 16; add.s64 x, x, g; ld.global.v4.u32 {a, b, e, f}, [x];
mul.wide.u32 x, i, 16; add.s64 x, x, h; st.global.v4.u32 [x], {a, b, e, f};
add.u32 i, i, 512; setp.lt.u32 p, i, {count}; @p bra $LOOP;
ret;
"""


def copied_bytes_per_second(sim: S.Simulator) -> float:
    """Bytes that four CTAs load from global memory and store there, 16 a lane, with all checks."""
    data = np.zeros(1 << 20, np.uint8)
    source, target = sim.buffer(data), sim.buffer(data)
    text = COPY.replace("{count}", str(data.nbytes // 16))
    module = sim.load(S.kernel(text, parameters=".param .u64 from, .param .u64 to"))
    seconds = least_seconds(lambda: module.launch("k", source, target, grid=4, block=128))
    return data.nbytes / seconds


def wgmma(eight_bit: bool, pairs: int) -> str:
    """A kernel of two warpgroups that multiplies `pairs` tile pairs from shared memory."""
    k, types, tail = (32, "e4m3.e4m3", "1, 1") if eight_bit else (16, "bf16.bf16", "1, 1, 0, 0")
    panel = 128 * TILE  # 128 bytes along K of 128 rows
    products = []
    for _ in range(2):
        for step in range(TILE // k):
            offset = step * 32 // 128 * panel // 16 + step * 32 % 128 // 16
            products.append(
                f"add.s64 x, da, {offset}; add.s64 y, db, {offset}; "
                f"wgmma.mma_async.sync.aligned.m64n{TILE}k{k}.f32.{types} {{{ACC}}}, x, y, {'one' if step else 'zero'}, {tail};"
            )
    body = f"""
    .reg .b32 tid, s, t, i, v; .reg .b64 da, db, x, y, g; .reg .pred p, zero, one; .reg .f32 acc<{TILE // 2}>;
    mov.u32 tid, %tid.x; mov.u32 s, mem; ld.param.u64 g, [from]; setp.eq.u32 zero, tid, -1; setp.ne.u32 one, tid, -1;
    mov.u32 i, tid;
    $FILL: mul.wide.u32 x, i, 4; add.s64 x, x, g; ld.global.u32 v, [x]; shl.b32 t, i, 2; add.u32 t, t, s; st.shared.u32 [t], v;
    add.u32 i, i, 256; setp.lt.u32 p, i, {OPERANDS // 4}; @p bra $FILL;
    fence.proxy.async.shared::cta; bar.sync 0;
    shr.u32 t, tid, 7; mad.lo.u32 t, t, {64 * 128}, s; shr.u32 t, t, 4; cvt.u64.u32 da, t; or.b64 da, da, {DESCRIPTOR};
    add.u32 t, s, {OPERANDS // 2}; shr.u32 t, t, 4; cvt.u64.u32 db, t; or.b64 db, db, {DESCRIPTOR};
    mov.u32 i, 0;
    $LOOP: wgmma.fence.sync.aligned; {" ".join(products)} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    add.u32 i, i, 1; setp.lt.u32 p, i, {pairs}; @p bra $LOOP;
    ret;
    """
    module = ".extern .shared .align 1024 .b8 mem[];"
    return S.kernel(body, parameters=".param .u64 from", module=module)


def seconds_per_tile_pair(sim: S.Simulator, *, eight_bit: bool) -> float:
    """With Hopper's accumulation and all checks; operands are normally distributed."""
    values = np.random.default_rng(0).standard_normal(OPERANDS // 2).astype(np.float32)
    codes = (values.view(np.uint32) >> 16).astype(np.uint16)
    if eight_bit:  # 0x30 .. 0x3f are 0.25 to 1.9: magnitudes as a quantizer leaves them
        codes = ((codes & 0x8F8F) | 0x3030).astype(np.uint16)
    data = sim.buffer(codes)
    module, pairs = sim.load(wgmma(eight_bit, 9)), 8
    once = sim.load(wgmma(eight_bit, 1))
    many = least_seconds(lambda: module.launch("k", data, block=256, shared=OPERANDS))
    single = least_seconds(lambda: once.launch("k", data, block=256, shared=OPERANDS))
    return (many - single) / pairs


def main() -> None:
    sim = S.Simulator()
    print(
        f"warp instructions outside wgmma: {instructions_per_second(sim) / 1e6:.0f} million a second"
    )
    print(f"global memory: {copied_bytes_per_second(sim) / 1e6:.0f} MB a second copied")
    for name, eight_bit in (("bf16", False), ("e4m3", True)):
        milliseconds = 1e3 * seconds_per_tile_pair(sim, eight_bit=eight_bit)
        print(f"{name} tile pair of 128 x 128 x 128: {milliseconds:.2f} ms")


if __name__ == "__main__":
    main()

# ruff: noqa: E501 - PTX text reads better unbroken
"""A small pipeline in PTX, right as it stands, with tags on the lines that tests replace.

A TMA load fills a slot, a warpgroup multiplies it with wgmma, writes the result through shared
memory and stores it by TMA.
"""

from __future__ import annotations

import numpy as np

import flash8_sim as S

SLOTS, TILES, N = 2, 5, 64
BYTES = 2 * 64 * 128  # a tile of A and one of B, 64 x 64 of 16 bits each
ACC = ", ".join(f"acc{i}" for i in range(N // 2))
PARAMETERS = ".param .align 64 .b8 map_a[128], .param .align 64 .b8 map_b[128], .param .align 64 .b8 map_c[128], .param .u64 scratch"
MODULE = ".extern .shared .align 1024 .b8 mem[];"
FULL, EMPTY, OUT = SLOTS * BYTES, SLOTS * BYTES + 64, SLOTS * BYTES + 1024
SHARED = OUT + 64 * N * 4
DESCRIPTOR = (1 << 62) | (64 << 32) | (1 << 16)

# The lines that a test replaces, or expects a finding to name, carry a tag.
BODY = f"""
.reg .b32 tid, wid, s, i, slot, a, full, empty, par, x, y, z, t<8>; .reg .b64 da, db, ma, mb, mc, g, q;
.reg .pred p, first, zero, one, lead, done; .reg .f32 acc<{N // 2}>; .reg .f32 f;
mov.u32 tid, %tid.x; shr.u32 wid, tid, 5; mov.u32 s, mem;
setp.ne.u32 p, tid, 0; @p bra $READY;
mbarrier.init.shared::cta.b64 [mem + {FULL}], 1; //tag init_full
mbarrier.init.shared::cta.b64 [mem + {FULL + 8}], 1;
mbarrier.init.shared::cta.b64 [mem + {EMPTY}], 1; //tag empty_count
mbarrier.init.shared::cta.b64 [mem + {EMPTY + 8}], 1;
fence.mbarrier_init.release.cluster; //tag init_fence
$READY:
bar.sync 0; //tag ready
setp.lt.u32 p, wid, 4; @p bra $CONSUMER;
setp.ne.u32 p, tid, 128; @p bra $END;
mov.b64 ma, map_a; cvta.param.u64 ma, ma; mov.b64 mb, map_b; cvta.param.u64 mb, mb;
mov.u32 i, 0;
$LOAD:
and.b32 slot, i, 1; mad.lo.u32 a, slot, {BYTES}, s; mad.lo.u32 full, slot, 8, s; add.u32 empty, full, {EMPTY}; add.u32 full, full, {FULL};
shr.u32 par, i, 1; and.b32 par, par, 1; xor.b32 par, par, 1;
{{ .reg .pred ok; WAIT: mbarrier.try_wait.parity.shared::cta.b64 ok, [empty], par; @ok bra GO; bra WAIT; GO: }} //tag wait_empty
mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {BYTES}; //tag expect
shl.b32 x, i, 6; mov.u32 y, 0; add.u32 z, a, 8192;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [a], [ma, {{x, y}}], [full]; //tag load_a
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [z], [mb, {{x, y}}], [full]; //tag load_b
add.u32 i, i, 1; setp.lt.u32 p, i, {TILES}; @p bra $LOAD;
bra $END;
$CONSUMER:
mov.u32 i, 0;
setp.eq.u32 zero, tid, -1; setp.ne.u32 one, tid, -1;
$MULTIPLY:
and.b32 slot, i, 1; mad.lo.u32 a, slot, {BYTES}, s; mad.lo.u32 full, slot, 8, s; add.u32 empty, full, {EMPTY}; add.u32 full, full, {FULL};
shr.u32 par, i, 1; and.b32 par, par, 1;
{{ .reg .pred ok; WAIT: mbarrier.try_wait.parity.shared::cta.b64 ok, [full], par; @ok bra GO; bra WAIT; GO: }} //tag wait_full
shr.u32 t0, a, 4; cvt.u64.u32 da, t0; or.b64 da, da, {DESCRIPTOR}; add.s64 db, da, 512;
wgmma.fence.sync.aligned; //tag fence
setp.ne.u32 first, i, 0;
wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{ACC}}}, da, db, first, 1, 1, 0, 0; //tag mma
add.s64 da, da, 2; add.s64 db, db, 2;
wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{ACC}}}, da, db, one, 1, 1, 0, 0;
add.s64 da, da, 2; add.s64 db, db, 2;
wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{ACC}}}, da, db, one, 1, 1, 0, 0;
add.s64 da, da, 2; add.s64 db, db, 2;
wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{ACC}}}, da, db, one, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0; //tag wait_group
{" ".join(f"mul.f32 acc{j}, acc{j}, 0f3F800000;" for j in range(N // 2))} //tag use
setp.ne.u32 p, tid, 0; @p bra $KEPT;
mbarrier.arrive.shared::cta.b64 _, [empty]; //tag release
$KEPT:
add.u32 i, i, 1; setp.lt.u32 p, i, {TILES}; @p bra $MULTIPLY;
and.b32 t1, tid, 31; shr.u32 t2, t1, 2; and.b32 t3, t1, 3; mad.lo.u32 t2, wid, 16, t2;
mad.lo.u32 t4, t2, {N * 4}, s; mad.lo.u32 t4, t3, 8, t4;
{" ".join(f"st.shared.f32 [t4 + {OUT + (j // 4) * 32 + (j % 2) * 4 + ((j % 4) // 2) * 8 * N * 4}], acc{j};" for j in range(N // 2))} //tag epilogue
fence.proxy.async.shared::cta; //tag proxy
bar.sync 1, 128; //tag meet
setp.ne.u32 p, tid, 0; @p bra $END;
mov.b64 mc, map_c; cvta.param.u64 mc, mc; mov.u32 x, 0; add.u32 z, s, {OUT};
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [mc, {{x, x}}], [z]; //tag store
cp.async.bulk.commit_group; //tag commit_store
cp.async.bulk.wait_group 0; //tag wait_store
$END:
ret; //tag end
"""


def _lines() -> dict[str, int]:
    """The PTX line of each tag, counted from 1."""
    first = S.line_of(
        S.kernel("@BODY", parameters=PARAMETERS, name="pipeline", module=MODULE), "@BODY"
    )
    parts = [line.partition("//tag ")[2].strip() for line in BODY.splitlines()]
    return {tag: first + i for i, tag in enumerate(parts) if tag}


LINES = _lines()


def program(changes: dict[str, str] | None = None) -> str:
    """The pipeline, with the lines of some tags replaced, each by one line."""
    lines = []
    for line in BODY.splitlines():
        code, _, tag = line.partition("//tag ")
        lines.append((changes or {}).get(tag.strip(), code))
    return S.kernel("\n".join(lines), parameters=PARAMETERS, name="pipeline", module=MODULE)


def bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def values(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << 16).view(np.float32)


class Pipeline:
    def __init__(self, sim: S.Simulator, ptx: str) -> None:
        self.sim, self.module = sim, sim.load(ptx)
        rng = np.random.default_rng(0)
        a, b = (
            bf16(rng.standard_normal((64, 64 * TILES))),
            bf16(rng.standard_normal((64, 64 * TILES))),
        )
        self.want = values(a) @ values(b).T
        self.a, self.b, self.c = sim.buffer(a), sim.buffer(b), sim.zeros((64, N), np.float32)
        self.scratch = sim.zeros(256, np.uint32)
        inputs = [
            sim.tensor_map(
                x,
                dtype="bf16",
                shape=[64 * TILES, 64],
                strides=[128 * TILES],
                box=[64, 64],
                swizzle="128",
            )
            for x in (self.a, self.b)
        ]
        self.maps = [
            *inputs,
            sim.tensor_map(self.c, dtype="f32", shape=[N, 64], strides=[N * 4], box=[N, 64]),
        ]

    def run(self, seed: int) -> np.ndarray:
        self.sim.configure(seed=seed)
        self.module.launch("pipeline", *self.maps, self.scratch, block=160, shared=SHARED)
        return self.c.read()

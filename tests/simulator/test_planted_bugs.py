# ruff: noqa: E501 - PTX text reads better unbroken
"""One small pipeline, right as it stands, and the same with one bug planted: found within 20 seeds.

A TMA load fills a slot, a warpgroup multiplies it with wgmma, writes the result through shared memory
and stores it by TMA. Each bug removes or changes one line, and the finding must name the kernel, the
PTX line and what is wrong there.
"""

from __future__ import annotations

import numpy as np
import pytest
import sim as S

SLOTS, TILES, N = 2, 5, 64
BYTES = 2 * 64 * 128  # a tile of A and one of B, 64 x 64 of 16 bits each
ACC = ", ".join(f"acc{i}" for i in range(N // 2))
PARAMETERS = ".param .align 64 .b8 map_a[128], .param .align 64 .b8 map_b[128], .param .align 64 .b8 map_c[128], .param .u64 scratch"
MODULE = ".extern .shared .align 1024 .b8 mem[];"
FULL, EMPTY, OUT = SLOTS * BYTES, SLOTS * BYTES + 64, SLOTS * BYTES + 1024
SHARED = OUT + 64 * N * 4
DESCRIPTOR = (1 << 62) | (64 << 32) | (1 << 16)

# Each line that a bug touches carries a tag; `@tag` in a replacement table names it.
BODY = f"""
.reg .b32 tid, wid, s, i, slot, a, full, empty, par, x, y, z, t<8>; .reg .b64 da, db, ma, mb, mc, g, q;
.reg .pred p, first, zero, one, lead, done; .reg .f32 acc<{N // 2}>; .reg .f32 f;
mov.u32 tid, %tid.x; shr.u32 wid, tid, 5; mov.u32 s, mem;
setp.ne.u32 p, tid, 0; @p bra $READY;
mbarrier.init.shared::cta.b64 [mem + {FULL}], 1;
mbarrier.init.shared::cta.b64 [mem + {FULL + 8}], 1;
mbarrier.init.shared::cta.b64 [mem + {EMPTY}], 1; //tag empty_count
mbarrier.init.shared::cta.b64 [mem + {EMPTY + 8}], 1;
fence.mbarrier_init.release.cluster;
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
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [z], [mb, {{x, y}}], [full];
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
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0; //tag wait_store
$END:
ret; //tag end
"""


def program(changes: dict[str, str] | None = None) -> str:
    """The pipeline, with the lines of some tags replaced."""
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


def find(sim: S.Simulator, ptx: str, seeds: int = 20) -> str:
    """The first finding within the seeds, or a failure."""
    pipeline = Pipeline(sim, ptx)
    for seed in range(seeds):
        try:
            pipeline.run(seed)
        except S.SimulatorError as error:
            return str(error)
    pytest.fail(f"no finding in {seeds} seeds")


@pytest.mark.parametrize("policy", ["early", "late", "random"])
def test_the_pipeline_is_right_under_every_schedule(sim: S.Simulator, policy: str) -> None:
    pipeline = Pipeline(sim, program())
    sim.configure(**{"async": policy})
    for seed in range(10):
        np.testing.assert_allclose(pipeline.run(seed), pipeline.want, atol=1e-3)


@pytest.mark.slow
def test_the_pipeline_gives_no_false_alarm_in_200_seeds(sim: S.Simulator) -> None:
    pipeline = Pipeline(sim, program())
    for seed in range(200):
        np.testing.assert_allclose(pipeline.run(seed), pipeline.want, atol=1e-3)


WAIT_FULL = "wait_full"
BUGS = {
    # name: (changed lines, kind of the finding, words of it, a line it must name)
    "missing wait for the load": (
        {"wait_full": ""},
        ("race", "uninitialized"),
        ["wgmma", "shared memory 0x"],
        "m64n64k16",
    ),
    "missing wait for a free slot": (
        {"wait_empty": ""},
        ("race", "barrier", "uninitialized"),
        [],
        None,
    ),
    "tx-count too large": (
        {"expect": f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {BYTES + 16};"},
        ("deadlock",),
        ["tx-count 16", "mbarrier 0x", "warp 0", "parity"],
        "mbarrier.try_wait",
    ),
    "tx-count too small": (
        {"expect": f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {BYTES // 2};"},
        ("barrier", "race", "uninitialized", "deadlock"),
        [],
        None,
    ),
    "arrival count too large": (
        {"empty_count": f"mbarrier.init.shared::cta.b64 [mem + {EMPTY}], 2;"},
        ("deadlock",),
        ["1 of 2 arrivals pending", "warp 4"],
        "mbarrier.try_wait",
    ),
    "arrivals beyond the count": (
        {
            "release": "mbarrier.arrive.shared::cta.b64 _, [empty]; mbarrier.arrive.shared::cta.b64 _, [empty];"
        },
        ("barrier", "race", "deadlock"),
        [],
        None,
    ),
    "slot never freed": (
        {"release": ""},
        ("deadlock",),
        ["arrivals pending", "warp 4"],
        "mbarrier.try_wait",
    ),
    "slot freed before the products are done": (
        {
            "wait_group": "",
            "use": "",
            "release": "mbarrier.arrive.shared::cta.b64 _, [empty]; wgmma.wait_group.sync.aligned 0;",
        },
        ("race", "deadlock", "divergence", "wgmma"),
        [],
        None,
    ),
    "accumulator used before its wait": (
        {"wait_group": ""},
        ("wgmma",),
        ["wait_group", "accumulator"],
        "mul.f32 acc0",
    ),
    "missing wgmma.fence": ({"fence": ""}, ("wgmma",), ["wgmma.fence"], "m64n64k16"),
    "missing proxy fence": (
        {"proxy": ""},
        ("proxy-fence",),
        ["fence.proxy.async", "shared memory 0x"],
        "cp.async.bulk.tensor.2d.global",
    ),
    "missing barrier before the store": (
        {"meet": ""},
        ("race", "uninitialized"),
        ["shared memory 0x"],
        None,
    ),
    "no barrier after the initialization": (
        {"ready": ""},
        ("barrier",),
        ["no initialized mbarrier"],
        None,
    ),
    "accumulator never written": (
        {
            "mma": f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{ACC}}}, da, db, one, 1, 1, 0, 0;"
        },
        ("uninitialized",),
        ["accumulator"],
        "m64n64k16",
    ),
    "epilogue forgotten": (
        {"epilogue": ""},
        ("uninitialized",),
        ["nobody wrote"],
        "cp.async.bulk.tensor.2d.global",
    ),
    "exit before the store has read": ({"wait_store": ""}, ("race", "out-of-bounds"), [], None),
    "barrier with a wrong thread count": (
        {"meet": "bar.sync 1, 160;"},
        ("deadlock",),
        ["barrier 1", "128 of 160"],
        "bar.sync",
    ),
    "misaligned tile": (
        {
            "load_a": "add.u32 a, a, 64; cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [a], [ma, {x, y}], [full];"
        },
        ("misaligned",),
        ["128 bytes"],
        None,
    ),
    "global store out of bounds": (
        {
            "end": "ld.param.u64 g, [scratch]; mad.wide.u32 g, tid, 8, g; st.global.u32 [g], tid; ret;"
        },
        ("out-of-bounds",),
        ["past the end of allocation"],
        "st.global.u32",
    ),
    "misaligned global store": (
        {"end": "ld.param.u64 g, [scratch]; st.global.u32 [g + 2], tid; ret;"},
        ("misaligned",),
        ["not aligned"],
        "st.global.u32",
    ),
    "undefined register": (
        {"end": "ld.param.u64 g, [scratch]; st.global.u32 [g], t7; ret;"},
        ("uninitialized",),
        ["never wrote"],
        "st.global.u32",
    ),
    "undefined predicate": (
        {"end": "@lead bra $LATE; $LATE: ret;"},
        ("uninitialized",),
        ["predicate"],
        "@lead bra",
    ),
    "shared memory out of bounds": (
        {"end": f"st.shared.u32 [mem + {SHARED}], tid; ret;"},
        ("out-of-bounds",),
        ["shared address"],
        "st.shared.u32",
    ),
    "mbarrier overwritten": (
        {"end": f"st.shared.u32 [mem + {FULL}], tid; ret;"},
        ("barrier",),
        ["live mbarrier"],
        "st.shared.u32",
    ),
    "two writers of one word": (
        {"end": f"st.shared.u32 [mem + {FULL + 32}], tid; ret;"},
        ("race",),
        ["written by warp", "and written by warp"],
        "st.shared.u32",
    ),
    "part of a warp in an aligned instruction": (
        {
            "end": "and.b32 t5, tid, 1; setp.eq.u32 p, t5, 0; @p bra $HALF; wgmma.fence.sync.aligned; $HALF: ret;"
        },
        ("deadlock", "divergence", "wgmma"),
        [],
        None,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(sim: S.Simulator, name: str) -> None:
    changes, kinds, words, named = BUGS[name]
    ptx = program(changes)
    message = find(sim, ptx)
    assert any(f"[{kind}]" in message for kind in kinds), message
    assert "kernel pipeline" in message and "PTX line" in message and "warp" in message, message
    for word in words:
        assert word in message, message
    if named is not None:
        lines = [i + 1 for i, text in enumerate(ptx.splitlines()) if named in text]
        assert any(
            f"PTX line {line} " in message
            or f"PTX line {line}:" in message
            or f"PTX line {line})" in message
            for line in lines
        ), (lines, message)


def test_registers_beyond_the_budget_are_a_deadlock(sim: S.Simulator) -> None:
    body = ".reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.lt.u32 p, t, 128; @p bra $LOW; setmaxnreg.inc.sync.aligned.u32 240; ret; $LOW: setmaxnreg.dec.sync.aligned.u32 {low}; bar.sync 0, 128; ret;"
    fine = S.kernel(body.replace("{low}", "24"), directives=".maxntid 384")
    sim.load(fine).launch("k", block=384)
    broken = S.kernel(body.replace("{low}", "160"), directives=".maxntid 384")
    with pytest.raises(S.SimulatorError, match=r"setmaxnreg\.inc to 240"):
        sim.load(broken).launch("k", block=384)


def test_too_much_shared_memory_is_refused(sim: S.Simulator) -> None:
    module = sim.load(S.kernel("ret;", module=MODULE))
    with pytest.raises(S.SimulatorError, match="227 KB"):
        module.launch("k", shared=227 * 1024 + 16)

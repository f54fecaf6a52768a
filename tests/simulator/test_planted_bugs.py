# ruff: noqa: E501 - PTX text reads better unbroken
"""One small pipeline, right as it stands, and the same with one bug planted: found within 20 seeds.

The pipeline is pipeline.py's. Each bug removes or changes one line, and the finding must name the
kernel, the PTX line and what is wrong there.
"""

from __future__ import annotations

import numpy as np
import pytest
import sim as S
from pipeline import (
    ACC,
    BYTES,
    EMPTY,
    FULL,
    MODULE,
    SHARED,
    N,
    Pipeline,
    program,
)


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

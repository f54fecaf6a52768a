# ruff: noqa: E501 - PTX text reads better unbroken
"""One small pipeline, right as it stands, and the same with one bug planted: found within 20 seeds.

The pipeline is pipeline.py's. Each bug removes or changes one line. Whatever a seed finds must name
the kernel, the warp, exactly the PTX line where the bug shows, and the barrier or the address.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest

import flash8_sim as S
from pipeline import ACC, BYTES, EMPTY, FULL, LINES, MODULE, SHARED, N, Pipeline, program

BASE = 0x400  # the first shared address that a kernel sees
FULL_0, EMPTY_0 = f"mbarrier {BASE + FULL:#x}", f"mbarrier {BASE + EMPTY:#x}"


@dataclass(frozen=True)
class Bug:
    """`changes`: lines by their tags. Every finding is of one of `kinds`, at one of the lines `at`.

    The first finding also has all `words`, and names the lines `also`.
    """

    changes: dict[str, str]
    kinds: tuple[str, ...]
    at: tuple[str, ...]
    words: tuple[str, ...]
    also: tuple[str, ...] = ()


def findings(sim: S.Simulator, ptx: str, seeds: int = 20) -> list[str]:
    """What the seeds find, the first of them first."""
    pipeline = Pipeline(sim, ptx)
    messages = []
    for seed in range(seeds):
        try:
            pipeline.run(seed)
        except S.SimulatorError as error:
            messages.append(str(error))
    return messages


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


LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
RELAXED_RELEASE = "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [empty];"
STORE_G = "ld.param.u64 g, [scratch]; "
BUGS = {
    "missing wait for the load": Bug(
        {"wait_full": ""}, ("race", "uninitialized"), ("mma",), ("wgmma", "shared memory 0x2400")
    ),
    "wait for the load without a retry": Bug(
        {
            "wait_full": "{ .reg .pred ok; mbarrier.try_wait.parity.shared::cta.b64 ok, [full], par; }"
        },
        ("race", "uninitialized"),
        ("mma",),
        ("shared memory 0x",),
    ),
    "missing wait for a free slot": Bug(
        {"wait_empty": ""},
        ("race", "barrier"),
        ("load_a", "load_b", "expect"),
        ("shared memory 0x", FULL_0),
    ),
    "tx-count too large": Bug(
        {"expect": f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {BYTES + 16};"},
        ("deadlock",),
        ("wait_full",),
        ("tx-count 16 bytes expected that no transfer brought", FULL_0, "warp 0", "parity 0"),
        ("init_full",),
    ),
    "tx-count too small": Bug(
        {"expect": f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {BYTES // 2};"},
        ("barrier", "race", "uninitialized"),
        ("mma", "load_a", "load_b"),
        ("shared memory 0x2400", FULL_0),
        ("load_b",),
    ),
    "arrival count too large": Bug(
        {"empty_count": f"mbarrier.init.shared::cta.b64 [mem + {EMPTY}], 2;"},
        ("deadlock",),
        ("wait_full",),
        ("1 of 2 arrivals pending", EMPTY_0, "warp 4"),
        ("wait_empty", "empty_count"),
    ),
    "arrivals beyond the count": Bug(
        {
            "release": "mbarrier.arrive.shared::cta.b64 _, [empty]; mbarrier.arrive.shared::cta.b64 _, [empty];"
        },
        ("deadlock",),
        ("wait_full",),
        (FULL_0, EMPTY_0, "warp 4"),
        ("wait_empty", "empty_count"),
    ),
    "slot never freed": Bug(
        {"release": ""},
        ("deadlock",),
        ("wait_full",),
        ("1 of 1 arrivals pending", EMPTY_0, "warp 4"),
        ("wait_empty", "empty_count"),
    ),
    "slot freed before the products are done": Bug(
        {
            "wait_group": "",
            "use": "",
            "release": "mbarrier.arrive.shared::cta.b64 _, [empty]; wgmma.wait_group.sync.aligned 0;",
        },
        ("race", "deadlock"),
        ("load_a", "load_b", "mma", "release"),
        ("shared memory 0x400", "wgmma of warpgroup 0", FULL_0),
        ("mma",),
    ),
    "slot freed by a relaxed arrival": Bug(
        {"release": RELAXED_RELEASE},
        ("race",),
        ("load_a", "load_b"),
        ("shared memory 0x400", "a transfer announced on", FULL_0),
        ("load_a",),
    ),
    "slot freed by a relaxed arrival behind a fence of the proxy": Bug(
        {"release": f"fence.proxy.async; {RELAXED_RELEASE}"},
        ("race",),
        ("load_a", "load_b"),
        ("shared memory 0x400", "a transfer announced on", FULL_0),
        ("load_a",),
    ),
    "accumulator used before its wait": Bug(
        {"wait_group": ""},
        ("wgmma",),
        ("use",),
        ("before wgmma.wait_group", "accumulator", "warp 0"),
    ),
    "missing wgmma.fence": Bug({"fence": ""}, ("wgmma",), ("mma",), ("wgmma.fence",)),
    "missing proxy fence": Bug(
        {"proxy": ""},
        ("proxy-fence",),
        ("store",),
        ("fence.proxy.async", "shared memory 0x8800", "warp 0"),
        ("epilogue",),
    ),
    "missing barrier before the store": Bug(
        {"meet": ""},
        ("race", "uninitialized"),
        ("store",),
        ("shared memory 0x", "bulk store of warp 0"),
    ),
    "no barrier after the initialization": Bug(
        {"ready": ""},
        ("race", "barrier"),
        ("wait_empty", "wait_full"),
        (f"mbarrier {BASE + FULL:#x} is initialized by warp 0", "used by warp 1"),
        ("init_full",),
    ),
    "no fence after the initialization": Bug(
        {"init_fence": ""},
        ("proxy-fence",),
        ("load_a",),
        (f"{FULL_0} was initialized by warp 0", "fence.mbarrier_init", "warp 4"),
        ("init_full",),
    ),
    "accumulator never written": Bug(
        {
            "mma": f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{ACC}}}, da, db, one, 1, 1, 0, 0;"
        },
        ("uninitialized",),
        ("mma",),
        ("accumulator",),
    ),
    "epilogue forgotten": Bug(
        {"epilogue": ""}, ("uninitialized",), ("store",), ("nobody wrote", "shared memory 0x8800")
    ),
    "exit before the store has read": Bug(
        {"wait_store": ""},
        ("race",),
        ("store",),
        ("warp 0, PTX line", "cp.async.bulk.wait_group", "the CTA exits"),
    ),
    "store that is never committed": Bug(
        {"commit_store": ""},
        ("race",),
        ("store",),
        ("warp 0, PTX line", "cp.async.bulk.commit_group", "the CTA exits"),
    ),
    "barrier with a wrong thread count": Bug(
        {"meet": "bar.sync 1, 160;"},
        ("deadlock",),
        ("meet",),
        ("barrier 1", "128 of 160", "warp 3"),
    ),
    "misaligned tile": Bug(
        {"load_a": f"add.u32 a, a, 64; {LOAD} [a], [ma, {{x, y}}], [full];"},
        ("misaligned",),
        ("load_a",),
        ("128 bytes", "destination 0x440"),
    ),
    "global store out of bounds": Bug(
        {"end": STORE_G + "mad.wide.u32 g, tid, 8, g; st.global.u32 [g], tid; ret;"},
        ("out-of-bounds",),
        ("end",),
        ("past the end of allocation", "address 0x"),
    ),
    "misaligned global store": Bug(
        {"end": STORE_G + "st.global.u32 [g + 2], tid; ret;"},
        ("misaligned",),
        ("end",),
        ("not aligned", "address 0x"),
    ),
    "undefined register": Bug(
        {"end": STORE_G + "st.global.u32 [g], t7; ret;"},
        ("uninitialized",),
        ("end",),
        ("a register that lanes 0xffffffff never wrote",),
    ),
    "undefined predicate": Bug(
        {"end": "@lead bra $LATE; $LATE: ret;"},
        ("uninitialized",),
        ("end",),
        ("a guard predicate that lanes 0xffffffff never wrote",),
    ),
    "shared memory out of bounds": Bug(
        {"end": f"st.shared.u32 [mem + {SHARED}], tid; ret;"},
        ("out-of-bounds",),
        ("end",),
        (f"shared address {BASE + SHARED:#x}",),
    ),
    "mbarrier overwritten": Bug(
        {"end": f"st.shared.u32 [mem + {FULL}], tid; ret;"},
        ("barrier",),
        ("end",),
        (f"shared memory {BASE + FULL:#x} holds a live mbarrier",),
    ),
    "two writers of one word": Bug(
        {"end": f"st.shared.u32 [mem + {FULL + 32}], tid; ret;"},
        ("race",),
        ("end",),
        (f"shared memory {BASE + FULL + 32:#x}", "written by warp", "and written by warp"),
    ),
    "part of a warp in an aligned instruction": Bug(
        {
            "end": "and.b32 t5, tid, 1; setp.eq.u32 p, t5, 0; @p bra $HALF; wgmma.fence.sync.aligned; $HALF: ret;"
        },
        ("deadlock",),
        ("end",),
        ("lanes 0xaaaaaaaa", "waits for lanes 0x55555555", "warp 0"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(sim: S.Simulator, name: str) -> None:
    bug = BUGS[name]
    found = findings(sim, program(bug.changes))
    assert found, "no finding in 20 seeds"
    for message in found:
        kind = re.search(r"\[([\w-]+)\] kernel pipeline[,:]", message)
        assert kind is not None and kind[1] in bug.kinds, message
        assert re.search(r"\bwarp \d", message), message
        line = re.search(r"PTX line (\d+) \(", message)
        assert line is not None and int(line[1]) in [LINES[tag] for tag in bug.at], message
    for word in bug.words:
        assert word in found[0], found[0]
    for tag in bug.also:
        assert re.search(rf"PTX line {LINES[tag]}\b", found[0]), (tag, found[0])


def test_a_fence_releases_for_a_relaxed_arrival(sim: S.Simulator) -> None:
    fenced = program({"release": f"fence.acq_rel.cta; {RELAXED_RELEASE}"})
    assert not findings(sim, fenced)


@pytest.mark.parametrize("fence", ["", "fence.proxy.async.shared::cta;"])
@pytest.mark.parametrize("strict", [True, False])
def test_cp_async_needs_a_proxy_fence(sim: S.Simulator, fence: str, strict: bool) -> None:
    body = f"""
    .reg .b64 g, h; .reg .b32 s; ld.param.u64 g, [from]; ld.param.u64 h, [to]; mov.u32 s, mem;
    cp.async.cg.shared.global [s], [g], 16; cp.async.wait_all; {fence}
    cp.async.bulk.global.shared::cta.bulk_group [h], [s], 16; //store
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; ret;
    """
    ptx = S.kernel(body, parameters=".param .u64 from, .param .u64 to", module=MODULE)
    source, target = sim.buffer(np.arange(4, dtype=np.uint32)), sim.zeros(4, np.uint32)
    sim.configure(cp_async_fence=strict)
    launch = lambda: sim.load(ptx).launch("k", source, target, block=1, shared=1024)  # noqa: E731
    if strict and not fence:
        line = S.line_of(ptx, "//store")
        with pytest.raises(
            S.SimulatorError, match=rf"proxy-fence.*PTX line {line} .*cp\.async of warp 0"
        ):
            launch()
    else:
        launch()
        np.testing.assert_array_equal(target.read(), source.read())


def test_registers_beyond_the_budget_are_a_deadlock(sim: S.Simulator) -> None:
    body = ".reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.lt.u32 p, t, 128; @p bra $LOW; setmaxnreg.inc.sync.aligned.u32 240; ret; $LOW: setmaxnreg.dec.sync.aligned.u32 {low}; bar.sync 0, 128; ret;"
    fine = S.kernel(body.replace("{low}", "24"), directives=".maxntid 384 .minnctapersm 1")
    sim.load(fine).launch("k", block=384)
    broken = S.kernel(body.replace("{low}", "160"), directives=".maxntid 384 .minnctapersm 1")
    with pytest.raises(S.SimulatorError, match=r"setmaxnreg\.inc to 240"):
        sim.load(broken).launch("k", block=384)


def test_too_much_shared_memory_is_refused(sim: S.Simulator) -> None:
    module = sim.load(S.kernel("ret;", module=MODULE))
    with pytest.raises(S.SimulatorError, match="227 KB"):
        module.launch("k", shared=227 * 1024 + 16)

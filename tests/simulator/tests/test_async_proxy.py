# ruff: noqa: E501 - PTX text reads better unbroken
"""Engines and global memory: proxy fences, bulk stores and reductions that land late, mbarriers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import flash8_sim as S
from planted import SEEDS, fill, messages, must_find, program

MODULE = ".extern .shared .align 1024 .b8 mem[];"
BARRIER = 1024
INIT = f"mbarrier.init.shared::cta.b64 [mem + {BARRIER}], 1; fence.mbarrier_init.release.cluster;"
LOAD = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [mem + {BARRIER}], 128; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [d], 128, [mem + {BARRIER}];"
WAIT = f"{{ .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [mem + {BARRIER}], 0; @ok bra D; bra L; D: }}"
REGISTERS = ".reg .b32 tid, cta, x, y, s, n; .reg .b64 d, f, o, e; .reg .pred p, q; .reg .f32 v;"
START = "mov.u32 tid, %tid.x; mov.u32 cta, %ctaid.x; mov.u32 s, mem; mad.lo.u32 n, tid, 4, s;"

# A CTA writes global memory and a bulk copy reads it: the same CTA, or another behind a flag.
ROUND_TRIP = f"""
{REGISTERS} {START} ld.param.u64 d, [data]; ld.param.u64 f, [flag]; ld.param.u64 o, [out];
mad.wide.u32 o, tid, 4, o; mad.wide.u32 e, tid, 4, d;
setp.ne.u32 q, cta, 0; @q bra $LOAD;
add.u32 x, tid, 100; st.global.u32 [e], x; //tag store
{{writer}}
bar.warp.sync -1; setp.ne.u32 p, tid, 0; mov.u32 y, %nctaid.x; setp.eq.u32 q, y, 1; @q bra $LOAD;
@p bra $END; st.release.gpu.global.u32 [f], 1; bra $END;
$LOAD: setp.ne.u32 p, tid, 0; @p bra $READ; mov.u32 y, %nctaid.x; setp.eq.u32 q, y, 1; @q bra $GO;
$W: ld.acquire.gpu.global.u32 y, [f]; setp.eq.u32 q, y, 0; @q bra $W;
$GO: {INIT} {{reader}}
{LOAD} //tag load
$READ: bar.warp.sync -1; {WAIT} ld.shared.u32 x, [n]; st.global.u32 [o], x;
$END: ret;
"""

# Every CTA adds 32 numbers by a bulk reduction, in the order of a semaphore.
REDUCE = f"""
{REGISTERS} {START} ld.param.u64 d, [data]; ld.param.u64 f, [flag]; ld.param.u64 o, [out];
mad.lo.u32 x, cta, 32, tid; mad.wide.u32 e, x, 4, d; ld.global.f32 v, [e]; st.shared.f32 [n], v;
fence.proxy.async.shared::cta; bar.warp.sync -1; setp.ne.u32 p, tid, 0; @p bra $END;
$W: ld.acquire.gpu.global.u32 y, [f]; setp.ne.u32 q, y, cta; @q bra $W;
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [o], [s], 128; //tag reduce
cp.async.bulk.commit_group; {{wait}}
red.release.gpu.global.add.u32 [f], 1;
{{read}}
$END: ret;
"""
# The last CTA reads the sum once its own turn is over.
READ_SUM = "mov.u32 y, %nctaid.x; add.u32 x, cta, 1; setp.ne.u32 q, x, y; @q bra $END; ld.global.f32 v, [o]; //tag use"
PARAMETERS = ".param .u64 data, .param .u64 flag, .param .u64 out"

# A reduction, and then loads one after the other, until the sum is there.
LANDING = f"""
{REGISTERS} {START} ld.param.u64 d, [data]; ld.param.u64 f, [flag]; ld.param.u64 o, [out];
mov.f32 v, 0f3F800000; st.shared.f32 [n + 512], v; fence.proxy.async.shared::cta; bar.warp.sync -1;
setp.ne.u32 p, tid, 0; @p bra $END; add.u32 n, s, 512; {INIT}
cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [o], [n], 128; cp.async.bulk.commit_group; {{wait}}
mov.u32 x, 0;
$L: {LOAD} and.b32 y, x, 1; {WAIT.replace(", 0;", ", y;")}
atom.add.gpu.global.f32 v, [o], 0f00000000; setp.neu.f32 q, v, 0f00000000; @q bra $OUT;
add.u32 x, x, 1; setp.lt.u32 q, x, {{most}}; @q bra $L;
$OUT: st.global.u32 [f], x;
$END: ret;
"""


def round_trip(
    sim: S.Simulator, ctas: int, writer: str = "", reader: str = ""
) -> tuple[Callable[[], None], dict[str, int]]:
    ptx, lines = program(fill(ROUND_TRIP, writer=writer, reader=reader), PARAMETERS, MODULE)
    module = sim.load(ptx)

    def run() -> None:
        data, flag, out = (sim.zeros(n, np.uint32) for n in (32, 1, 32))
        module.launch("k", data, flag, out, grid=ctas, shared=2048)
        np.testing.assert_array_equal(out.read(), np.arange(100, 132))

    return run, lines


@SEEDS
@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("fence", ["fence.proxy.async;", "fence.proxy.async.global;"])
@pytest.mark.parametrize("side", ["writer", "reader"])
def test_a_proxy_fence_on_either_side_is_enough(
    sim: S.Simulator, ctas: int, fence: str, side: str, seeds: int
) -> None:
    run, _ = round_trip(sim, ctas, **{side: fence})
    assert not messages(sim, run, seeds)


@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("fence", ["", "fence.proxy.async.shared::cta;"])
def test_a_bulk_load_of_stored_data_needs_a_proxy_fence(
    sim: S.Simulator, ctas: int, fence: str
) -> None:
    run, lines = round_trip(sim, ctas, writer=fence)
    words = ("global memory 0x", "fence.proxy.async", f"PTX line {lines['store']}")
    must_find(sim, run, kinds=("proxy-fence",), lines=[lines["load"]], words=words)


def reduction(
    sim: S.Simulator, wait: str, read: str = ""
) -> tuple[Callable[[], None], dict[str, int], set[bytes]]:
    ptx, lines = program(fill(REDUCE, wait=wait, read=read), PARAMETERS, MODULE)
    module, ctas = sim.load(ptx), 6
    values = np.random.default_rng(0).standard_normal((ctas, 32)).astype(np.float32)
    given, sums = sim.buffer(values), set()

    def run() -> None:
        total = sim.zeros(32, np.float32)
        module.launch("k", given, sim.zeros(1, np.uint32), total, grid=ctas, shared=2048)
        np.testing.assert_allclose(total.read(), values.sum(0), rtol=0, atol=1e-5)
        sums.add(total.read().tobytes())

    return run, lines, sums


def test_reductions_in_order_never_differ(sim: S.Simulator) -> None:
    run, _, sums = reduction(sim, "cp.async.bulk.wait_group 0;", READ_SUM)
    assert not messages(sim, run, 30)
    assert len(sums) == 1


@pytest.mark.slow
def test_reductions_in_order_never_differ_in_200_seeds(sim: S.Simulator) -> None:
    run, _, sums = reduction(sim, "cp.async.bulk.wait_group 0;", READ_SUM)
    assert not messages(sim, run, 200)
    assert len(sums) == 1


def test_a_flag_after_the_read_half_lets_reductions_overtake(sim: S.Simulator) -> None:
    """wait_group.read: shared memory is free again, but the sum may be written later."""
    run, _, sums = reduction(sim, "cp.async.bulk.wait_group.read 0;")
    assert not messages(sim, run, 30)  # reductions do not race with one another
    assert len(sums) > 1


MOST = 40


def landings(sim: S.Simulator, wait: str, seeds: range) -> list[int]:
    """How many loads came and the sum did not, by seed."""
    ptx, _ = program(fill(LANDING, wait=wait, most=str(MOST)), PARAMETERS, MODULE)
    module, found = sim.load(ptx), []
    for seed in seeds:
        sim.configure(seed=seed)
        given, loads, sums = (sim.zeros(n, np.uint32) for n in (32, 1, 32))
        module.launch("k", given, loads, sums, shared=2048)
        found.append(int(loads.read()[0]))
    return found


def test_what_was_only_read_lands_at_once_or_much_later(sim: S.Simulator) -> None:
    """Whatever else the CTA waits for; under a seed always at the same time."""
    found = landings(sim, "cp.async.bulk.wait_group.read 0;", range(1, 61))
    assert 0 in found
    assert MOST in found
    assert landings(sim, "cp.async.bulk.wait_group.read 0;", range(1, 61)) == found


def test_what_was_waited_for_has_landed(sim: S.Simulator) -> None:
    assert set(landings(sim, "cp.async.bulk.wait_group 0;", range(61))) == {0}


def test_a_load_after_the_read_half_is_a_race(sim: S.Simulator) -> None:
    run, lines, _ = reduction(sim, "cp.async.bulk.wait_group.read 0;", READ_SUM)
    must_find(
        sim,
        run,
        kinds=("race",),
        lines=[lines["use"], lines["reduce"]],
        words=("global memory 0x", "a bulk store of warp 0 of CTA ("),
    )


# CTA 1 arrives on the mbarrier of CTA 0, which then reads shared memory of CTA 1.
REMOTE = f"""
{REGISTERS} {START} ld.param.u64 o, [out]; setp.ne.u32 p, tid, 0; @p bra $READY;
mbarrier.init.shared::cta.b64 [mem + {BARRIER}], 1; //tag init
{{init_fence}}
$READY: {{ready}}
setp.ne.u32 q, cta, 0; @q bra $OTHER; {WAIT}
mapa.shared::cluster.u32 y, n, 1; ld.shared::cluster.u32 x, [y]; //tag use
mad.wide.u32 o, tid, 4, o; st.global.u32 [o], x; bra $END;
$OTHER: st.shared.u32 [n], tid; //tag data
bar.warp.sync -1; setp.ne.u32 p, tid, 0; @p bra $END; add.u32 y, s, {BARRIER}; mapa.shared::cluster.u32 y, y, 0;
mbarrier.arrive{{scope}}.shared::cluster.b64 _, [y]; //tag arrive
$END: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret;
"""
INIT_FENCE = "fence.mbarrier_init.release.cluster;"
RELAXED = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"


def remote(
    sim: S.Simulator, *, scope: str, init_fence: str = INIT_FENCE, ready: str = RELAXED
) -> tuple[Callable[[], None], dict[str, int]]:
    wait = WAIT.replace("parity.", "parity.acquire.cluster.")
    body = fill(REMOTE, scope=scope, init_fence=init_fence, ready=ready).replace(WAIT, wait)
    ptx, lines = program(body, ".param .u64 out", MODULE)
    module = sim.load(ptx)

    def run() -> None:
        out = sim.zeros(32, np.uint32)
        module.launch("k", out, grid=2, cluster=2, shared=2048)
        np.testing.assert_array_equal(out.read(), np.arange(32))

    return run, lines


@SEEDS
def test_an_arrival_with_the_scope_of_the_cluster_publishes(sim: S.Simulator, seeds: int) -> None:
    run, _ = remote(sim, scope=".release.cluster")
    assert not messages(sim, run, seeds)
    run, _ = remote(
        sim, scope=".release.cluster", init_fence="", ready=RELAXED.replace(".relaxed", ".release")
    )
    assert not messages(sim, run, seeds)


@pytest.mark.parametrize("scope", ["", ".release.cta", ".relaxed.cluster"])
def test_a_narrower_arrival_does_not_publish_to_another_cta(sim: S.Simulator, scope: str) -> None:
    run, lines = remote(sim, scope=scope)
    at = [lines["use"], lines["data"]]
    must_find(sim, run, kinds=("race", "uninitialized"), lines=at, words=("shared memory 0x",))


def test_the_initialization_of_an_mbarrier_needs_its_fence(sim: S.Simulator) -> None:
    run, lines = remote(sim, scope=".release.cluster", init_fence="")
    must_find(
        sim,
        run,
        kinds=("race",),
        lines=[lines["arrive"]],
        words=("mbarrier 0x800 is initialized by warp 0", f"PTX line {lines['init']}"),
    )

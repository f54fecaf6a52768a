# ruff: noqa: E501 - PTX text reads better unbroken
"""mbarrier phases, counts and states, named barriers and the cluster's."""

from __future__ import annotations

import numpy as np
import pytest

import flash8_sim as S
from lanewise import lanewise

ONE = ".shared .align 8 .b64 bar; .reg .pred ok, lead; .reg .b64 st, st2; setp.ne.u32 lead, thread, 0;"


def single(sim: S.Simulator, text: str, *outputs: type) -> list[int]:
    """Runs `text` on one thread of a warp; d0, d1 ... as it leaves them."""
    zero = " ".join(f"mov.u{8 * np.dtype(o).itemsize} d{i}, 0;" for i, o in enumerate(outputs))
    got = lanewise(
        sim, f"{ONE} {zero} @lead bra $END; {text} $END: bar.warp.sync -1;", [], *outputs
    )
    return [int(x[0]) for x in got]


def test_parity_of_phases(sim: S.Simulator) -> None:
    """A fresh barrier is in phase 0: parity 1 counts as done, parity 0 does not."""
    test = "mbarrier.test_wait.parity.shared::cta.b64 ok, [bar], {p}; selp.u32 d{i}, 1, 0, ok;"
    arrive = "mbarrier.arrive.shared::cta.b64 _, [bar];"
    text = (
        "mbarrier.init.shared::cta.b64 [bar], 2;"
        + test.format(p=0, i=0)
        + test.format(p=1, i=1)
        + arrive
        + test.format(p=0, i=2)
        + arrive
    )
    text += (
        test.format(p=0, i=3)
        + test.format(p=1, i=4)
        + "mbarrier.arrive.shared::cta.b64 _, [bar], 2;"
        + test.format(p=0, i=5)
        + test.format(p=1, i=6)
    )
    assert single(sim, text, *[np.uint32] * 7) == [0, 1, 0, 1, 0, 0, 1]


def test_states_and_pending_counts(sim: S.Simulator) -> None:
    text = """mbarrier.init.shared::cta.b64 [bar], 3; mbarrier.arrive.shared::cta.b64 st, [bar]; mbarrier.pending_count.b64 d0, st;
    mbarrier.test_wait.shared::cta.b64 ok, [bar], st; selp.u32 d1, 1, 0, ok; mbarrier.arrive.shared::cta.b64 st2, [bar], 2; mbarrier.pending_count.b64 d2, st2;
    mbarrier.test_wait.shared::cta.b64 ok, [bar], st; selp.u32 d3, 1, 0, ok; mbarrier.inval.shared::cta.b64 [bar]; mbarrier.init.shared::cta.b64 [bar], 1;"""
    assert single(sim, text, *[np.uint32] * 4) == [3, 0, 2, 1]


def test_transaction_counts(sim: S.Simulator) -> None:
    """Bytes may land before they are expected; a phase needs both counts at zero."""
    test = "mbarrier.test_wait.parity.shared::cta.b64 ok, [bar], {p}; selp.u32 d{i}, 1, 0, ok;"
    text = (
        "mbarrier.init.shared::cta.b64 [bar], 1; mbarrier.complete_tx.shared::cta.b64 [bar], 64; mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;"
        + test.format(p=0, i=0)
    )
    text += "mbarrier.complete_tx.shared::cta.b64 [bar], 64;" + test.format(p=0, i=1)
    text += (
        "mbarrier.expect_tx.shared::cta.b64 [bar], 16; mbarrier.arrive.shared::cta.b64 _, [bar];"
        + test.format(p=1, i=2)
        + "mbarrier.complete_tx.shared::cta.b64 [bar], 16;"
        + test.format(p=1, i=3)
    )
    assert single(sim, text, *[np.uint32] * 4) == [0, 1, 0, 1]


def test_arrive_drop_lowers_the_count(sim: S.Simulator) -> None:
    text = """mbarrier.init.shared::cta.b64 [bar], 2; mbarrier.arrive_drop.shared::cta.b64 _, [bar]; mbarrier.arrive.shared::cta.b64 _, [bar];
    mbarrier.arrive.shared::cta.b64 _, [bar]; mbarrier.test_wait.parity.shared::cta.b64 ok, [bar], 1; selp.u32 d0, 1, 0, ok;"""
    assert single(sim, text, np.uint32) == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mbarrier.arrive.shared::cta.b64 _, [bar];", "no initialized mbarrier"),
        (
            "mbarrier.init.shared::cta.b64 [bar], 1; mbarrier.arrive.shared::cta.b64 _, [bar], 2;",
            "more arrivals than its count of 1",
        ),
        (
            "mbarrier.init.shared::cta.b64 [bar], 1; mbarrier.init.shared::cta.b64 [bar], 1;",
            "initialized again",
        ),
        ("mbarrier.init.shared::cta.b64 [bar], 0;", "count of 0"),
        ("mbarrier.init.shared::cta.b64 [bar + 4], 1;", "not aligned to 8"),
        (
            "mbarrier.init.shared::cta.b64 [bar], 1; mbarrier.expect_tx.shared::cta.b64 [bar], 2000000;",
            "tx-count",
        ),
    ],
)
def test_misuse_is_reported(sim: S.Simulator, text: str, message: str) -> None:
    with pytest.raises(S.SimulatorError, match=message):
        single(sim, text + " mov.u32 d0, 1;", np.uint32)


@pytest.mark.parametrize("seed", range(6))
def test_remote_arrivals(sim: S.Simulator, seed: int) -> None:
    """Every CTA of a cluster arrives on the barrier of every other, and reads its shared memory."""
    ptx = S.kernel(
        """.shared .align 8 .b64 bar; .shared .align 4 .b32 cell; .reg .pred p; .reg .b32 t, r, a, x, i, total; .reg .b64 o; mov.u32 t, %tid.x; mov.u32 r, %cluster_ctarank; setp.ne.u32 p, t, 0; @p bra $I;
    mbarrier.init.shared::cta.b64 [bar], 4; fence.mbarrier_init.release.cluster; add.u32 x, r, 100; st.shared.u32 [cell], x;
    $I: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; setp.ge.u32 p, t, 4; @p bra $W; mov.u32 a, bar; mapa.shared::cluster.u32 a, a, t; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a];
    $W: { .reg .pred ok; L: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ok, [bar], 0; @ok bra D; bra L; D: }
    mov.u32 i, 0; mov.u32 total, 0; $S: mov.u32 a, cell; mapa.shared::cluster.u32 a, a, i; ld.shared::cluster.u32 x, [a]; add.u32 total, total, x; add.u32 i, i, 1; setp.lt.u32 p, i, 4; @p bra $S;
    ld.param.u64 o, [out]; mov.u32 x, %ctaid.x; mad.wide.u32 o, x, 4, o; st.global.u32 [o], total; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret;""",
        parameters=".param .u64 out",
    )
    sim.configure(seed=seed)
    out = sim.zeros(8, np.uint32)
    sim.load(ptx).launch("k", out, grid=8, cluster=4)
    np.testing.assert_array_equal(out.read(), np.full(8, 406))


@pytest.mark.parametrize("seed", range(6))
def test_named_barriers_order_producers_and_consumers(sim: S.Simulator, seed: int) -> None:
    """Two warps arrive, two wait: bar.arrive and bar.sync with a number and a count in registers."""
    ptx = S.kernel(
        """.shared .align 4 .b8 mem[256]; .reg .pred p; .reg .b32 t, m, x, id, n; .reg .b64 o; mov.u32 t, %tid.x; mov.u32 m, mem; mov.u32 id, 3; mov.u32 n, 128; setp.ge.u32 p, t, 64; @p bra $READ;
    mad.lo.u32 m, t, 4, m; st.shared.u32 [m], t; bar.arrive id, n; ret;
    $READ: bar.sync id, n; sub.u32 x, t, 64; mad.lo.u32 m, x, 4, m; ld.shared.u32 x, [m]; ld.param.u64 o, [out]; mad.wide.u32 o, t, 4, o; st.global.u32 [o], x; ret;""",
        parameters=".param .u64 out",
    )
    sim.configure(seed=seed)
    out = sim.zeros(128, np.uint32)
    sim.load(ptx).launch("k", out, block=128)
    np.testing.assert_array_equal(out.read()[64:], np.arange(64))


def test_barrier_reductions(sim: S.Simulator) -> None:
    ptx = S.kernel(
        """.reg .pred p, q; .reg .b32 t, x; .reg .b64 o; mov.u32 t, %tid.x; setp.lt.u32 p, t, 40; barrier.cta.red.popc.aligned.u32 x, 0, p; ld.param.u64 o, [out]; mad.wide.u32 o, t, 12, o; st.global.u32 [o], x;
    barrier.cta.red.and.aligned.pred q, 0, p; selp.u32 x, 1, 0, q; st.global.u32 [o + 4], x; barrier.cta.red.or.aligned.pred q, 0, p; selp.u32 x, 1, 0, q; st.global.u32 [o + 8], x; ret;""",
        parameters=".param .u64 out",
    )
    out = sim.zeros((96, 3), np.uint32)
    sim.load(ptx).launch("k", out, block=96)
    np.testing.assert_array_equal(out.read(), np.broadcast_to([40, 0, 1], (96, 3)))


def test_ctas_may_wait_for_each_other_through_global_memory(sim: S.Simulator) -> None:
    """The first CTA polls what the last one writes: all are resident."""
    ptx = S.kernel(
        """.reg .pred p; .reg .b32 b, x, n; .reg .b64 g; ld.param.u64 g, [flag]; mov.u32 b, %ctaid.x; mov.u32 n, %nctaid.x; add.u32 x, b, 1; setp.eq.u32 p, x, n; @p bra $SET;
    $POLL: ld.acquire.gpu.global.u32 x, [g]; setp.gt.u32 p, x, b; @p bra $DONE; bra $POLL; $DONE: red.release.gpu.global.add.u32 [g + 4], 1; ret; $SET: st.release.gpu.global.u32 [g], n; ret;""",
        parameters=".param .u64 flag",
    )
    cells = sim.zeros(2, np.uint32)
    sim.load(ptx).launch("k", cells, grid=5, block=1)
    np.testing.assert_array_equal(cells.read(), [5, 4])


def test_endless_polling_is_reported(sim: S.Simulator) -> None:
    ptx = S.kernel(
        ".reg .pred p; .reg .b32 x; .reg .b64 g; ld.param.u64 g, [flag]; $POLL: ld.acquire.gpu.global.u32 x, [g]; setp.eq.u32 p, x, 0; @p bra $POLL; ret;",
        parameters=".param .u64 flag",
    )
    sim.configure(stall_limit=100000)
    with pytest.raises(S.SimulatorError, match=r"\[deadlock\].*(?s:.)*PTX line"):
        sim.load(ptx).launch("k", sim.zeros(1, np.uint32), block=32)

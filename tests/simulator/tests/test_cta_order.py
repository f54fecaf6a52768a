# ruff: noqa: E501 - PTX text reads better unbroken
"""CTAs run in an order that the seed draws: what depends on it differs, what does not stays."""

from __future__ import annotations

import numpy as np
import pytest

import flash8_sim as S

CTAS = 8
PARAMETERS = ".param .u64 values, .param .u64 sum, .param .u64 semaphore"

# Every CTA adds its 32 values to the sum. The wait makes the CTAs take their turns.
WAIT = "$POLL: ld.acquire.gpu.global.u32 x, [s]; setp.ne.u32 p, x, cta; @p bra $POLL; bar.warp.sync -1;"
REDUCTION = """
.reg .b32 tid, cta, x; .reg .b64 v, a, s; .reg .f32 f; .reg .pred p;
mov.u32 tid, %tid.x; mov.u32 cta, %ctaid.x; ld.param.u64 v, [values]; ld.param.u64 a, [sum]; ld.param.u64 s, [semaphore];
mad.lo.u32 x, cta, 32, tid; mad.wide.u32 v, x, 4, v; mad.wide.u32 a, tid, 4, a; ld.global.f32 f, [v];
{wait}
red.global.add.f32 [a], f;
bar.warp.sync -1; setp.ne.u32 p, tid, 0; @p bra $END; red.release.gpu.global.add.u32 [s], 1;
$END: ret;
"""

# Every CTA takes a ticket and writes its own number in that place.
TICKETS = """
.reg .b32 x, cta; .reg .b64 s, o; mov.u32 cta, %ctaid.x; ld.param.u64 s, [semaphore]; ld.param.u64 o, [sum];
atom.global.add.u32 x, [s], 1; mad.wide.u32 o, x, 4, o; st.global.u32 [o], cta; ret;
"""

# A barrier of the whole grid: nobody goes on before all have arrived.
GRID_BARRIER = """
.reg .b32 x, n; .reg .b64 s; .reg .pred p; ld.param.u64 s, [semaphore]; mov.u32 n, %nctaid.x; mov.u32 x, %tid.x;
setp.ne.u32 p, x, 0; @p bra $END; atom.acq_rel.gpu.global.add.u32 x, [s], 1;
$POLL: ld.acquire.gpu.global.u32 x, [s]; setp.lt.u32 p, x, n; @p bra $POLL;
$END: ret;
"""


def sums(sim: S.Simulator, body: str, seeds: range) -> set[bytes]:
    """The different results of the reduction under the seeds, as bits."""
    values = np.random.default_rng(0).standard_normal((CTAS, 32)).astype(np.float32)
    module, given = sim.load(S.kernel(body, parameters=PARAMETERS)), sim.buffer(values)
    found = set()
    for seed in seeds:
        sim.configure(seed=seed)
        total, semaphore = sim.zeros(32, np.float32), sim.zeros(1, np.uint32)
        module.launch("k", given, total, semaphore, grid=CTAS)
        np.testing.assert_allclose(total.read(), values.sum(0), rtol=0, atol=1e-5)
        found.add(total.read().tobytes())
    return found


def test_a_reduction_without_its_semaphore_differs_in_bits(sim: S.Simulator) -> None:
    assert len(sums(sim, REDUCTION.format(wait=""), range(30))) > 1


def test_a_reduction_in_order_never_differs(sim: S.Simulator) -> None:
    assert len(sums(sim, REDUCTION.format(wait=WAIT), range(30))) == 1


@pytest.mark.slow
def test_a_reduction_in_order_never_differs_in_200_seeds(sim: S.Simulator) -> None:
    assert len(sums(sim, REDUCTION.format(wait=WAIT), range(200))) == 1


def test_tickets_are_drawn_in_different_orders(sim: S.Simulator) -> None:
    module = sim.load(S.kernel(TICKETS, parameters=PARAMETERS))
    orders = []
    for seed in range(6):
        sim.configure(seed=seed)
        order, counter = sim.zeros(64, np.uint32), sim.zeros(1, np.uint32)
        module.launch("k", order, order, counter, grid=64, block=1)
        np.testing.assert_array_equal(np.sort(order.read()), np.arange(64))
        orders.append(tuple(order.read()))
    assert orders[0] == tuple(range(64))  # seed 0 is the plain order
    assert len(set(orders)) == 6


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_ctas_wait_only_for_resident_ones(sim: S.Simulator, seed: int) -> None:
    """A multiprocessor holds two CTAs of 1024 threads: of four, two must be finished first."""
    module = sim.load(S.kernel(GRID_BARRIER, parameters=PARAMETERS))
    sim.configure(seed=seed, multiprocessors=2, stall_limit=100_000)
    counter = sim.zeros(1, np.uint32)
    module.launch("k", counter, counter, counter, grid=4, block=1024)
    assert counter.read()[0] == 4
    sim.configure(multiprocessors=1)
    with pytest.raises(S.SimulatorError, match=r"\[deadlock\]"):
        module.launch("k", counter, counter, sim.zeros(1, np.uint32), grid=4, block=1024)

# ruff: noqa: E501 - PTX text reads better unbroken
"""Lanes are threads: what one of them releases is its own, until bar.warp.sync has joined them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import flash8_sim as S
from planted import SEEDS, fill, messages, must_find, program

MODULE = ".shared .align 8 .b64 full; .shared .align 8 .b64 empty; .shared .align 128 .b8 mem[128];"
WAIT = "{ .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [{bar}], 0; @ok bra D; bra L; D: }"

# Warp 0 fills shared memory and arrives with one lane; warp 1 reads it and gives it back with one lane;
# then warp 0 writes it again.
BODY = f"""
.reg .b32 t, lane, a, x, y; .reg .b64 o; .reg .pred p, one;
mov.u32 t, %tid.x; and.b32 lane, t, 31; mov.u32 a, mem; mad.lo.u32 a, lane, 4, a; ld.param.u64 o, [out];
setp.eq.u32 one, lane, 0; setp.ne.u32 p, t, 0; @p bra $READY;
mbarrier.init.shared::cta.b64 [full], 1; mbarrier.init.shared::cta.b64 [empty], 1;
$READY: bar.sync 0; setp.ge.u32 p, t, 32; @p bra $READ;
st.shared.u32 [a], t; //tag fill
{{filled}}
@one mbarrier.arrive.shared::cta.b64 _, [full];
{fill(WAIT, bar="empty")}
st.shared.u32 [a], 0; //tag again
bra $END;
$READ: {fill(WAIT, bar="full")}
ld.shared.u32 x, [a]; //tag use
{{used}}
@one mbarrier.arrive.shared::cta.b64 _, [empty];
mad.wide.u32 o, lane, 4, o; st.global.u32 [o], x;
$END: ret;
"""
SYNC = "bar.warp.sync -1;"


def runner(sim: S.Simulator, filled: str, used: str) -> tuple[Callable[[], None], dict[str, int]]:
    ptx, lines = program(fill(BODY, filled=filled, used=used), ".param .u64 out", MODULE)
    module = sim.load(ptx)

    def run() -> None:
        out = sim.zeros(32, np.uint32)
        module.launch("k", out, block=64)
        np.testing.assert_array_equal(out.read(), np.arange(32))

    return run, lines


@SEEDS
@pytest.mark.parametrize("used", [SYNC, "shfl.sync.idx.b32 y, x, 0, 31, -1;"])
def test_a_meeting_of_the_lanes_is_enough(sim: S.Simulator, used: str, seeds: int) -> None:
    """Loads are over when the lanes have met in whatever way; stores need bar.warp.sync."""
    run, _ = runner(sim, SYNC, used)
    assert not messages(sim, run, seeds)


@pytest.mark.parametrize("filled", ["", "shfl.sync.idx.b32 y, t, 0, 31, -1;"])
def test_stores_without_a_meeting_are_found(sim: S.Simulator, filled: str) -> None:
    run, lines = runner(sim, filled, SYNC)
    must_find(
        sim, run, kinds=("race",), lines=[lines["use"]],
        words=("shared memory 0x", f"written by warp 0 (PTX line {lines['fill']})"),
    )  # fmt: skip


def test_loads_without_a_meeting_are_found(sim: S.Simulator) -> None:
    run, lines = runner(sim, SYNC, "")
    must_find(
        sim, run, kinds=("race",), lines=[lines["again"]],
        words=("shared memory 0x", f"read by warp 1 (PTX line {lines['use']})"),
    )  # fmt: skip


ATOMICS = """
.reg .b32 t, x; .reg .b64 o; .reg .pred p; mov.u32 t, %tid.x; ld.param.u64 o, [out]; setp.ne.u32 p, t, 0; @p bra $GO;
st.shared.u32 [mem], 0;
$GO: bar.sync 0;
red.shared.add.u32 [mem], 1; //tag add
{before} setp.ne.u32 p, t, 0; @p bra $END;
ld.shared.u32 x, [mem]; //tag use
st.global.u32 [o], x;
$END: ret;
"""


@pytest.mark.parametrize("before", ["bar.sync 0;", ""])
def test_atomics_in_shared_memory_order_nothing(sim: S.Simulator, before: str) -> None:
    ptx, lines = program(fill(ATOMICS, before=before), ".param .u64 out", MODULE)
    module = sim.load(ptx)

    def run() -> None:
        out = sim.zeros(1, np.uint32)
        module.launch("k", out, block=128)
        assert out.read()[0] == 128

    if before:
        assert not messages(sim, run, 20)
    else:
        at = [lines["use"], lines["add"]]
        must_find(sim, run, kinds=("race",), lines=at, words=("shared memory 0x",))


FLAG = """
.reg .b32 t, x; .reg .b64 o; .reg .pred p; mov.u32 t, %tid.x; ld.param.u64 o, [out]; setp.ge.u32 p, t, 1; @p bra $GO;
st.shared.u32 [mem], 0;
$GO: bar.sync 0; setp.ge.u32 p, t, 32; @p bra $READ; setp.ne.u32 p, t, 0; @p bra $END;
st.shared.u32 [mem + 4], 7; //tag data
{before} atom.shared.exch.b32 x, [mem], 1; bra $END;
$READ: setp.ne.u32 p, t, 32; @p bra $END;
$W: ld.volatile.shared.u32 x, [mem]; setp.eq.u32 p, x, 0; @p bra $W;
{after} ld.shared.u32 x, [mem + 4]; //tag use
st.global.u32 [o], x;
$END: ret;
"""


@pytest.mark.parametrize("before", ["fence.acq_rel.cta;", ""])
@pytest.mark.parametrize("after", ["membar.cta;", ""])
def test_a_flag_in_shared_memory_needs_its_fences(
    sim: S.Simulator, before: str, after: str
) -> None:
    ptx, lines = program(fill(FLAG, before=before, after=after), ".param .u64 out", MODULE)
    module = sim.load(ptx)

    def run() -> None:
        out = sim.zeros(1, np.uint32)
        module.launch("k", out, block=64)
        assert out.read()[0] == 7

    if before and after:
        assert not messages(sim, run, 20)
    else:
        must_find(sim, run, kinds=("race",), lines=[lines["use"]], words=("shared memory 0x",))

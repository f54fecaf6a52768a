# ruff: noqa: E501 - PTX text reads better unbroken
"""What CTAs tell each other through global memory: scopes, fences, releases and acquires.

CTA 0 writes data and raises a flag, the last CTA waits for the flag and reads the data. In between
a third CTA may pass the flag on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

import flash8_sim as S
from planted import SEEDS, messages, must_find, program

PARAMETERS = ".param .u64 data, .param .u64 flag, .param .u64 out"
BODY = """
.reg .b32 tid, cta, last, x, y; .reg .b64 d, f, o; .reg .pred p;
mov.u32 tid, %tid.x; mov.u32 cta, %ctaid.x; mov.u32 last, %nctaid.x; sub.u32 last, last, 1;
ld.param.u64 d, [data]; ld.param.u64 f, [flag]; ld.param.u64 o, [out];
mad.wide.u32 d, tid, 4, d; mad.wide.u32 o, tid, 4, o;
setp.eq.u32 p, cta, last; @p bra $READ;
setp.ne.u32 p, cta, 0; @p bra $PASS;
add.u32 x, tid, 100;
st.global.u32 [d], x; //tag data
{meet}
setp.ne.u32 p, tid, 0; @p bra $END;
{release} //tag release
bra $END;
$PASS:
setp.ne.u32 p, tid, 0; @p bra $END;
{passing} //tag pass
bra $END;
$READ:
{acquire} //tag acquire
ld.global.u32 x, [d]; //tag use
st.global.u32 [o], x;
$END:
ret;
"""


def poll(load: str, least: int = 1, fence: str = "") -> str:
    return f"$W: {load} y, [f]; setp.lt.u32 p, y, {least}; @p bra $W; {fence}"


ACQUIRE, RELAXED = poll("ld.acquire.gpu.global.u32"), poll("ld.relaxed.gpu.global.u32")
RELEASE = "st.release.gpu.global.u32 [f], 1;"
FENCE = "fence.acq_rel.gpu;"
RELAXED_STORE = "st.relaxed.gpu.global.u32 [f], 1;"
WAIT_1, TWO = poll("ld.relaxed.gpu.global.u32"), poll("ld.acquire.gpu.global.u32", 2)


@dataclass(frozen=True)
class Case:
    release: str
    acquire: str
    passing: str = ""
    meet: str = "bar.warp.sync -1;"
    cluster: int = 1
    at: tuple[str, ...] = ("use", "data")


RIGHT = {
    "release and acquire": Case(RELEASE, ACQUIRE),
    "fences round relaxed accesses": Case(
        FENCE + RELAXED_STORE, poll("ld.relaxed.gpu.global.u32", fence=FENCE)
    ),
    "a fence and an acquire": Case(FENCE + RELAXED_STORE, ACQUIRE),
    "membar round volatile accesses": Case(
        "membar.gl; st.volatile.global.u32 [f], 1;",
        poll("ld.volatile.global.u32", fence="membar.gl;"),
    ),
    "a sequentially consistent fence": Case(
        "fence.sc.sys;" + RELAXED_STORE, poll("ld.relaxed.gpu.global.u32", fence="fence.sc.gpu;")
    ),
    "reductions": Case("red.release.gpu.global.add.u32 [f], 1;", ACQUIRE),
    "polling by an atomic": Case(
        RELEASE, poll("atom.acquire.gpu.global.or.b32").replace("[f];", "[f], 0;")
    ),
    "a fence before an atomic": Case(FENCE + "red.global.add.u32 [f], 1;", ACQUIRE),
    "passed on by a relaxed atomic": Case(
        RELEASE, TWO, passing=WAIT_1 + "red.relaxed.gpu.global.add.u32 [f], 1;"
    ),
    "passed on by release and acquire": Case(
        RELEASE, TWO, passing=ACQUIRE + "st.release.gpu.global.u32 [f], 2;"
    ),
    "the scope of a cluster in a cluster": Case(
        "st.release.cluster.global.u32 [f], 1;", poll("ld.acquire.cluster.global.u32"), cluster=2
    ),
}
WRONG = {
    "a weak flag": Case(
        "st.global.u32 [f], 1;", poll("ld.global.u32"), at=("release", "acquire", "use", "data")
    ),
    "a flag written weakly": Case(
        "membar.gl; st.global.u32 [f], 1;", ACQUIRE, at=("release", "acquire")
    ),
    "a relaxed flag": Case(RELAXED_STORE, RELAXED),
    "no fence of the writer": Case(RELAXED_STORE, ACQUIRE),
    "no fence of the reader": Case(RELEASE, RELAXED),
    "a fence of the CTA": Case("fence.acq_rel.cta;" + RELAXED_STORE, ACQUIRE),
    "a fence of the cluster": Case("fence.acq_rel.cluster;" + RELAXED_STORE, ACQUIRE),
    "membar.cta": Case("membar.cta;" + RELAXED_STORE, ACQUIRE),
    "a reader's fence of the CTA": Case(
        RELEASE, poll("ld.relaxed.gpu.global.u32", fence="fence.acq_rel.cta;")
    ),
    "a release of the CTA": Case(
        "st.release.cta.global.u32 [f], 1;", ACQUIRE, at=("use", "data", "acquire", "release")
    ),
    "the scope of the CTA in a cluster": Case(
        "st.release.cta.global.u32 [f], 1;", poll("ld.acquire.cluster.global.u32"), cluster=2,
        at=("use", "data", "acquire", "release"),
    ),
    "an atomic that orders nothing": Case("red.global.add.u32 [f], 1;", ACQUIRE),
    "a fence behind the flag": Case(RELAXED_STORE + FENCE, ACQUIRE),
    "passed on by a relaxed store": Case(
        RELEASE, TWO, passing=WAIT_1 + "st.relaxed.gpu.global.u32 [f], 2;"
    ),
    "no meeting of the lanes": Case(RELEASE, ACQUIRE, meet=""),
}  # fmt: skip


def runner(sim: S.Simulator, case: Case) -> tuple[Callable[[], None], dict[str, int]]:
    body = BODY.format(
        release=case.release, acquire=case.acquire, passing=case.passing, meet=case.meet
    )
    ptx, lines = program(body.replace("$W", "$V", 2) if case.passing else body, PARAMETERS)
    module = sim.load(ptx)

    def run() -> None:
        data, flag, out = (sim.zeros(n, np.uint32) for n in (32, 1, 32))
        ctas = 3 if case.passing else 2
        module.launch("k", data, flag, out, grid=ctas, cluster=case.cluster)
        np.testing.assert_array_equal(out.read(), np.arange(100, 132))

    return run, lines


@SEEDS
@pytest.mark.parametrize("name", RIGHT)
def test_order_is_recognized(sim: S.Simulator, name: str, seeds: int) -> None:
    run, _ = runner(sim, RIGHT[name])
    assert not messages(sim, run, seeds)


@pytest.mark.parametrize("name", WRONG)
def test_missing_order_is_found(sim: S.Simulator, name: str) -> None:
    run, lines = runner(sim, WRONG[name])
    at = [lines[tag] for tag in WRONG[name].at]
    must_find(
        sim, run, kinds=("race",), lines=at, words=("global memory 0x", "of CTA (", "PTX line")
    )


def test_neighbouring_bytes_are_no_race(sim: S.Simulator) -> None:
    """CTAs that write different bytes of one word do not meet."""
    body = """.reg .b32 c; .reg .b64 o; mov.u32 c, %ctaid.x; ld.param.u64 o, [out]; cvt.u64.u32 %o, c; add.u64 o, o, %o; st.global.u8 [o], c; ret;"""
    module = sim.load(S.kernel(".reg .b64 %o; " + body, parameters=".param .u64 out"))
    for seed in range(6):
        sim.configure(seed=seed)
        out = sim.zeros(16, np.uint8)
        module.launch("k", out, grid=16, block=1)
        np.testing.assert_array_equal(out.read(), np.arange(16))


def test_two_writers_of_one_byte_are_a_race(sim: S.Simulator) -> None:
    body = ".reg .b32 c; .reg .b64 o; mov.u32 c, %ctaid.x; ld.param.u64 o, [out];\nst.global.u8 [o + 3], c; //tag store\nret;"
    ptx, lines = program(body, ".param .u64 out")
    module, out = sim.load(ptx), sim.zeros(16, np.uint8)
    must_find(
        sim,
        lambda: module.launch("k", out, grid=2, block=1),
        kinds=("race",),
        lines=[lines["store"]],
        words=("byte 3 of allocation", "written by warp 0 of CTA (0, 0, 0)", "CTA (1, 0, 0)"),
    )


def test_the_same_value_from_several_ctas_is_no_race(sim: S.Simulator) -> None:
    """Every block of a tensor may write the descale of the whole; a reader still needs order."""
    body = ".reg .b32 x, c; .reg .b64 o; .reg .pred p; mov.u32 c, %ctaid.x; setp.eq.u32 p, c, 2; ld.param.u64 o, [out];\n@!p st.global.u32 [o], 7; //tag store\n@p ld.global.u32 x, [o]; //tag load\nret;"
    ptx, lines = program(body, ".param .u64 out")
    module, out = sim.load(ptx), sim.zeros(1, np.uint32)
    assert not messages(sim, lambda: module.launch("k", out, grid=2, block=32), 20)
    assert out.read()[0] == 7
    must_find(
        sim,
        lambda: module.launch("k", out, grid=3, block=32),
        kinds=("race",),
        lines=[lines["store"], lines["load"]],
        words=("global memory 0x",),
    )


LAST_CLEARS = """
.reg .b32 x, y, n; .reg .b64 c; .reg .pred p; ld.param.u64 c, [counter]; mov.u32 n, %nctaid.x; sub.u32 n, n, 1;
atom.global.add.u32 x, [c], 1; //tag draw
setp.ne.u32 p, x, n; @p bra $END;
{clear} //tag clear
$END: ret;
"""


@pytest.mark.parametrize("right", [True, False])
def test_a_counter_is_cleared_by_a_strong_store(sim: S.Simulator, right: bool) -> None:
    """The last draw knows that the others are made, but nothing orders them before a weak store."""
    clear = "st.relaxed.gpu.global.u32 [c], 0;" if right else "st.global.u32 [c], 0;"
    ptx, lines = program(LAST_CLEARS.format(clear=clear), ".param .u64 counter")
    module = sim.load(ptx)

    def run() -> None:
        counter = sim.zeros(1, np.uint32)
        module.launch("k", counter, grid=4, block=1)
        assert counter.read()[0] == 0

    if right:
        assert not messages(sim, run, 20)
    else:
        words = (f"PTX line {lines['draw']}", "not both strong")
        must_find(sim, run, kinds=("race",), lines=[lines["clear"]], words=words)


WIDTHS = pytest.mark.parametrize("width", [1, 2, 4])
ROWS = """
.reg .b32 tid, cta, x; .reg .b64 o, at; .reg .pred p; mov.u32 tid, %tid.x; mov.u32 cta, %ctaid.x; ld.param.u64 o, [out];
{prepare}
{access}
$END: ret;
"""


def load(width: int) -> str:
    value = "{" + ", ".join(["x"] * width) + "}"
    return f"ld.global.v{width}.u32 {value}, [at];" if width > 1 else "ld.global.u32 x, [at];"


def store(width: int, register: str) -> str:
    value = "{" + ", ".join([register] * width) + "}"
    vector = f"v{width}.u32 [at], {value};" if width > 1 else f"u32 [at], {register};"
    return f"st.global.{vector}"


@WIDTHS
@pytest.mark.parametrize("differs", [False, True])
def test_rows_of_the_same_values_differ_in_one_lane(
    sim: S.Simulator, width: int, differs: bool
) -> None:
    """Warps that store whole rows of the same values are no race, but for the lane that differs."""
    prepare = f"mad.wide.u32 at, tid, {4 * width}, o; mov.u32 x, tid; setp.eq.u32 p, tid, 5; setp.eq.and.u32 p, cta, 1, p; @p add.u32 x, x, {int(differs)};"
    access = store(width, "x") + " //tag store"
    ptx, lines = program(ROWS.format(prepare=prepare, access=access), ".param .u64 out")
    module = sim.load(ptx)
    out = sim.zeros(32 * width, np.uint32)

    def run() -> None:
        module.launch("k", out, grid=2, block=32)

    if differs:
        words = (f"(byte {5 * 4 * width} of allocation)",)
        must_find(sim, run, kinds=("race",), lines=[lines["store"]], words=words)
    else:
        assert not messages(sim, run, 20)


@WIDTHS
def test_a_byte_of_another_ctas_row(sim: S.Simulator, width: int) -> None:
    """One CTA stores rows, the other reads a byte of them: of a lane in the middle of a row."""
    byte = 4 * width * 37 + 1
    access = f"""setp.eq.u32 p, cta, 1; @p bra $READ; mad.wide.u32 at, tid, {4 * width}, o; {store(width, "tid")} //tag store
bra $END;
$READ: setp.ne.u32 p, tid, 0; @p bra $END; ld.global.u8 x, [o + {byte}]; //tag load
"""
    ptx, lines = program(ROWS.format(prepare="", access=access), ".param .u64 out")
    module = sim.load(ptx)
    out = sim.zeros(64 * width, np.uint32)
    must_find(
        sim,
        lambda: module.launch("k", out, grid=2, block=64),
        kinds=("race",),
        lines=list(lines.values()),
        words=("by warp 1 of CTA (0, 0, 0)", "by warp 0 of CTA (1, 0, 0)"),
    )


@WIDTHS
@pytest.mark.parametrize("piece", [4, 16, 64, 128])
def test_neighbouring_pieces_are_no_race(sim: S.Simulator, width: int, piece: int) -> None:
    """CTAs that take turns in one row, a piece of so many bytes each."""
    lanes = max(1, piece // (4 * width))
    prepare = f"div.u32 x, tid, {lanes}; rem.u32 x, x, 2; setp.ne.u32 p, x, cta; @p bra $END; mad.wide.u32 at, tid, {4 * width}, o;"
    access = load(width) + " add.u32 x, x, tid; " + store(width, "x")
    module = sim.load(
        S.kernel(ROWS.format(prepare=prepare, access=access), parameters=".param .u64 out")
    )
    for seed in range(4):
        sim.configure(seed=seed)
        out = sim.zeros(128 * width, np.uint32)
        module.launch("k", out, grid=2, block=128)
        np.testing.assert_array_equal(out.read(), np.repeat(np.arange(128), width))


ONE_RELEASES = """
setp.eq.u32 p, cta, 1; @p bra $READ; mad.wide.u32 at, tid, {bytes}, o; {store} //tag store
setp.ne.u32 p, tid, 5; @p bra $END; st.release.gpu.global.u32 [o + 1024], 1; bra $END;
$READ: setp.ne.u32 p, tid, 0; @p bra $END;
$POLL: ld.acquire.gpu.global.u32 x, [o + 1024]; setp.eq.u32 p, x, 0; @p bra $POLL;
ld.global.u32 x, [o + {at}]; //tag load
"""


@WIDTHS
@pytest.mark.parametrize("lane", [5, 6])
def test_a_lane_releases_its_part_of_a_row(sim: S.Simulator, width: int, lane: int) -> None:
    """A row is one access of 32 lanes: what lane 5 releases by itself is its own part."""
    access = ONE_RELEASES
    for name, text in (
        ("bytes", str(4 * width)),
        ("store", store(width, "tid")),
        ("at", str(4 * width * lane)),
    ):
        access = access.replace("{" + name + "}", text)
    body = ROWS.replace("{prepare}", "").replace("{access}", access)
    ptx, lines = program(body, ".param .u64 out")
    module = sim.load(ptx)

    def run() -> None:
        module.launch("k", sim.zeros(260, np.uint32), grid=2, block=32)

    if lane == 5:
        assert not messages(sim, run, 20)
    else:
        words = (f"(byte {4 * width * lane} of allocation)",)
        must_find(sim, run, kinds=("race",), lines=[lines["load"]], words=words)

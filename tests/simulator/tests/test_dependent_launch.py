# ruff: noqa: E501 - PTX text reads better unbroken
"""What a grid knows of the one before it: programmatic stream serialization, griddepcontrol.wait."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import numpy as np
import pytest

import flash8_sim as S
from planted import SEEDS, messages, program

MODULE = ".extern .shared .align 128 .b8 mem[];"
PARAMETERS = ".param .u64 data, .param .u64 out"
START = ".reg .b32 t, c, x, m; .reg .b64 d, o, g; .reg .pred p; mov.u32 t, %tid.x; mov.u32 c, %ctaid.x; mov.u32 m, mem; ld.param.u64 d, [data]; ld.param.u64 o, [out]; mad.lo.u32 x, c, 64, t; mad.wide.u32 g, x, 4, d; mad.wide.u32 o, x, 4, o;\n"
WRITES = "{before}\nadd.u32 x, x, 100; st.global.u32 [g], x; //tag data\n{after}\nret;"
READS = "{wait}\nxor.b32 x, x, 127; mad.wide.u32 g, x, 4, d;\nld.global.u32 x, [g]; //tag use\nst.global.u32 [o], x; ret;"
WAIT = "griddepcontrol.wait;"
ALLOW = "griddepcontrol.launch_dependents;"
CTAS, VALUES = 2, np.arange(128, dtype=np.uint32)

# The second grid reads by a bulk copy what the first wrote by ordinary stores.
BULK = """
.shared .align 8 .b64 bar; .reg .b32 b; mov.u32 b, bar; setp.ne.u32 p, t, 0; @p bra $W;
mbarrier.init.shared::cta.b64 [b], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 512;
{wait}
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [m], [d], 512, [b]; //tag use
$W: bar.sync 0; { .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [b], 0; @ok bra D; bra L; D: }
xor.b32 x, x, 127; mad.lo.u32 x, x, 4, m; ld.shared.u32 x, [x]; st.global.u32 [o], x; ret;
"""


def kernel(body: str, **parts: str) -> tuple[str, dict[str, int]]:
    for name, text in parts.items():
        body = body.replace("{" + name + "}", text)
    return program(START + body, PARAMETERS, MODULE)


def must_race(
    sim: S.Simulator,
    run: Callable[[], None],
    first: tuple[str, int],
    second: tuple[str, int],
    *words: str,
) -> set[str]:
    """Under every seed, between the first grid's access and the second's: verb and PTX line of each.

    Reported is the access that comes last in time. Returns of which grid the other one was.
    """
    found = messages(sim, run, 20)
    assert len(found) == 20
    seen = set()
    for message in found:
        for when, (was, at), (now, here) in (("earlier", first, second), ("later", second, first)):
            parts = [
                rf"\[race\] kernel k, CTA \(\d, 0, 0\), warp \d, PTX line {here} \(.*: global memory 0x",
                rf" is {was} by .* of CTA \(\d, 0, 0\) of the {when} kernel k \(PTX line {at}\)",
                rf" and {now} by .* of CTA \(\d, 0, 0\) \(PTX line {here}\)",
            ]
            if all(re.search(part, message) for part in parts):
                seen.add(when)
                break
        else:
            pytest.fail(message)
        for word in words:
            assert word in message, message
    return seen


def pair(
    sim: S.Simulator,
    *,
    first: str = WRITES,
    second: str = READS,
    wait: str = WAIT,
    overlap: bool = True,
    early: bool = True,
    between: Callable[[S.Buffer], None] = lambda data: None,
) -> tuple[Callable[[], None], list[int]]:
    """Launches a grid that writes `data` and one that reads it; the lines of the two accesses.

    `early`: the first lets the second begin before it writes.
    """
    before, after = (ALLOW, "") if early else ("", ALLOW)
    (one, lines), (two, more) = kernel(first, before=before, after=after), kernel(second, wait=wait)
    writer, reader = sim.load(one), sim.load(two)

    def run() -> None:
        data, out = sim.zeros(128, np.uint32), sim.zeros(128, np.uint32)
        writer.launch("k", data, out, grid=CTAS, block=64, shared=512)
        between(data)
        reader.launch("k", data, out, grid=CTAS, block=64, shared=512, overlap=overlap)
        np.testing.assert_array_equal(out.read(), (VALUES ^ 127) + 100)

    return run, [lines["data"], more["use"]]


@SEEDS
@pytest.mark.parametrize("second", [READS, BULK])
def test_a_grid_that_waits(sim: S.Simulator, second: str, seeds: int) -> None:
    run, _ = pair(sim, second=second)
    assert not messages(sim, run, seeds)


@pytest.mark.parametrize("second", [READS, BULK])
def test_a_grid_that_does_not_wait(sim: S.Simulator, second: str) -> None:
    for early in (True, False):
        run, (data, use) = pair(sim, second=second, wait="", early=early)
        seen = must_race(sim, run, ("written", data), ("read", use))
        assert seen == ({"earlier", "later"} if early else {"earlier"})


def test_a_wait_behind_the_access(sim: S.Simulator) -> None:
    second = READS.replace("st.global.u32 [o]", "griddepcontrol.wait; st.global.u32 [o]")
    run, (data, use) = pair(sim, second=second, wait="")
    must_race(sim, run, ("written", data), ("read", use))


@pytest.mark.parametrize(("barrier", "found"), [("bar.sync 0;", False), ("", True)])
def test_one_warp_waits_for_its_cta(sim: S.Simulator, barrier: str, found: bool) -> None:
    """The others learn of it at the barrier."""
    wait = "setp.gt.u32 p, t, 31; @p bra $S; griddepcontrol.wait; $S: " + barrier
    run, (data, use) = pair(sim, wait=wait)
    if found:
        must_race(sim, run, ("written", data), ("read", use), "by warp 1 of CTA")
    else:
        assert not messages(sim, run, 20)


def test_a_grid_overwrites_what_the_former_reads(sim: S.Simulator) -> None:
    first = "{before}\nld.global.u32 x, [g]; //tag data\nst.global.u32 [o], x; {after} ret;"
    for wait, found in ((WAIT, False), ("", True)):
        (one, lines), (two, more) = (
            kernel(first, before=ALLOW, after=""),
            kernel("{wait}\nst.global.u32 [g], t; //tag use\nret;", wait=wait),
        )
        reader, writer = sim.load(one), sim.load(two)

        def run(reader: S.Module = reader, writer: S.Module = writer) -> None:
            data, out = sim.zeros(128, np.uint32), sim.zeros(128, np.uint32)
            reader.launch("k", data, out, grid=CTAS, block=64)
            writer.launch("k", data, out, grid=CTAS, block=64, overlap=True)

        if found:
            must_race(sim, run, ("read", lines["data"]), ("written", more["use"]))
        else:
            assert not messages(sim, run, 20)


@pytest.mark.parametrize("what", ["no attribute", "a synchronization", "a copy"])
def test_grids_that_do_not_overlap(sim: S.Simulator, what: str) -> None:
    def between(data: S.Buffer) -> None:
        if what == "a synchronization":
            sim.call("cuStreamSynchronize", ctypes.c_void_p())
        elif what == "a copy":
            data.read()

    run, _ = pair(sim, wait="", overlap=what != "no attribute", between=between)
    assert not messages(sim, run, 20)


@pytest.mark.parametrize("middle_waits", [True, False])
def test_a_chain_of_three(sim: S.Simulator, middle_waits: bool) -> None:
    """A grid is complete once the one that waited for it is; if that did not wait, nobody knows."""
    (one, lines), (two, _), (three, more) = (
        kernel(WRITES, before=ALLOW, after=""),
        kernel("{wait} {after} ret;", wait=WAIT if middle_waits else "", after=ALLOW),
        kernel(READS, wait=WAIT),
    )
    first, middle, last = sim.load(one), sim.load(two), sim.load(three)

    def run() -> None:
        data, out = sim.zeros(128, np.uint32), sim.zeros(128, np.uint32)
        first.launch("k", data, out, grid=CTAS, block=64)
        middle.launch("k", data, out, grid=CTAS, block=64, overlap=True)
        last.launch("k", data, out, grid=CTAS, block=64, overlap=True)

    if middle_waits:
        assert not messages(sim, run, 20)
    else:
        must_race(sim, run, ("written", lines["data"]), ("read", more["use"]))

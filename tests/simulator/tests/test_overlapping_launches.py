# ruff: noqa: E501 - PTX text reads better unbroken
"""Grids that run at the same time: griddepcontrol.launch_dependents in the one, the attribute on the next."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flash8_sim as S
from planted import SEEDS, fill, messages

CTAS, THREADS = 4, 64
SIZE = CTAS * THREADS
PARAMETERS = ".param .u64 data, .param .u64 out, .param .u64 flags"
# g, o: the thread's places in data and out; f: four counters; p: not the CTA's first thread.
START = """
.reg .b32 t, c, i, x, y; .reg .b64 d, g, o, f; .reg .pred p, q;
mov.u32 t, %tid.x; mov.u32 c, %ctaid.x; mad.lo.u32 i, c, 64, t; setp.ne.u32 p, t, 0;
ld.param.u64 d, [data]; ld.param.u64 o, [out]; ld.param.u64 f, [flags];
mad.wide.u32 g, i, 4, d; mad.wide.u32 o, i, 4, o;
"""
ALLOW = "griddepcontrol.launch_dependents;"
WAIT = "griddepcontrol.wait;"
WORK = "mov.u32 y, 0; $W: add.u32 y, y, 1; setp.lt.u32 q, y, 40; @q bra $W;"
COUNT = "bar.sync 0; @!p red.release.gpu.global.add.u32 [f+{at}], 1;"
SPIN = "$S: ld.acquire.gpu.global.u32 y, [f+{at}]; setp.lt.u32 q, y, {least}; @q bra $S;"
# Writes data, and counts the CTAs that have done it.
FORMER = f"{ALLOW} {WORK} add.u32 x, i, 100; st.global.u32 [g], x; {fill(COUNT, at='0')} ret;"
# What the counter says when the CTA begins, then what another CTA of the former wrote.
DEPENDENT = f"ld.relaxed.gpu.global.u32 x, [f]; {WAIT} xor.b32 i, i, 255; mad.wide.u32 g, i, 4, d; ld.global.u32 y, [g]; st.global.u32 [o], x; st.global.u32 [o+{SIZE * 4}], y; ret;"


class Run:
    """Launches kernels one behind the other; `out`, two values a thread, and the counters are kept."""

    def __init__(
        self, sim: S.Simulator, *bodies: str, overlap: bool = True, shared: int = 0
    ) -> None:
        self._sim, self._overlap, self._shared = sim, overlap, shared
        self._names = ["first", "second", "third"][: len(bodies)]
        self._modules = [
            sim.load(S.kernel(START + body, parameters=PARAMETERS, name=name))
            for name, body in zip(self._names, bodies, strict=True)
        ]
        self.out: list[np.ndarray] = []
        self.flags: list[np.ndarray] = []

    def __call__(self, ctas: int = CTAS) -> None:
        sim = self._sim
        data, out, flags = (sim.zeros(n, np.uint32) for n in (SIZE, 2 * SIZE, 4))
        for number, (name, module) in enumerate(zip(self._names, self._modules, strict=True)):
            overlap = self._overlap and number > 0
            module.launch(
                name,
                data,
                out,
                flags,
                grid=ctas,
                block=THREADS,
                shared=self._shared,
                overlap=overlap,
            )
        self.out.append(out.read())
        self.flags.append(flags.read())

    def seeds(self, count: int) -> np.ndarray:
        """`out` by seed; nothing may be found."""
        assert not messages(self._sim, self, count)
        return np.stack(self.out).reshape(count, 2, SIZE)


def only(sim: S.Simulator, run: Callable[[], None], seeds: int, *words: str) -> None:
    """Under every seed the finding has these words."""
    found = messages(sim, run, seeds)
    assert len(found) == seeds
    for message in found:
        for word in words:
            assert word in message, message


@SEEDS
def test_the_dependent_begins_before_the_former_has_ended(sim: S.Simulator, seeds: int) -> None:
    begun, data = Run(sim, FORMER, DEPENDENT).seeds(max(seeds, 20)).swapaxes(0, 1)
    assert (begun < CTAS).any(axis=1).sum() >= 5  # seeds under which it does
    assert len(np.unique(begun)) == CTAS + 1
    assert (data == (np.arange(SIZE) ^ 255) + 100).all()


def test_a_seed_repeats_the_overlap(sim: S.Simulator) -> None:
    run = Run(sim, FORMER, DEPENDENT)
    first = run.seeds(20)
    run.out.clear()
    np.testing.assert_array_equal(run.seeds(20), first)


@pytest.mark.parametrize(
    ("former", "overlap"), [(FORMER, False), (FORMER.replace(ALLOW, ""), True)]
)
def test_what_keeps_the_two_apart(sim: S.Simulator, former: str, overlap: bool) -> None:
    """No attribute; a former that says nothing before it ends."""
    begun, data = Run(sim, former, DEPENDENT, overlap=overlap).seeds(20).swapaxes(0, 1)
    assert (begun == CTAS).all()
    assert (data == (np.arange(SIZE) ^ 255) + 100).all()


def test_values_before_the_wait_are_old_or_new(sim: S.Simulator) -> None:
    former = f"{ALLOW} {WORK} st.relaxed.gpu.global.u32 [g], 7; ret;"
    load = "ld.relaxed.gpu.global.u32 x, [g];"
    dependent = f"{load} st.global.u32 [o], x; {WAIT} {load} st.global.u32 [o+{SIZE * 4}], x; ret;"
    before, after = Run(sim, former, dependent).seeds(20).swapaxes(0, 1)
    assert set(np.unique(before)) == {0, 7}
    assert (after == 7).all()


def test_every_cta_must_allow_it(sim: S.Simulator) -> None:
    """One CTA issues nothing: it counts at its end, the others at once."""
    silent = f"setp.eq.u32 q, c, 2; @!q {ALLOW} {WORK} setp.ne.u32 q, c, 2; @!q bra $C; bra $E; $C: {fill(COUNT, at='4')} $E: ret;"
    dependent = f"ld.relaxed.gpu.global.u32 x, [f+4]; st.global.u32 [o], x; {WAIT} ret;"
    begun = Run(sim, silent, dependent).seeds(20)[:, 0]
    assert (begun == 1).all()


def test_one_thread_allows_it_for_its_cta(sim: S.Simulator) -> None:
    former = FORMER.replace(ALLOW, f"@!p {ALLOW}")
    begun = Run(sim, former, DEPENDENT).seeds(20)[:, 0]
    assert (begun < CTAS).any()


def test_a_flag_orders_without_the_wait(sim: S.Simulator) -> None:
    """Every CTA of the former runs when the dependent does, so this spin ends."""
    dependent = f"{fill(SPIN, at='0', least=str(CTAS))} xor.b32 i, i, 255; mad.wide.u32 g, i, 4, d; ld.global.u32 x, [g]; st.global.u32 [o], x; ret;"
    data = Run(sim, FORMER, dependent).seeds(20)[:, 0]
    assert (data == (np.arange(SIZE) ^ 255) + 100).all()


AWAITS_DEPENDENT = (
    f"@p bra $N; {fill(SPIN, at='4', least=str(CTAS))} $N: {fill(COUNT, at='0')} ret;"
)


def test_a_former_that_needs_the_dependent(sim: S.Simulator) -> None:
    """It goes on where the two overlap, which nobody promises: not under every fifth seed."""
    sim.configure(stall_limit=20_000)
    bodies = ALLOW + AWAITS_DEPENDENT, f"{fill(COUNT, at='4')} {WAIT} ret;"
    run = Run(sim, *bodies)
    found = messages(sim, run, 10)
    assert len(found) == 2 and len(run.flags) == 8
    assert all((flags[:2] == CTAS).all() for flags in run.flags)
    for message in found:
        assert "[deadlock] kernel first" in message
        assert "kernel second has not begun: under this seed it does when kernel first" in message
    only(sim, Run(sim, *bodies, overlap=False), 4, "[deadlock] kernel first")


def test_a_former_that_needs_the_dependent_too_early(sim: S.Simulator) -> None:
    sim.configure(stall_limit=20_000)
    run = Run(sim, AWAITS_DEPENDENT + ALLOW, f"{fill(COUNT, at='4')} {WAIT} ret;")
    words = "kernel second has not begun: of the 4 CTAs of kernel first 0 have ended or issued"
    only(sim, run, 4, "[deadlock] kernel first", words)


def test_a_dependent_that_waits_for_a_former_that_needs_it(sim: S.Simulator) -> None:
    sim.configure(stall_limit=20_000)
    run = Run(sim, ALLOW + AWAITS_DEPENDENT, f"{WAIT} {fill(COUNT, at='4')} ret;")
    words = "waits for the grid of kernel first, of whose 4 clusters 0 have ended"
    only(sim, run, 4, "[deadlock] kernel first", "kernel second:", words)


def test_the_two_share_the_device(sim: S.Simulator) -> None:
    """Of 120 KB a CTA each, one is resident: the dependent has no room before the former ends."""
    sim.configure(stall_limit=20_000, multiprocessors=1)
    bodies = ALLOW + AWAITS_DEPENDENT, f"{fill(COUNT, at='4')} {WAIT} ret;"
    large = Run(sim, *bodies, shared=120 * 1024)
    only(sim, lambda: large(1), 4, "kernel second has not begun: the device has no room")
    sim.configure(multiprocessors=2 * CTAS)
    Run(sim, *bodies, shared=120 * 1024).seeds(4)


def test_a_chain_of_three(sim: S.Simulator) -> None:
    """The third begins when the second lets it, and waits for the first as well as the second."""
    second = f"{WORK} {fill(COUNT, at='4')} bar.sync 0; {ALLOW} ret;"
    third = f"ld.relaxed.gpu.global.u32 x, [f]; ld.relaxed.gpu.global.u32 y, [f+4]; min.u32 y, y, 4; shl.b32 y, y, 8; or.b32 x, x, y; st.global.u32 [o], x; {WAIT} ld.relaxed.gpu.global.u32 x, [f]; st.global.u32 [o+{SIZE * 4}], x; ret;"
    begun, after = Run(sim, FORMER, second, third).seeds(20).swapaxes(0, 1)
    assert (begun >> 8 == CTAS).all()  # of the second
    assert (begun & 255 < CTAS).any()  # of the first
    assert (after == CTAS).all()


def test_a_finding_names_its_own_kernel(sim: S.Simulator) -> None:
    only(sim, Run(sim, f"{ALLOW} {WORK} trap;", DEPENDENT), 8, "[trap] kernel first, CTA")
    only(sim, Run(sim, FORMER, f"{WAIT} trap;"), 8, "[trap] kernel second, CTA")


def test_counts_are_by_launch(sim: S.Simulator) -> None:
    """The report has those of the last launch, and the totals those of both."""

    def counts(*bodies: str) -> tuple[dict[str, Any], int]:
        run = Run(sim, *bodies)
        sim.library.flash8_sim_reset()
        run()
        totals = json.loads(sim.library.flash8_sim_totals().decode())
        assert totals["launches"] == len(bodies)
        report = sim.report()
        assert report["ok"] and report["kernel"] == ("second" if len(bodies) == 2 else "first")
        return report["statistics"], totals["statistics"]["warp_instructions"]

    dependent = f"{WAIT} ret;"
    for seed in (0, 5):
        sim.configure(seed=seed)
        _, former = counts(FORMER)
        alone, _ = counts(dependent)
        together, both = counts(FORMER, dependent)
        assert together == alone
        assert both == former + alone["warp_instructions"]


NOTHING = ctypes.c_void_p()


@pytest.mark.parametrize(
    "entry",
    [
        ("cuCtxSynchronize",),
        ("cuStreamSynchronize", NOTHING),
        ("cuEventRecord", NOTHING, NOTHING),
        ("cuStreamWaitEvent", NOTHING, NOTHING, 0),
        ("cuModuleUnload",),
        ("flash8_sim_configure", b"{}"),
        ("flash8_sim_report",),
        ("flash8_sim_totals",),
        ("flash8_sim_unregister_memory",),
        ("cuLaunchKernelEx",),
    ],
)
def test_a_launch_is_held_until_something_else_is_asked(
    sim: S.Simulator, entry: tuple[Any, ...]
) -> None:
    name, *arguments = entry
    out = np.zeros(64, np.uint32)
    place = ctypes.c_void_p(out.ctypes.data)
    sim.call("flash8_sim_register_memory", place, ctypes.c_size_t(out.nbytes))
    body = f"{ALLOW} st.global.u32 [o], 7; ret;"
    first, other = (
        sim.load(S.kernel(START + text, parameters=PARAMETERS)) for text in (body, "ret;")
    )
    first.launch("k", np.uint64(0), np.uint64(out.ctypes.data), np.uint64(0), block=64)
    assert (out == 0).all()
    if name == "cuLaunchKernelEx":
        other.launch("k", np.uint64(0), np.uint64(0), np.uint64(0))
    elif name == "cuModuleUnload":
        first.unload()
    elif name == "flash8_sim_unregister_memory":
        sim.call(name, place)
    else:
        getattr(sim.library, name)(*arguments)
    assert (out == 7).all()
    if name != "flash8_sim_unregister_memory":
        sim.call("flash8_sim_unregister_memory", place)


@pytest.mark.parametrize("later", ["synchronize", "copy", "launch", "free and synchronize"])
def test_a_late_error_is_returned_once(sim: S.Simulator, later: str) -> None:
    bad, good = (sim.load(S.kernel(body)) for body in (f"{ALLOW} trap;", "ret;"))
    data = sim.zeros(4, np.uint32)
    bad.launch("k")
    if later.startswith("free"):
        data.free()
    acts = {"launch": lambda: good.launch("k"), "copy": data.read}
    act = acts.get(later, lambda: sim.call("cuCtxSynchronize"))
    with pytest.raises(S.SimulatorError, match=r"\[trap\] kernel k, CTA"):
        act()
    assert not sim.report()["ok"]
    sim.call("cuCtxSynchronize")
    good.launch("k")
    assert sim.report()["ok"]


def test_a_launch_that_nothing_waits_for(sim: S.Simulator) -> None:
    text = f"import flash8_sim as S; S.Simulator().load(S.kernel('{ALLOW} trap;')).launch('k')"
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "kernel k never ran" in done.stderr

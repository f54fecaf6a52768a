"""The timeline: logical clocks, and the phases that are read from them."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

import flash8_sim as S
from flash8_sim import timeline
from pipeline import Pipeline, program

UNEVEN = """
.reg .b32 t, i; .reg .pred p; mov.u32 t, %tid.x; mov.u32 i, 0;
setp.lt.u32 p, t, 32; @p bra $MEET;
$LOOP: add.u32 i, i, 1; setp.lt.u32 p, i, 100; @p bra $LOOP;
$MEET: bar.sync 0; ret;
"""


def events_of(sim: S.Simulator, category: str) -> list[dict[str, Any]]:
    return [e for e in sim.timeline()["traceEvents"] if e["cat"] == category]


def test_a_warp_waits_as_long_as_the_other_computes(sim: S.Simulator) -> None:
    sim.configure(timeline=True)
    sim.load(S.kernel(UNEVEN)).launch("k", block=64)
    (wait,) = events_of(sim, "wait")
    assert (wait["tid"], wait["name"]) == (0, "barrier")
    assert 280 <= wait["dur"] <= 310  # three instructions a round, a hundred rounds


def test_a_watched_kernel_is_told_of_when_another_ran_after_it(sim: S.Simulator) -> None:
    sim.configure(timeline=True, watch="k")
    watched = sim.load(S.kernel(UNEVEN))
    watched.launch("k", block=64)
    report, events = sim.report(), events_of(sim, "wait")
    sim.load(S.kernel("ret;").replace(".entry k", ".entry another")).launch("another")
    assert sim.report() == report and report["kernel"] == "k"
    assert events and events_of(sim, "wait") == events
    sim.configure(timeline=True)
    sim.load(S.kernel("ret;")).launch("k")
    assert events_of(sim, "wait") == []


def test_a_warps_clock_is_its_instructions_and_its_waits(sim: S.Simulator) -> None:
    sim.configure(timeline=True)
    Pipeline(sim, program()).run(seed=0)
    events = [e for e in sim.timeline()["traceEvents"] if e["cat"] in ("run", "wait")]
    for warp in {e["tid"] for e in events}:
        mine = sorted((e for e in events if e["tid"] == warp), key=lambda e: e["ts"])
        end = 0
        for event in mine:
            assert event["ts"] == end
            end += event["dur"]
        counted = sum(sum(e["args"].values()) for e in mine if e["cat"] == "run")
        ran = sum(e["dur"] for e in mine if e["cat"] == "run")
        assert counted <= ran <= 1.2 * counted  # an instruction that blocks is tried twice


def test_products_take_turns_on_the_tensor_cores(sim: S.Simulator) -> None:
    sim.configure(timeline=True)
    Pipeline(sim, program()).run(seed=0)
    products = sorted(events_of(sim, "tensor"), key=lambda e: e["ts"])
    assert len(products) == 5 * 4  # tiles of 64 in steps of 16
    assert {e["dur"] for e in products} == {64 * 64 * 16 // 2048}
    for before, after in zip(products, products[1:], strict=False):
        assert before["ts"] + before["dur"] <= after["ts"]


def test_lanes_have_the_phases_of_the_pipeline(sim: S.Simulator) -> None:
    sim.configure(timeline=True)
    Pipeline(sim, program()).run(seed=0)
    rows = {lane.name: lane for lane in timeline.lanes(sim.timeline())}
    assert list(rows) == [
        "copies",
        "tensor cores for warpgroup 0",
        "warpgroup 0, warp 0",
        "warpgroup 1, warp 4",
    ]
    names = {name: {phase.name for phase in lane.phases} for name, lane in rows.items()}
    assert {"issue wgmma", "wait for wgmma", "store"} <= names["warpgroup 0, warp 0"]
    assert "issue copies" in names["warpgroup 1, warp 4"]
    assert len(rows["copies"].phases) == 2 * 5 + 1


def test_phases_are_read_from_the_counts() -> None:
    def run(begin: int, **counts: int) -> dict[str, Any]:
        size = sum(counts.values())
        return {
            "cat": "run",
            "name": "run",
            "ts": begin,
            "dur": size,
            "pid": 0,
            "tid": 4,
            "args": counts,
        }

    wait = {
        "cat": "wait",
        "name": "wgmma",
        "ts": 48,
        "dur": 12,
        "pid": 0,
        "tid": 4,
        "args": {"line": 7},
    }
    trace = {
        "traceEvents": [
            run(0, wgmma=4, alu=12),
            run(16, alu=16),
            run(32, float=10, special_function=2, alu=4),
            wait,
            run(60, alu=40),
            run(100, store_global=1, float=15),
        ]
    }
    (lane,) = timeline.lanes(trace)
    assert [(p.name, p.begin, p.end) for p in lane.phases] == [
        ("issue wgmma", 0, 32),
        ("softmax", 32, 48),
        ("wait for wgmma", 48, 60),
        ("other", 60, 100),
        ("store", 100, 116),
    ]


def test_an_absent_cta_is_named() -> None:
    with pytest.raises(ValueError, match="no CTA 3"):
        timeline.lanes({"traceEvents": []}, cta=3)


def test_drawing_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        timeline.draw([timeline.Lane("x", (timeline.Phase("copy", 0, 1),))], tmp_path / "x.png")

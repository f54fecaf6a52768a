"""The command that runs a lent kernel and draws it."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

import flash8_sim
from flash8_sim import command
from pipeline import Pipeline, program


class Lent:
    """The pipeline of these tests, and one that reads what nobody wrote."""

    prog = "tool sim"
    names = ("pipeline", "faulty")

    def __init__(self, sim: flash8_sim.Simulator) -> None:
        self._sim = sim

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tiles", type=int, default=5)

    def describe(self, options: argparse.Namespace) -> str:
        return f"{options.tiles} tiles"

    def watched(self, options: argparse.Namespace) -> str:
        return ""

    def run(self, options: argparse.Namespace, driver: Path) -> str:
        assert driver == flash8_sim.library_path()
        if options.kernel == "faulty":
            text = flash8_sim.kernel("trap;")
            try:
                self._sim.load(text).launch("k")
            except flash8_sim.SimulatorError as error:
                raise RuntimeError("the launch failed") from error
        Pipeline(self._sim, program()).run(seed=options.seed)
        return "all is well"


@pytest.fixture
def lent(sim: flash8_sim.Simulator) -> Lent:
    return Lent(sim)


def test_it_runs_counts_and_draws(
    lent: Lent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture, trace = tmp_path / "timeline.png", tmp_path / "trace.json"
    arguments = ["pipeline", "--seed", "3", "--output", str(picture), "--trace", str(trace)]
    assert command.main(arguments, lent) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {e["cat"] for e in json.loads(trace.read_text())["traceEvents"]} >= {"run", "tensor"}
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "pipeline: 5 tiles, CTA 0 of 1, seed 3"
    assert second == "no finding; all is well"
    assert any(line.startswith("warpgroup 1: ") for line in rest)


def test_a_finding_is_told(lent: Lent, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["faulty"], lent) == 1
    said = capsys.readouterr().err
    assert said.startswith("tool sim: the launch failed\n[trap] kernel k, CTA (0, 0, 0), warp 0")


def test_an_absent_cta_is_an_error(
    lent: Lent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pipeline", "--cta", "7", "--output", str(tmp_path / "x.png")]
    assert command.main(arguments, lent) == 1
    assert "no CTA 7" in capsys.readouterr().err


def test_the_settings_are_the_defaults_again(lent: Lent, sim: flash8_sim.Simulator) -> None:
    assert command.main(["faulty"], lent) == 1
    sim.load(flash8_sim.kernel("ret;")).launch("k")
    assert sim.timeline()["traceEvents"] == []


def test_an_unknown_kernel_lists_the_others(lent: Lent, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["missing"], lent)
    said = capsys.readouterr().err
    assert "pipeline" in said and "faulty" in said


def test_the_plugin_is_found() -> None:
    (entry,) = metadata.entry_points(group="flash8.commands", name="sim")
    assert entry.load() is command.main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_TICK", 0.001)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with command._clock("sim: running k"):
        while "running k ... 0 s" not in sys.stderr.getvalue():  # type: ignore[attr-defined]
            time.sleep(0.001)
    assert sys.stderr.getvalue().endswith(" \r")  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with command._clock("sim: running k"):
        time.sleep(0.01)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]

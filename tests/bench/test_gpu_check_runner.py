"""The runner of `make gpu-check`: limits, the budget, and a record after every step."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu_steps.clocks import Clocks
from gpu_steps.journal import Journal
from gpu_steps.runner import Runner, Step

HANGS = "import time; time.sleep(60)"
CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def step(name: str, script: str = "pass", *, limit: float = 20.0, **options) -> Step:
    command = (sys.executable, "-S", "-c", script)
    return Step(options.pop("group", "g"), name, command, limit, **options)


class Bench:
    """A runner whose record is in two folders, as with $OUT."""

    def __init__(self, folder: Path) -> None:
        self.results, self.out, self.work = (folder / name for name in ("results", "out", "work"))
        self.journal = Journal([self.results, self.out], [self.out])
        self.lines: list[str] = []

    def run(self, *steps: Step, budget: float = 60.0, **options) -> dict[str, dict]:
        runner = Runner(
            budget=budget,
            folder=self.work,
            journal=self.journal,
            environ=os.environ,
            cwd=self.work.parent,
            tell=self.lines.append,
            **options,
        )
        runner.run(steps)
        return {row["name"]: row for row in self.record()["steps"]}

    def record(self) -> dict:
        texts = {(folder / "gpu_check.json").read_text() for folder in (self.results, self.out)}
        assert len(texts) == 1
        return json.loads(texts.pop())


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_a_hung_and_a_crashed_step_are_named_and_the_rest_goes_on(bench):
    rows = bench.run(
        step("before", "print('hello')"),
        step("hung", "print('so far', flush=True); " + HANGS, limit=0.5),
        step("crashed", CRASHES),
        step("wrong", "print('off by 0.5'); raise SystemExit(1)"),
        step("after"),
    )
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "before": "ok",
        "hung": "killed",
        "crashed": "crashed",
        "wrong": "failed",
        "after": "ok",
    }
    assert rows["hung"]["detail"].startswith("killed after") and rows["hung"]["limit"] == 0.5
    assert rows["hung"]["tail"] == ["so far"] and rows["before"]["tail"] == ["hello"]
    assert rows["crashed"]["detail"] == "crashed: SIGSEGV"
    assert any(line.startswith("failed") and "off by 0.5" in line for line in bench.lines)
    log = (bench.out / "gpu_check.log").read_text()
    assert "==== wrong: failed: exit status 1\noff by 0.5" in log


def test_the_record_is_rewritten_after_every_step(bench):
    keep = "import shutil; shutil.copy({!r}, {!r})"
    record = str(bench.out / "gpu_check.json")
    rows = bench.run(
        *(step(f"step{i}", keep.format(record, f"{bench.out}/seen{i}")) for i in range(3))
    )
    assert [row["state"] for row in rows.values()] == ["ok"] * 3
    for i in range(3):
        seen = json.loads((bench.out / f"seen{i}").read_text())
        assert [row["name"] for row in seen["steps"]] == [f"step{j}" for j in range(i)]
        assert seen["waiting"] == [f"step{j}" for j in range(i, 3)]
    assert bench.record()["waiting"] == []


def test_a_budget_that_is_too_small_skips_the_rest_by_name(bench, monkeypatch):
    monkeypatch.setattr("gpu_steps.runner._RESERVE", 0.1)
    start = time.monotonic()
    rows = bench.run(
        step("first", HANGS, limit=40, least=0.1),
        step("second", least=5.0),
        step("third"),
        budget=2,
    )
    assert time.monotonic() - start < 10
    assert rows["first"]["state"] == "killed" and 0.5 < rows["first"]["limit"] <= 1.9
    for name in ("second", "third"):
        assert rows[name]["state"] == "skipped"
        assert rows[name]["detail"] == "0 s of the budget are left, and it needs 5"
    assert any(line.startswith("skipped") and "third" in line for line in bench.lines)


def test_a_step_knows_how_long_it_may_take(bench):
    script = "import os; print(os.environ['FLASH8_STEP_SECONDS'], os.environ['A'])"
    rows = bench.run(step("one", script, limit=17.0, environ={"A": "b"}))
    assert rows["one"]["tail"] == ["17 b"]


def test_what_needs_a_step_that_failed_is_skipped(bench):
    rows = bench.run(
        step("extension", "raise SystemExit(1)"),
        step("check", needs=("extension",)),
        step("facts"),
        step("sanitizer", absent="compute-sanitizer is not installed"),
    )
    assert rows["check"]["state"] == "skipped" and rows["check"]["detail"] == "it needs extension"
    assert rows["sanitizer"]["detail"] == "compute-sanitizer is not installed"
    assert rows["facts"]["state"] == "ok"


def test_a_gpu_that_does_not_answer_after_a_hang_is_left_alone(bench):
    asked = bench.out / "asked"
    probe = f"open({str(asked)!r}, 'a').write('x'); raise SystemExit({{}})"
    steps = (step("hung", HANGS, limit=0.3), step("next"), step("host", gpu=False))
    rows = bench.run(*steps, probe=[sys.executable, "-S", "-c", probe.format(1)])
    assert asked.read_text() == "xx"  # twice, before it counts as lost
    assert rows["next"]["detail"] == "the GPU does not answer since hung"
    assert rows["host"]["state"] == "ok"
    rows = bench.run(*steps, probe=[sys.executable, "-S", "-c", probe.format(0)])
    assert asked.read_text() == "xxx" and rows["next"]["state"] == "ok"


def test_steps_of_a_group_run_beside_one_another(bench):
    """Each waits for the other two: one after the other would be killed."""
    script = (
        "import pathlib, time\nhere = pathlib.Path({!r})\n(here / 'met{}').touch()\n"
        "while len(list(here.glob('met*'))) < 3: time.sleep(0.01)"
    )
    steps = [step(f"k{i}", script.format(str(bench.out), i), together=True) for i in range(3)]
    rows = bench.run(*steps, step("alone"), jobs=3)
    assert {row["state"] for row in rows.values()} == {"ok"}
    assert bench.record()["steps"][-1]["name"] == "alone"


def test_results_are_kept_of_a_killed_step_too_and_none_of_another_run(bench, tmp_path):
    partial, old = tmp_path / "partial.json", tmp_path / "old.json"
    old.write_text('{"rate": 1}')
    os.utime(old, (0, 0))
    writes = f"open({str(partial)!r}, 'w').write('[1, 2]'); "
    rows = bench.run(
        step(
            "bench", writes + "import sys; sys.stdout.flush(); " + HANGS, limit=1.0, result=partial
        ),
        step("nothing", result=old),
        step("broken", f"open({str(old)!r}, 'w').write('[1,')", result=old),
    )
    assert rows["bench"]["result"] == [1, 2] and rows["bench"]["state"] == "killed"
    assert rows["bench"]["result_file"] == "partial.json"
    assert rows["nothing"]["result"] is None and rows["broken"]["result"] is None


def test_a_folder_that_cannot_be_written_costs_a_warning(bench, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    bench.journal.records.append(tmp_path / "file" / "out")
    rows = bench.run(step("one"))
    assert rows["one"]["state"] == "ok"
    assert "file/out is not written" in capsys.readouterr().err


FAKE_NVML = """
static unsigned reads;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) { *device = &reads; return index; }
int nvmlDeviceGetClockInfo(void* device, int kind, unsigned* mhz) {
    *mhz = kind == 2 ? 3201 : reads++ == 0 ? 1980 : 1500;
    return device != &reads;
}
int nvmlDeviceGetPowerUsage(void* device, unsigned* milliwatts) { *milliwatts = 650500; return 0; }
int nvmlDeviceGetTemperature(void* device, int sensor, unsigned* celsius) { return 3; }
"""


def test_clocks_of_a_step(tmp_path, monkeypatch):
    (tmp_path / "nvml.c").write_text(FAKE_NVML)
    library = tmp_path / "libnvml.so"
    subprocess.run(["g++", "-x", "c", "-shared", tmp_path / "nvml.c", "-o", library], check=True)
    monkeypatch.setenv("FLASH8_NVML", str(library))
    monkeypatch.setattr("gpu_steps.clocks._SECONDS", 0.01)
    start = time.monotonic()
    clocks = Clocks()
    while (found := clocks(start, time.monotonic()) or {}).get("samples", 0) < 3:
        assert time.monotonic() - start < 10
        time.sleep(0.01)
    clocks.stop()
    assert found["sm_mhz"] == [1500.0, 1500.0, 1980.0] and found["memory_mhz"] == [3201.0] * 3
    assert found["watts"] == pytest.approx([650.5] * 3)
    assert "celsius" not in found, "the library does not know it"
    assert clocks(start - 10, start - 5) is None
    monkeypatch.setenv("FLASH8_NVML", "/nowhere.so")
    nothing = Clocks()
    nothing.stop()
    assert nothing(start, time.monotonic()) is None

"""`make gpu-check` without a GPU: the plan, a dry run of all of it, and the pack that it wants."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import facts
import flash8_sim
import gpu_check
import gpu_extension
from flash8 import _native
from gpu_steps import pack, plan
from processes import is_alive
from repository import ROOT
from simulated_device import missing_compiler

KERNELS = ["forward_bf16_d128_causal", "forward_bf16_d64", "quantize_cast_bf16_d128"]
BUDGET = 540


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> pack.Pack:
    """A pack with the facts' kernels and no others."""
    folder = tmp_path_factory.mktemp("pack")
    if missing_compiler() is None:
        facts.compile_images(folder / "facts")
    manifest = {"sources": pack.source_digest(), "kernels": KERNELS, "commit": "abc"}
    (folder / "pack.json").write_text(json.dumps(manifest))
    return pack.open_pack(folder)


def check(packed: pack.Pack, work: Path, *options: str, **environ: str) -> list[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), f"--pack={packed.folder}"]
    command += [f"--work={work}", "--dry-run", *options]
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_what_decides_most_comes_first_and_every_step_has_a_limit(packed, tmp_path):
    steps = plan.steps(packed, tmp_path)
    assert list(dict.fromkeys(step.group for step in steps)) == [
        *("setup", "check", "facts", "tests", "bench", "sanitizer")
    ]
    names = [step.name for step in steps]
    gradients = names.index("tests/gpu/test_gpu_backward.py, FLASH8_KERNELS=on")
    assert names[gradients - 1].startswith("facts") and names[gradients + 1].startswith("bench")
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_gpu*.py")}
    ran = {name.partition(",")[0] for name in names if name.startswith("tests/gpu/")}
    assert ran == {f"tests/gpu/{file}" for file in files}
    assert [step.name for step in steps if step.group == "check"] == [f"check {k}" for k in KERNELS]
    assert all(0 < step.least <= step.limit <= BUDGET / 3 for step in steps)
    assert len({step.name for step in steps}) == len(steps)
    # What must be known in any case fits, whatever hangs: three kernels at once stand for all here.
    first = [
        step.limit for step in steps if step.group in ("setup", "facts") and step.name != "torch"
    ]
    assert sum(first) + 40 < BUDGET
    names = {step.name for step in steps}
    assert all(set(step.needs) < names for step in steps)


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_a_dry_run_shows_every_step_and_runs_the_facts_on_the_simulated_device(packed, tmp_path):
    out = tmp_path / "out"
    lines = check(packed, tmp_path, FLASH8_DRIVER=str(flash8_sim.library_path()), OUT=str(out))
    record = json.loads((out / "gpu_check.json").read_text())
    assert record == json.loads((tmp_path / "gpu_check.json").read_text())
    assert record["dry_run"] and record["waiting"] == [] and record["pack"]["commit"] == "abc"
    assert {"date", "commit", "python", "cpu"} <= set(record["environment"])
    planned = {step.name: step for step in plan.steps(packed, tmp_path)}
    rows = {row["name"]: row for row in record["steps"]}
    assert set(rows) == set(planned)
    for name, row in rows.items():
        assert row["state"] == "ok", row
        assert row["limit"] == planned[name].limit
        assert any(line.endswith(f"  {name}") for line in lines), name
    would = rows["bench attention"]["tail"][-1]
    assert would.startswith("would run:") and would.endswith("bench/bench_attention.py")
    for name in ("arithmetic", "rates", "wgmma", "l2", "registers"):
        found = rows[f"facts {name}"]["result"]
        assert found["device"]["simulated"] and facts.unexpected(found) == [], name
    log = (out / "gpu_check.log").read_text()
    assert all(f"==== {name}: ok" in log for name in planned)


def test_a_dry_run_without_a_driver_and_with_one_group(packed, tmp_path):
    check(packed, tmp_path, "--only", "bench", FLASH8_DRIVER="", OUT="")
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert {row["group"] for row in rows} == {"setup", "bench"}


def test_it_ends_its_steps_when_it_is_ended(packed, tmp_path, monkeypatch):
    """A lent machine may end it before its budget does."""
    script = (
        "import sys; sys.path.insert(0, {!r}); import gpu_check, pathlib\n"
        "from gpu_steps import pack, plan, runner\n"
        "hang = runner.Step('setup', 'hang', ('/bin/sh', '-c', 'echo $$ >{}; exec sleep 60'), 50)\n"
        "plan.steps = lambda *_: [runner.Step('setup', 'first', ('true',), 9), hang]\n"
        "sys.argv[1:] = ['--pack={}', '--work={}', '--results={}']\n"
        "gpu_check.main()"
    )
    pid = tmp_path / "pid"
    words = (str(ROOT / "bench"), pid, packed.folder, tmp_path, tmp_path / "results")
    process = subprocess.Popen([sys.executable, "-c", script.format(*words)])
    while not (pid.exists() and pid.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    while is_alive(int(pid.read_text())):
        time.sleep(0.01)
    record = json.loads((tmp_path / "results" / "gpu_check.json").read_text())
    assert [row["name"] for row in record["steps"]] == ["first"] and record["waiting"] == ["hang"]


def test_no_pack_and_one_of_other_sources_are_refused(packed, tmp_path, monkeypatch, capsys):
    for folder, words in ((tmp_path, "there is no pack"), (packed.folder, "other sources")):
        monkeypatch.setattr(pack, "source_digest", lambda root: "of today")
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", f"--pack={folder}"])
        assert gpu_check.main() == 2
        error = capsys.readouterr().err
        assert words in error and "run `make gpu-pack`" in error


def test_the_digest_is_of_every_source(tmp_path):
    for name in ("python/flash8/a.py", "hopper/b.cuh", "bench/hopper_facts/c.cu"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    digests = {pack.source_digest(tmp_path)}
    for name in ("python/flash8/a.py", "hopper/b.cuh", "bench/hopper_facts/c.cu"):
        (tmp_path / name).write_text("2")
        digests.add(pack.source_digest(tmp_path))
    (tmp_path / "python/flash8/a.py").rename(tmp_path / "python/flash8/b.py")
    digests.add(pack.source_digest(tmp_path))
    assert len(digests) == 5
    (tmp_path / "python/flash8/c.pyc").write_text("compiled")
    assert pack.source_digest(tmp_path) in digests


def test_results_of_a_record_are_written_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    rows = [
        {"name": "a", "detail": "ok", "result_file": "bench/results/a.json", "result": [1]},
        {"name": "b", "detail": "ok", "result_file": "build/b.json", "result": [2]},
        {"name": "c", "detail": "skipped", "result_file": "bench/results/c.json", "result": None},
        {"name": "d", "detail": "ok", "result_file": None, "result": None},
    ]
    (tmp_path / "record.json").write_text(json.dumps({"steps": rows}))
    assert gpu_check.unpack(tmp_path / "record.json") == 0
    assert [x.name for x in (tmp_path / "bench" / "results").iterdir()] == ["a.json"]


def test_the_extension_of_this_python_loads_and_others_are_told_apart(tmp_path, monkeypatch):
    built = Path(_native.__file__)
    assert built.name == f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert gpu_extension.trouble(built) is None
    target = gpu_extension.extension_path(tmp_path)
    assert target.name == built.name
    assert gpu_extension.trouble(target) == f"the pack has no {built.name}"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"no library")
    assert "ImportError" in gpu_extension.trouble(target)
    monkeypatch.setattr(gpu_extension, "package_version", lambda: "9.9")
    assert f", not 9.9 {_native.ABI_VERSION}" in gpu_extension.trouble(built)


def test_the_extension_is_built_from_all_of_its_sources():
    assert set(pack.native_sources()) == set((ROOT / "python" / "native").rglob("*.cpp"))
    assert {ROOT / "hopper", ROOT / "python" / "native"} < set(pack.native_includes())
    assert all(folder.is_dir() for folder in pack.native_includes())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_extension_builds_by_the_compiler_alone(tmp_path):
    import pybind11

    (tmp_path / "pybind11").mkdir()
    (tmp_path / "pybind11" / "include").symlink_to(pybind11.get_include())
    (tmp_path / "site" / "flash8").mkdir(parents=True)
    script = ROOT / "bench" / "gpu_extension.py"
    for words in ("built, and loads", "of the pack loads"):
        command = [sys.executable, str(script), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr

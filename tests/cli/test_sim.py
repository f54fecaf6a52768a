"""`flash8 sim`: the command of an installed simulator, with flash8's kernels."""

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import flash8
import flash8_cli
from flash8 import _native
from flash8.backends.hopper import backward, forward
from flash8.backends.hopper.variants import SHIPPED
from flash8.cli import sim
from repository import DOCS, TESTS
from simulated_device import missing_compiler

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize(
    "variant", ["forward_bf16_d128_causal", "forward_e4m3_d128_vcolmajor_headscales"]
)
def test_a_kernel_runs_and_its_timeline_is_drawn(variant, tmp_path):
    picture, trace = tmp_path / "timeline.png", tmp_path / "trace.json"
    arguments = ["--seqlen-q", "130", "--seqlen-k", "200", "--output", picture, "--trace", trace]
    command = [sys.executable, "-P", "-m", "flash8", "sim", variant, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(PNG)
    categories = {event["cat"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert categories == {"run", "wait", "tensor", "engine"}
    first, second, *rest = done.stdout.splitlines()
    assert first.startswith(f"{variant}: seqlen_q 130, seqlen_k 200, heads 1, CTA 0 of 1")
    words, error = second.rsplit(maxsplit=1)
    assert words.startswith("no finding; |O - O of the CPU backend| is at most")
    assert 0 < float(error) < 0.05
    assert any(line.startswith("warpgroup 2: ") for line in rest)


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_of_a_backward_its_main_kernel_is_drawn(tmp_path):
    """Which is not what is launched last. A part of it, if that is asked for."""
    trace = tmp_path / "trace.json"
    arguments = ["--seqlen-q", "130", "--seqlen-k", "200", "--ctas", "2", "--span", "2000", "5000"]
    arguments += ["--output", tmp_path / "timeline.png", "--trace", trace]
    command = [sys.executable, "-P", "-m", "flash8", "sim", "backward_bf16_d128_causal"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "timeline.png").read_bytes().startswith(PNG)
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}  # blocks of keys
    products = {event["name"] for event in events if event["cat"] == "tensor"}
    assert products == {"m64n64k16.f32.bf16.bf16", "m64n128k16.f32.bf16.bf16, A in registers"}
    words, error = done.stdout.splitlines()[1].rsplit(maxsplit=1)
    assert words.startswith("no finding; |gradients - those of the CPU backend| is at most")
    assert 0 < float(error) < 0.1


@pytest.mark.parametrize("variant", sim._BACKWARDS, ids=lambda variant: variant.name)
def test_the_call_has_gradients_by_the_variant(variant):
    call = sim.draw(variant, 130, 200, 2, seed=0)
    options = sim._options(variant, call)._replace(deterministic=variant.deterministic)
    given = (call["q"], call["k"], call["v"])
    assert backward.refusal(*given, None, options) is None
    assert backward.choose(*given, options) == variant


@pytest.mark.parametrize("variant", sim._FORWARDS, ids=lambda variant: variant.name)
def test_the_call_is_the_variants(variant):
    """But for what a heuristic adds: whether heads are packed, and clusters."""
    call = sim.draw(variant, 130, 200, 2, seed=0)
    q, k, v, options = sim.describe(variant, call)
    assert forward.refusal(q, k, v, None, options) is None
    chosen = forward.choose(q, k, v, options)
    names = ("dtype", "cache", "head_dim", "head_dim_v", "mask", "softcap", "scales", "v_colmajor")
    for name in names:
        assert getattr(chosen, name) == getattr(variant, name), name
    assert q.shape[2] == (8 if variant.pack_gqa else 2)


def test_an_unknown_kernel_lists_the_others(capsys):
    with pytest.raises(SystemExit, match="2"):
        flash8_cli.main(["sim", "forward_fp4_d128"])
    assert "forward_bf16_d128_causal" in capsys.readouterr().err


def test_without_a_simulator_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    assert flash8_cli.main(["sim", "forward_bf16_d128_causal"]) == 1
    said = capsys.readouterr().err
    assert "flash8-sim" in said and "pip install tests/simulator" in said
    assert (TESTS / "simulator" / "pyproject.toml").is_file()


def test_a_simulator_that_lacks_a_package_says_so(monkeypatch, capsys):
    entry = metadata.EntryPoint("sim", "a_package_that_is_absent:main", "flash8.commands")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: (entry,))
    assert flash8_cli.main(["sim", "x"]) == 1
    assert "a_package_that_is_absent" in capsys.readouterr().err


def test_the_command_gets_what_follows_sim(monkeypatch):
    got = []

    class Entry:
        def load(self):
            return lambda arguments, kernels: got.append((arguments, kernels.names)) or 3

    monkeypatch.setattr(metadata, "entry_points", lambda **_: (Entry(),))
    assert flash8_cli.main(["sim", "a", "--b", "--help"]) == 3
    names = tuple(v.name for v in (*sim._FORWARDS, *sim._BACKWARDS))
    assert got == [(["a", "--b", "--help"], names)]


def test_another_driver_in_this_process_is_named(monkeypatch, tmp_path):
    class Opened:
        path = "libcuda.so.1"

    monkeypatch.setattr(_native, "Driver", type("Driver", (), {"process": staticmethod(Opened)}))
    monkeypatch.setitem(os.environ, "FLASH8_DRIVER", "")
    options = argparse.Namespace(kernel=SHIPPED[0].name)
    with pytest.raises(RuntimeError, match=r"libcuda\.so\.1"):
        sim.Kernels().run(options, tmp_path / "libcuda_sim.so")


def test_the_package_itself_has_no_simulator():
    for path in Path(flash8.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for word in ("libcuda_sim", "import simulat", "import flash8_sim", "from flash8_sim"):
            assert word not in text, path


def test_the_document_has_the_example_of_the_simulators_readme():
    """Which a test of that project runs."""
    readme = (TESTS / "simulator" / "README.md").read_text()
    example = readme.partition("<!-- example -->")[2].partition("```\n")[0]
    assert example.count("\n") > 8 and example in (DOCS / "simulator.md").read_text()

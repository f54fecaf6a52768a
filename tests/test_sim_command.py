"""`flash8 sim`: found outside the package, runs a kernel, draws its timeline."""

import json
from pathlib import Path

import pytest

from flash8 import cli
from simulated_device import missing_compiler

TESTS = Path(__file__).resolve().parent
PNG = b"\x89PNG\r\n\x1a\n"

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


@needs_compiler
def test_a_kernel_runs_and_its_timeline_is_drawn(tmp_path, capsys):
    picture, trace = tmp_path / "timeline.png", tmp_path / "trace.json"
    arguments = ["--seqlen-q", "130", "--seqlen-k", "200", "--output", str(picture)]
    command = ["sim", "--simulator", str(TESTS), "forward_bf16_d128_causal", *arguments]
    assert cli.main([*command, "--trace", str(trace)]) == 0
    assert picture.read_bytes().startswith(PNG)
    categories = {event["cat"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert categories == {"run", "wait", "tensor", "engine"}
    said = capsys.readouterr().out
    assert "no finding" in said and "warpgroup 2: " in said


@needs_compiler
def test_what_cannot_be_drawn_is_an_error(tmp_path, capsys):
    command = ["sim", "--simulator", str(TESTS), "forward_bf16_d128_causal", "--cta", "7"]
    assert cli.main([*command, "--output", str(tmp_path / "x.png")]) == 1
    assert "no CTA 7" in capsys.readouterr().err


def test_an_unknown_variant_lists_the_others(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sim", "--simulator", str(TESTS), "forward_fp4_d128"])
    assert "forward_bf16_d128_causal" in capsys.readouterr().err


def test_a_folder_without_a_simulator_says_what_to_name(tmp_path, monkeypatch, capsys):
    assert cli.main(["sim", "--simulator", str(tmp_path), "x"]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path) in said and "FLASH8_SIMULATOR" in said and "checkout" in said
    monkeypatch.setenv("FLASH8_SIMULATOR", str(tmp_path / "other"))
    assert cli.main(["sim", "x"]) == 1
    assert str(tmp_path / "other") in capsys.readouterr().err


def test_a_simulator_that_lacks_a_package_says_so(tmp_path, capsys):
    (tmp_path / "sim_command.py").write_text("import a_package_that_is_absent\n")
    assert cli.main(["sim", "--simulator", str(tmp_path)]) == 1
    assert "a_package_that_is_absent" in capsys.readouterr().err


def test_the_package_itself_has_no_simulator():
    for path in (TESTS.parent / "python").rglob("*.py"):
        text = path.read_text()
        assert "libcuda_sim" not in text and "import simulat" not in text, path


def test_a_checkout_is_found_from_its_root(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "sim_command.py").write_text(
        "def main(arguments):\n    return len(arguments)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sim", "a", "--b"]) == 2

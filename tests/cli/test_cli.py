"""The command line, through the entry point, `python -m` and the function behind both."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import flash8
import flash8_cli
from flash8.backends.describe import describe


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flash8", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_version():
    result = run_cli("--version")
    assert (result.returncode, result.stdout) == (0, f"flash8 {flash8.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compile", "--help"], ["check", "--help"], ["--version"]]
)
def test_help_waits_for_no_torch(arguments):
    """It takes a tenth of a second; torch alone is ten times that."""
    code = (
        "import sys, flash8_cli\n"
        "try:\n"
        "    flash8_cli.main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'flash8', 'numpy'} & {*sys.modules}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "flash8" in done.stdout


def test_console_script_is_main():
    scripts = list(metadata.entry_points(name="flash8", group="console_scripts"))
    if not scripts:
        pytest.skip("flash8 is imported from its sources, not installed (use `make test`)")
    assert scripts[0].load() is flash8_cli.main


def test_info_names_versions_driver_and_every_service(capsys):
    assert flash8_cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert flash8.__version__ in text
    assert torch.__version__ in text
    assert re.search(r"^driver ", text, re.MULTILINE)
    for row in describe():
        assert re.search(
            rf"^{re.escape(row.call)} +{row.backend} +{re.escape(row.reason)}$", text, re.MULTILINE
        )


def test_info_says_why_there_is_no_driver():
    result = run_cli("info", FLASH8_DRIVER="/nowhere/libcuda_absent.so")
    assert result.returncode == 0
    assert re.search(
        r"^driver +none: .*libcuda_absent\.so.*No such file", result.stdout, re.MULTILINE
    )


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info", "--loud"], ["compile"]])
def test_bad_arguments_print_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        flash8_cli.main(arguments)
    assert "usage: flash8" in capsys.readouterr().err

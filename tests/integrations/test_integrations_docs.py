"""Runs the snippets of docs/integrations.md and the scripts of examples/distributed."""

import os
import re
import subprocess
import sys

import pytest

from repository import ROOT

DOCUMENT = ROOT / "docs" / "integrations.md"
EXAMPLES = ROOT / "examples" / "distributed"
SCRIPTS = ("fsdp2", "megatron_thd", "ulysses")
RUN_SCRIPTS = """
import runpy, sys
folder, *scripts = sys.argv[1:]
sys.path.insert(0, folder)
for script in scripts:
    runpy.run_path(f"{folder}/{script}.py", run_name="__main__")
"""

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def sections():
    """{heading: all the Python of the section}."""
    found = {}
    for section in DOCUMENT.read_text().split("\n## ")[1:]:
        snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if snippets:
            found[section.splitlines()[0]] = "\n".join(snippets)
    return found


@pytest.mark.parametrize("heading", sections())
def test_snippets(heading):
    code = sections()[heading]
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    if "activate_flash_attention_impl" in code:
        pytest.importorskip("torch.nn.attention._registry", reason="torch is older than 2.11")
    exec(compile(code, f"{DOCUMENT.name}: {heading}", "exec"), {"__name__": "snippet"})


def test_distributed_examples():
    """The scripts compare their results with one process and fail if they differ. One interpreter
    runs them all, for importing torch is most of the work."""
    command = [sys.executable, "-c", RUN_SCRIPTS, str(EXAMPLES), *SCRIPTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    differences = re.findall(r"largest difference from one process.*: \d", result.stdout)
    assert len(differences) == len(SCRIPTS)


def test_every_script_is_listed():
    runnable = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert runnable == set(SCRIPTS)
    assert all(f"{name}.py" in DOCUMENT.read_text() for name in runnable)

"""What the package says where something is missing, and that it needs nothing of flash8."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flash8_sim
from flash8_sim import nvcc

FOLDER = Path(flash8_sim.__file__).parent


def test_sources_without_a_library_say_what_to_install(tmp_path: Path) -> None:
    """As in a shell in the folder of the project."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(FOLDER, tmp_path / "flash8_sim", ignore=without)
    code = "import flash8_sim; flash8_sim.Simulator()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and f"pip install {tmp_path}" in done.stderr


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    with pytest.raises(flash8_sim.CompilerNotFoundError, match="pip install nvidia-cuda-nvcc"):
        flash8_sim.compile_ptx("kernel.cu")


def test_a_file_that_does_not_compile_gives_the_compilers_words(tmp_path: Path) -> None:
    if nvcc.find_nvcc() is None:
        pytest.skip("there is no nvcc")
    (tmp_path / "kernel.cu").write_text("__global__ void k() { undeclared = WORD; }")
    with pytest.raises(RuntimeError, match='"undeclared" is undefined'):
        flash8_sim.compile_ptx(tmp_path / "kernel.cu", defines={"WORD": 1})


def test_it_imports_nothing_of_flash8() -> None:
    for path in FOLDER.rglob("*.py"):
        text = path.read_text()
        assert "import flash8\n" not in text and "from flash8 " not in text, path
        assert "from flash8." not in text and "import flash8." not in text, path

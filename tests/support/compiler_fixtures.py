"""Fixtures of the compiler's tests: a cache of their own, and a compiler that copies."""

import sys
import tempfile
from pathlib import Path

import pytest

from flash8.compiler import Unit, compile_unit, toolchain

FAKE = Path(__file__).resolve().parent / "fake_nvcc"

LOG = """\
//LOG ptxas info    : 0 bytes gmem
//LOG ptxas info    : Compiling entry function 'forward' for 'sm_90a'
//LOG ptxas info    : Function properties for forward
//LOG     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
//LOG ptxas info    : Used 168 registers, used 6 barriers, 1024 bytes smem
"""


class Workshop:
    """A folder with a kernel, a header and a cache; the fake compiler compiles it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.source = folder / "kernel.cu"
        self.header = folder / "tile.h"
        self.log = folder / "nvcc.log"
        self.temporary = folder.parent / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.source.write_text(f'#include "tile.h"\n{LOG}')
        self.header.write_text("// a tile\n")
        self.log.write_text("")

    def unit(self, **defines: str) -> Unit:
        return Unit(self.source, tuple(defines.items()))

    def compile(self, **defines: str):
        return compile_unit(self.unit(**defines))

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().splitlines())


def install_fake_compiler(folder: Path) -> Path:
    """Executables nvcc and ptxas in `folder` that run the scripts with this very Python."""
    for name in ("nvcc", "ptxas"):
        tool = folder / name
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{FAKE / name}.py" "$@"\n')
        tool.chmod(0o755)
    return folder / "nvcc"


def set_temporary_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    folder = tmp_path / "work shop"
    folder.mkdir()
    shop = Workshop(folder)
    monkeypatch.setenv("FLASH8_NVCC", str(install_fake_compiler(folder)))
    monkeypatch.setenv("FLASH8_CACHE", str(shop.cache))
    monkeypatch.setenv("FAKE_NVCC_LOG", str(shop.log))
    for name in ("FLASH8_COMPILE", "FLASH8_COMPILE_TIMEOUT", "FLASH8_CUTLASS"):
        monkeypatch.delenv(name, raising=False)
    set_temporary_folder(monkeypatch, shop.temporary)
    toolchain._version.cache_clear()
    return shop

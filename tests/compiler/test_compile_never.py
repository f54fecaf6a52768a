"""A filled cache serves where there is no compiler; and headers that change while it runs."""

import os
import shutil

import pytest

from compiler_fixtures import install_fake_compiler
from flash8.compiler import (
    CompileError,
    CompilerNotFoundError,
    MissingVariantError,
    Unit,
    compile_unit,
    kernel_image,
    reads,
    toolchain,
)

pytest_plugins = ["compiler_fixtures"]


@pytest.fixture
def with_cutlass(workshop, monkeypatch):
    """A kernel that includes a header of its own and one of CUTLASS."""
    cutlass = workshop.folder / "cutlass"
    cutlass.mkdir()
    (cutlass / "cute.h").write_text("// cute\n")
    workshop.source.write_text(workshop.source.read_text() + '#include "cute.h"\n')
    elsewhere = workshop.folder.parent / "cutlass"
    cutlass.rename(elsewhere)
    monkeypatch.setenv("FLASH8_CUTLASS", str(elsewhere))
    return workshop


def remove_compiler(workshop, monkeypatch):
    for name in ("nvcc", "ptxas"):
        (workshop.folder / name).unlink()
    shutil.rmtree(workshop.folder.parent / "cutlass", ignore_errors=True)
    monkeypatch.delenv("FLASH8_CUTLASS", raising=False)
    monkeypatch.setenv("PATH", "")
    toolchain._version.cache_clear()


@pytest.mark.parametrize("mode", ["never", "auto"])
def test_a_filled_cache_needs_no_compiler(with_cutlass, monkeypatch, mode):
    filled = with_cutlass.compile(A="1")
    remove_compiler(with_cutlass, monkeypatch)
    monkeypatch.setenv("FLASH8_COMPILE", mode)
    assert with_cutlass.compile(A="1").folder == filled.folder
    assert kernel_image(with_cutlass.unit(A="1"), "cubin") == filled.cubin.read_bytes()
    missing = MissingVariantError if mode == "never" else CompilerNotFoundError
    with pytest.raises(missing):
        with_cutlass.compile(A="2")
    with_cutlass.header.write_text("// another tile\n")
    with pytest.raises(missing):
        with_cutlass.compile(A="1")
    with_cutlass.header.unlink()
    with pytest.raises(missing):
        with_cutlass.compile(A="1")


def test_the_latest_compiler_is_preferred(workshop, monkeypatch):
    folders = []
    for version in ("V9", "V1", "V5"):
        monkeypatch.setenv("FAKE_NVCC_VERSION", version)
        toolchain._version.cache_clear()
        folders.append(workshop.compile().folder)
    assert len(set(folders)) == 3
    remove_compiler(workshop, monkeypatch)
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    assert workshop.compile().folder == folders[-1]
    shutil.rmtree(folders[-1])
    assert workshop.compile().folder == folders[-2]


def test_never_compiling_starts_no_compiler(workshop, monkeypatch):
    workshop.compile()
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    (workshop.folder / "nvcc").write_text(f'#!/bin/sh\ntouch "{workshop.folder}/started"\n')
    toolchain._version.cache_clear()
    assert workshop.compile().seconds == 0
    assert not (workshop.folder / "started").exists()


def test_the_same_device_code_elsewhere_is_served(workshop, monkeypatch):
    """A cache filled by one installation is good for another, by another path."""
    found = []
    for place in ("one", "another"):
        root = workshop.folder / place
        for name in ("hopper", "cutlass_kernels"):
            (root / name).mkdir(parents=True)
        (root / "hopper" / "kernel.cu").write_text('#include "tile.h"\n')
        (root / "hopper" / "tile.h").write_text("// a tile\n")
        for name in ("kernel_root", "cutlass_root"):
            folder = root / ("hopper" if name == "kernel_root" else "cutlass_kernels")
            monkeypatch.setattr(reads, name, lambda folder=folder: folder)
        found.append(compile_unit(Unit(root / "hopper" / "kernel.cu")).folder)
    assert found[0] == found[1]
    assert workshop.compilations == 1


def test_the_same_compiler_elsewhere_is_served(workshop, monkeypatch):
    """Its headers, and CUTLASS, by another path: what they contain decides."""
    workshop.source.write_text(workshop.source.read_text() + '#include "cute.h"\n')
    found = {}
    for place, text in (("one", "// cute\n"), ("another", "// cute\n"), ("third", "// new\n")):
        cutlass = workshop.folder.parent / place / "cutlass"
        cutlass.mkdir(parents=True)
        (cutlass / "cute.h").write_text(text)
        monkeypatch.setenv("FLASH8_CUTLASS", str(cutlass))
        tools = workshop.folder.parent / place / "bin"
        tools.mkdir()
        monkeypatch.setenv("FLASH8_NVCC", str(install_fake_compiler(tools)))
        found[place] = workshop.compile().folder
    assert found["one"] == found["another"] != found["third"]
    assert workshop.compilations == 2


@pytest.mark.parametrize("variable", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"])
def test_what_nvcc_takes_from_the_environment_is_part_of_the_key(workshop, monkeypatch, variable):
    workshop.compile()
    monkeypatch.setenv(variable, "-G")
    workshop.compile()
    assert workshop.compilations == 2


# ---- headers that change ----


def test_a_header_that_changes_with_its_old_time_is_compiled_again(workshop, monkeypatch):
    monkeypatch.setenv("FAKE_NVCC_TOUCH", str(workshop.header))
    monkeypatch.setenv("FAKE_NVCC_KEEP_TIME", "1")
    assert "changed meanwhile" in workshop.compile().ptx.read_text()
    assert workshop.compilations == 2
    assert workshop.compile().seconds == 0


def test_a_header_of_elsewhere_that_changes_is_compiled_again(with_cutlass, monkeypatch):
    """Nothing told before that it would be read."""
    header = with_cutlass.folder.parent / "cutlass" / "cute.h"
    monkeypatch.setenv("FAKE_NVCC_TOUCH", str(header))
    monkeypatch.setenv("FAKE_NVCC_KEEP_TIME", "1")
    assert "changed meanwhile" in with_cutlass.compile().ptx.read_text()
    assert with_cutlass.compilations == 2


def test_a_header_that_changes_after_the_compilation_does_not_get_its_entry(workshop, monkeypatch):
    """The entry is of the text that was compiled, not of the one that lies there by now."""
    from flash8.compiler import store

    fsync = os.fsync

    def edited(descriptor):
        workshop.header.write_text("// edited at the last moment\n")
        fsync(descriptor)

    monkeypatch.setattr(store.os, "fsync", edited)
    old = workshop.compile().ptx.read_text()
    monkeypatch.setattr(store.os, "fsync", fsync)
    assert "// a tile" in old
    assert "edited at the last moment" in workshop.compile().ptx.read_text()


def test_headers_that_never_rest_are_an_error(workshop):
    nvcc = workshop.folder / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("exec", f'echo >> "{workshop.header}"\nexec'))
    with pytest.raises(CompileError, match=r"the files that kernel\.cu reads keep changing"):
        workshop.compile()
    assert workshop.compilations == 3

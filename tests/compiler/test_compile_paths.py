"""Folders with names that a shell, a make rule or an encoding would trip over."""

import os
import subprocess
from pathlib import Path

import pytest

import light_process
from compiler_fixtures import LOG, install_fake_compiler, set_temporary_folder
from flash8.compiler import CompileError, Unit, compile_unit, toolchain
from flash8.compiler.build import parse_depfile
from flash8_cli import main
from simulated_device import missing_compiler

pytest_plugins = ["compiler_fixtures"]

#: Without a slash and NUL, which no name has.
ODD = [
    "col: on",
    "dollar$x $(touch PWNED)",
    "back\\slash\\ ",
    "quo\"t'e",
    "new\nline",
    "tick`touch PWNED`",
    os.fsdecode(b"no text \xff"),
    "ümläut",
    "#semi;&|<>(*)~=,%",
]
NAMES = range(len(ODD))


def make(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("odd", ODD, ids=NAMES)
def test_every_folder_may_have_an_odd_name(workshop, monkeypatch, tmp_path, odd):
    """The cache, the sources, the compiler, CUTLASS and the temporary files."""
    shop = make(tmp_path / odd)
    source = make(shop / "source") / "kernel.cu"
    source.write_text(f'#include "tile.h"\n#include "cute.h"\n{LOG}')
    (source.parent / "tile.h").write_text("// a tile\n")
    (make(shop / "cutlass") / "cute.h").write_text("// cute\n")
    nvcc = install_fake_compiler(make(shop / "bin"))
    monkeypatch.setenv("FLASH8_NVCC", str(nvcc))
    monkeypatch.setenv("FLASH8_CUTLASS", str(shop / "cutlass"))
    monkeypatch.setenv("FLASH8_CACHE", str(shop / "cache"))
    set_temporary_folder(monkeypatch, make(shop / "temporary"))
    toolchain._version.cache_clear()
    unit = Unit(source)
    compiled = compile_unit(unit)
    assert "// a tile" in compiled.ptx.read_text() and "// cute" in compiled.ptx.read_text()
    assert compiled.folder.is_relative_to(shop / "cache")
    assert compile_unit(unit).seconds == 0
    for header in (source.parent / "tile.h", shop / "cutlass" / "cute.h"):
        header.write_text(f"// another {header.name}\n")
        assert f"// another {header.name}\n" in compile_unit(unit).ptx.read_text()
    assert workshop.compilations == 3
    assert list((shop / "temporary").iterdir()) == []


@pytest.mark.parametrize("odd", ODD, ids=NAMES)
def test_a_source_may_have_an_odd_name(workshop, odd):
    source = workshop.folder / f"{odd}.cu"
    source.write_text(f'#include "tile.h"\n{LOG}')
    assert "// a tile" in compile_unit(Unit(source)).ptx.read_text()
    assert compile_unit(Unit(source)).seconds == 0


def test_names_that_are_no_text_can_be_shown(workshop, monkeypatch, tmp_path):
    odd = tmp_path / os.fsdecode(b"\xff")
    monkeypatch.setenv("FLASH8_CACHE", str(odd / "cache"))
    source = make(odd) / os.fsdecode(b"\xfe.cu")
    source.write_text(workshop.source.read_text().replace("tile.h", str(workshop.header)))
    command = light_process.command(
        "from flash8_cli import main; sys.exit(main(['compile', sys.argv[1]]))", str(source)
    )
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\xfe.cu" in done.stdout and "\\xff/cache" in done.stdout
    source.write_text("REFUSE\n")
    with pytest.raises(CompileError, match=r"nvcc refused \\xfe\.cu"):
        compile_unit(Unit(source))
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    assert main(["compile", str(source)]) == 1


def test_without_a_plain_folder_the_refusal_says_what_is_needed(workshop, monkeypatch, tmp_path):
    from flash8.compiler import places

    odd = make(tmp_path / "a b")
    set_temporary_folder(monkeypatch, odd)
    monkeypatch.setattr(places, "_bases", lambda cache: iter([odd]))
    with pytest.raises(OSError, match=r"whose path has only letters.*TMPDIR is '.*/a b'"):
        workshop.compile()


def test_the_rule_that_gcc_writes_is_read(tmp_path):
    text = rb"""kernel.ptx : \
    /usr/include/a.h \
  source/b\ b.h \
 /c\#c.h /d$$d.h /e:\ e.h /f\f.h
"""
    names = [path.name for path in parse_depfile(text, tmp_path)]
    assert sorted(names) == ["a.h", "b b.h", "c#c.h", "d$d.h", "e: e.h", "f\\f.h"]
    assert tmp_path / "source" / "b b.h" in parse_depfile(text, tmp_path)


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_the_real_compiler_takes_them_too(monkeypatch, tmp_path):
    shop = make(tmp_path / "".join(odd for odd in ODD))
    source = make(shop / "source") / "kernel.cu"
    source.write_text('#include "tile.h"\n__global__ void f(int* x) { *x = TILE; }\n')
    (source.parent / "tile.h").write_text("#define TILE 12321\n")
    monkeypatch.setenv("FLASH8_CACHE", str(make(shop / "cache")))
    monkeypatch.delenv("FLASH8_COMPILE", raising=False)
    set_temporary_folder(monkeypatch, make(shop / "temporary"))
    found = toolchain.find_toolchain()
    compiler = shop / "cu13"
    compiler.symlink_to(found.nvcc.parent.parent)
    monkeypatch.setenv("FLASH8_NVCC", str(compiler / "bin" / "nvcc"))
    monkeypatch.chdir(shop)
    assert "12321" in compile_unit(Unit(source)).ptx.read_text()
    (source.parent / "tile.h").write_text("#define TILE 45654\n")
    assert "45654" in compile_unit(Unit(source)).ptx.read_text()
    assert not list(tmp_path.rglob("PWNED"))

"""The compile path and its cache, with a compiler that copies."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import light_process
from flash8.backends.hopper import kernels
from flash8.compiler import (
    CompileError,
    CompilerNotFoundError,
    MissingVariantError,
    Unit,
    compile_unit,
    find_toolchain,
    toolchain,
)
from flash8_cli import main

pytest_plugins = ["compiler_fixtures"]

COMPILE_IN_A_PROCESS = """
import sys
from pathlib import Path
from flash8.compiler import Unit, compile_unit
print(compile_unit(Unit(Path(sys.argv[1]))).cubin)
"""


def start_process(workshop) -> subprocess.Popen[str]:
    command = light_process.command(COMPILE_IN_A_PROCESS, str(workshop.source))
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


# ---- what is compiled when ----


def test_the_first_use_compiles_and_the_second_does_not(workshop):
    first = workshop.compile(kBlockM="128", FAST="")
    second = workshop.compile(kBlockM="128", FAST="")
    assert workshop.compilations == 1
    assert first.seconds > 0 == second.seconds
    assert first.folder == second.folder
    assert "-DkBlockM=128 -DFAST\n" in first.ptx.read_text()
    assert first.cubin.read_text() == "cubin of\n" + first.ptx.read_text()
    assert first.report.kernels[0].registers == 168


def test_defines_are_part_of_the_key(workshop):
    folders = {workshop.compile(kBlockM=size).folder for size in ("64", "128", "64")}
    assert len(folders) == 2
    assert workshop.compilations == 2


def test_a_header_that_changes_is_noticed_and_its_old_text_too(workshop):
    before = workshop.compile()
    workshop.header.write_text("// another tile\n")
    after = workshop.compile()
    assert "another tile" in after.ptx.read_text()
    workshop.header.write_text("// a tile\n")
    again = workshop.compile()
    assert again.folder == before.folder != after.folder
    assert workshop.compilations == 2


def test_a_header_of_a_header_counts(workshop):
    (workshop.folder / "deep.h").write_text("// one\n")
    workshop.header.write_text('#include "deep.h"\n')
    workshop.compile()
    (workshop.folder / "deep.h").write_text("// two\n")
    assert "// two" in workshop.compile().ptx.read_text()


def test_a_file_that_is_not_read_does_not_count(workshop):
    workshop.compile()
    (workshop.folder / "other.h").write_text("// other\n")
    workshop.compile()
    assert workshop.compilations == 1


def test_another_compiler_compiles_again(workshop, monkeypatch):
    workshop.compile()
    monkeypatch.setenv("FAKE_NVCC_VERSION", "V2")
    toolchain._version.cache_clear()
    workshop.compile()
    assert workshop.compilations == 2


def test_a_header_that_changes_during_the_compilation_is_compiled_again(workshop, monkeypatch):
    monkeypatch.setenv("FAKE_NVCC_TOUCH", str(workshop.header))
    assert "changed meanwhile" in workshop.compile().ptx.read_text()
    assert workshop.compilations == 2
    workshop.compile()
    assert workshop.compilations == 2


@pytest.mark.parametrize("name", ["kernel.cubin", "kernel.ptx", "sums.json"])
def test_a_damaged_entry_is_compiled_again(workshop, name):
    path = workshop.compile().folder / name
    path.write_text(path.read_text()[:-3])
    assert workshop.compile().cubin.read_text().startswith("cubin of\n")
    assert workshop.compilations == 2


def test_a_lost_file_is_compiled_again(workshop):
    workshop.compile().cubin.unlink()
    assert workshop.compile().cubin.is_file()


def test_a_lost_index_is_compiled_again(workshop):
    workshop.compile()
    for path in (workshop.cache / "index").iterdir():
        path.write_text("[")
    assert workshop.compile().cubin.is_file()


# ---- many at once ----


def test_threads_share_one_compilation(workshop, monkeypatch):
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "0.2")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: workshop.compile(), range(8)))
    assert workshop.compilations == 1
    assert len({result.folder for result in results}) == 1


def test_processes_share_one_compilation(workshop, monkeypatch):
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "0.5")
    processes = [start_process(workshop) for _ in range(2)]
    cubins = {process.communicate(timeout=60)[0] for process in processes}
    assert len(cubins) == 1
    assert workshop.compilations == 1


def test_a_killed_process_leaves_neither_a_lock_nor_half_an_entry(workshop, monkeypatch):
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "60")
    process = start_process(workshop)
    while workshop.compilations == 0:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (workshop.cache / "objects").exists()
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "0")
    assert workshop.compile().cubin.is_file()


# ---- what is refused ----


def test_a_refused_source_has_the_compilers_words_and_is_not_cached(workshop):
    workshop.source.write_text("REFUSE\n")
    for _ in range(2):
        with pytest.raises(
            CompileError, match=r"nvcc refused kernel\.cu -DX=1 \(exit status 2\)"
        ) as caught:
            workshop.compile(X="1")
        assert "error: the word REFUSE" in str(caught.value)
        assert "the word REFUSE" in caught.value.log
    assert not (workshop.cache / "objects").exists()
    assert list((workshop.cache / "tmp").iterdir()) == []


def test_never_compiling_names_the_kernel_and_the_way_out(workshop, monkeypatch):
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    with pytest.raises(
        MissingVariantError, match=r"kernel\.cu -DX=1 is not in the cache .*flash8 compile"
    ):
        workshop.compile(X="1")
    assert workshop.compilations == 0


def test_never_compiling_still_reads_the_cache(workshop, monkeypatch):
    first = workshop.compile()
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    assert workshop.compile().folder == first.folder
    workshop.header.write_text("// another tile\n")
    with pytest.raises(MissingVariantError):
        workshop.compile()


def test_never_compiling_without_a_compiler_is_a_missing_variant(workshop, monkeypatch):
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    monkeypatch.setenv("FLASH8_NVCC", "/nowhere/nvcc")
    with pytest.raises(MissingVariantError):
        workshop.compile()


def test_an_unknown_mode_is_refused(workshop, monkeypatch):
    monkeypatch.setenv("FLASH8_COMPILE", "maybe")
    with pytest.raises(
        ValueError, match="FLASH8_COMPILE is 'maybe'; supported are 'auto' and 'never'"
    ):
        workshop.compile()


def test_a_missing_source_is_named(workshop):
    workshop.source.unlink()
    with pytest.raises(FileNotFoundError, match=r"source is .*kernel\.cu; there is no such file"):
        compile_unit(workshop.unit())


# ---- the compiler ----


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """No compiler anywhere; gives the folder that plays site-packages."""
    for name in ("FLASH8_NVCC", "CUDA_HOME", "CUDA_PATH", "FLASH8_CUTLASS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA", tmp_path / "default")
    monkeypatch.setattr(toolchain, "has_nvrtc", lambda: False)  # torch may have brought it
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    toolchain._version.cache_clear()
    return tmp_path / "site"


def install_compiler(prefix):
    (prefix / "bin").mkdir(parents=True)
    for name in ("nvcc", "ptxas"):
        (prefix / "bin" / name).write_text("#!/bin/sh\necho V9\necho build\n")
        (prefix / "bin" / name).chmod(0o755)
    return prefix / "bin" / "nvcc"


def test_without_a_compiler_the_error_says_how_to_install_one(no_compiler):
    with pytest.raises(
        CompilerNotFoundError, match=r"pip install --no-deps nvidia-cuda-nvcc==13\.0\.88"
    ):
        find_toolchain()


def test_pips_compiler_comes_with_pips_cutlass(no_compiler):
    nvcc = install_compiler(no_compiler / "nvidia" / "cu13")
    cutlass = no_compiler / "cutlass_library" / "source" / "include"
    cutlass.mkdir(parents=True)
    found = find_toolchain()
    assert (found.nvcc, found.origin, found.version) == (nvcc, "pip", "V9 build")
    assert found.include_dirs == (cutlass,)


def test_cutlass_can_be_named(no_compiler, monkeypatch, tmp_path):
    install_compiler(no_compiler / "nvidia" / "cu13")
    monkeypatch.setenv("FLASH8_CUTLASS", str(tmp_path))
    assert find_toolchain().include_dirs == (tmp_path,)


def test_the_order_of_the_search(no_compiler, monkeypatch, tmp_path):
    origins = []
    install_compiler(tmp_path / "default")
    origins.append(Path(find_toolchain().origin).name)
    on_path = install_compiler(tmp_path / "on_path")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    origins.append(find_toolchain().origin)
    install_compiler(tmp_path / "home")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    origins.append(find_toolchain().origin)
    install_compiler(no_compiler / "nvidia" / "cu13")
    origins.append(find_toolchain().origin)
    monkeypatch.setenv("FLASH8_NVCC", str(install_compiler(tmp_path / "named")))
    origins.append(find_toolchain().origin)
    assert origins == ["default", "PATH", "CUDA_HOME", "pip", "FLASH8_NVCC"]


def test_a_wrapper_on_path_is_passed_over(no_compiler, monkeypatch, tmp_path):
    wrapper = install_compiler(tmp_path / "wrapper")
    (wrapper.parent / "ptxas").unlink()
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    default = install_compiler(tmp_path / "default")
    assert find_toolchain().nvcc == default


def test_an_incomplete_compiler_is_named(no_compiler, monkeypatch, tmp_path):
    nvcc = install_compiler(tmp_path / "half")
    (nvcc.parent / "ptxas").unlink()
    monkeypatch.setenv("FLASH8_NVCC", str(nvcc))
    with pytest.raises(
        CompilerNotFoundError, match=r"half/bin/ptxas \(from FLASH8_NVCC\) is not an exec"
    ):
        find_toolchain()


# ---- the command line ----


def test_compile_prints_the_table(workshop, capsys):
    assert main(["compile", str(workshop.source), "-D", "kBlockM=128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["unit", "kernel", "registers"]
    assert lines[2].split()[:7] == [
        "kernel.cu",
        "-DkBlockM=128",
        "forward",
        "168",
        "0",
        "0",
        "1024",
    ]
    assert lines[3].startswith("kernel.cu -DkBlockM=128: ")


def test_compile_fails_on_a_spill_and_still_prints_the_table(workshop, capsys):
    text = workshop.source.read_text()
    workshop.source.write_text(text.replace("0 bytes spill stores", "20 bytes spill stores"))
    assert main(["compile", str(workshop.source)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2].split()[:4] == ["kernel.cu", "forward", "168", "20"]
    assert "kernel.cu: forward spills: 20 bytes stored, 0 bytes loaded" in captured.err


def test_compile_reports_a_refusal(workshop, capsys):
    workshop.source.write_text("REFUSE\n")
    assert main(["compile", str(workshop.source)]) == 1
    assert "error: the word REFUSE" in capsys.readouterr().err


class Row:
    """A shipped variant, as far as the command line looks at it."""

    def __init__(self, unit):
        self.unit = lambda: unit


def test_all_compiles_what_ships_and_goes_on_after_a_failure(workshop, monkeypatch, capsys):
    broken = workshop.folder / "broken.cu"
    broken.write_text("REFUSE\n")
    rows = [Row(workshop.unit(A="1")), Row(Unit(broken)), Row(workshop.unit(A="2"))]
    monkeypatch.setattr(kernels, "shipped", lambda: [*rows, Row(workshop.unit(A="3"))])
    assert main(["compile", "--all"]) == 1
    captured = capsys.readouterr()
    rows = [line.split()[1] for line in captured.out.splitlines()[2:5]]
    assert rows == ["-DA=1", "-DA=2", "-DA=3"]
    assert "nvcc refused broken.cu" in captured.err


def test_kernels_are_compiled_by_name(workshop, monkeypatch, capsys):
    shipped = [Row(workshop.unit(A=str(i))) for i in range(3)]
    for i, row in enumerate(shipped):
        row.name = f"forward_d{64 * (i + 1)}"
    monkeypatch.setattr(kernels, "shipped", lambda: shipped)
    assert main(["compile", "forward_d128", "forward_d64", "forward_d128"]) == 0
    rows = [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows == ["-DA=1", "-DA=0"] and workshop.compilations == 2
    source = str(workshop.source)
    for arguments, error in (
        (["forward_d65"], "no shipped kernel is called forward_d65; see forward_d64"),
        (["forward_d64", "-D", "A=1"], "-D goes with a FILE.cu"),
        ([source, "forward_d64"], "goes by itself, got 2 arguments"),
    ):
        assert main(["compile", *arguments]) == 2
        assert error in capsys.readouterr().err
    assert workshop.compilations == 2


def test_all_without_a_compiler_says_so_once(workshop, monkeypatch, capsys):
    monkeypatch.setenv("FLASH8_NVCC", "/nowhere/nvcc")
    monkeypatch.setattr(
        kernels, "shipped", lambda: [Row(workshop.unit(A=str(i))) for i in range(3)]
    )
    assert main(["compile", "--all"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_terminal_sees_progress(workshop, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_NVCC_SLEEP", "0.5")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    workshop.compile()
    shown = capsys.readouterr().err
    assert shown.startswith("\rflash8: compiling kernel.cu ... 0 s")
    assert shown.endswith(" \r")


def test_no_terminal_sees_nothing(workshop, capsys):
    workshop.compile()
    assert capsys.readouterr() == ("", "")

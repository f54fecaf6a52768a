"""Compiles CUDA files, CuTe and CUTLASS among them, for the simulated device."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .simulator import library_path

# NDEBUG: an assertion on the device is a function call, which the simulator does not model.
_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr")
_PTX = ("-ptx", "-arch=compute_90a")
# PTX is embedded, and libcudart_sim.so, which reads it, is the runtime.
_LIBRARY = (
    *("-shared", "-Xcompiler", "-fPIC", "-gencode", "arch=compute_90a,code=compute_90a"),
    *("-no-compress", "-cudart", "none"),
)


class CompilerNotFoundError(RuntimeError):
    """There is no nvcc on this machine."""


def _package_folder(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def find_nvcc() -> Path | None:
    """The compiler: the one that FLASH8_NVCC names, pip's, or PATH's."""
    chosen = os.environ.get("FLASH8_NVCC")
    pip = _package_folder("nvidia")
    if chosen is None and pip is not None and (pip / "cu13" / "bin" / "nvcc").exists():
        chosen = str(pip / "cu13" / "bin" / "nvcc")
    chosen = chosen or shutil.which("nvcc")
    return Path(chosen) if chosen else None


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers: the one that FLASH8_CUTLASS names, or pip's."""
    chosen = os.environ.get("FLASH8_CUTLASS")
    if chosen:
        return Path(chosen)
    package = _package_folder("cutlass_library")
    return package / "source" / "include" if package else None


def compile_ptx(
    source: str | os.PathLike[str],
    *,
    defines: Mapping[str, object] | None = None,
    include: Sequence[str | os.PathLike[str]] = (),
    flags: Sequence[str] = (),
) -> str:
    """The PTX of a CUDA file. CUTLASS's headers are found where they are installed.

    Raises:
        CompilerNotFoundError: there is no nvcc.
        RuntimeError: nvcc's own words, when it refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.ptx"
        _run(source, output, _PTX, defines, include, flags)
        return output.read_text()


def compile_library(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    defines: Mapping[str, object] | None = None,
    include: Sequence[str | os.PathLike[str]] = (),
    flags: Sequence[str] = (),
) -> None:
    """Host and device code of a CUDA file as a library, for `load_library`. Raises as
    `compile_ptx` does."""
    _run(source, Path(output), _LIBRARY, defines, include, flags)


def load_library(path: str | os.PathLike[str]) -> ctypes.CDLL:
    """A library of `compile_library`, whose launches go to the simulated device."""
    ctypes.CDLL(str(library_path().with_name("libcudart_sim.so")), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(os.fspath(path))


def _run(
    source: str | os.PathLike[str],
    output: Path,
    kind: Sequence[str],
    defines: Mapping[str, object] | None,
    include: Sequence[str | os.PathLike[str]],
    flags: Sequence[str],
) -> None:
    nvcc, cutlass = find_nvcc(), find_cutlass()
    if nvcc is None:
        raise CompilerNotFoundError(
            "there is no nvcc: install it (pip install nvidia-cuda-nvcc==13.0.88 and the packages "
            "beside it in compiler.txt of flash8's sources), or name it by FLASH8_NVCC"
        )
    home = nvcc.resolve().parents[1] / "include"
    folders = [*map(Path, include)]
    if cutlass is not None:
        folders += [cutlass, cutlass.parent / "tools" / "util" / "include"]
    folders += [home, home / "cccl"]
    command = [str(nvcc), *_FLAGS, *kind, *flags]
    command += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    command += [*(f"-I{folder}" for folder in folders), os.fspath(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")

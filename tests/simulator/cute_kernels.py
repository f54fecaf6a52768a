"""Compiles the CuTe kernels of kernels/ with nvcc and the CUTLASS headers, for the tests."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import sim as S

KERNELS = S.SOURCE / "kernels"
FLAGS = ["-std=c++17", "-O3", "--use_fast_math", "-DNDEBUG", "--expt-relaxed-constexpr"]
PTX_FLAGS = ["-ptx", "-arch=compute_90a"]
# Host code as well, for kernels that bring their own launcher. libcudart_sim.so is their runtime
# and reads the PTX that is embedded.
LIBRARY_FLAGS = [
    *("-shared", "-Xcompiler", "-fPIC", "-gencode", "arch=compute_90a,code=compute_90a"),
    *("-no-compress", "-cudart", "none"),
]


def package_folder(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def find_nvcc() -> tuple[Path, list[Path]] | None:
    """The compiler (FLASH8_NVCC, pip's, or the system's) and its include folders."""
    chosen = os.environ.get("FLASH8_NVCC")
    pip = package_folder("nvidia")
    if chosen is None and pip is not None and (pip / "cu13" / "bin" / "nvcc").exists():
        chosen = str(pip / "cu13" / "bin" / "nvcc")
    chosen = chosen or shutil.which("nvcc")
    if chosen is None:
        return None
    home = Path(chosen).resolve().parents[1]
    return Path(chosen), [home / "include", home / "include" / "cccl"]


def find_cutlass() -> Path | None:
    chosen = os.environ.get("FLASH8_CUTLASS")
    if chosen:
        return Path(chosen)
    package = package_folder("cutlass_library")
    return package / "source" / "include" if package else None


def _compile(source: Path, out: Path, flags: list[str]) -> Path:
    """`out`, which is kept beside the simulator's build as long as its source does not change."""
    nvcc, cutlass = find_nvcc(), find_cutlass()
    if nvcc is None or cutlass is None:
        pytest.skip("needs nvcc and the CUTLASS headers (pip install 'flash8[compile]')")
    folders = [cutlass, cutlass.parent / "tools" / "util" / "include", *nvcc[1]]
    command = [str(nvcc[0]), *FLAGS, *flags, *(f"-I{folder}" for folder in folders), str(source)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers would otherwise compile it twice
        if not out.exists() or out.stat().st_mtime <= source.stat().st_mtime:
            unfinished = out.with_name(f"unfinished-{out.name}")
            command += ["-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            unfinished.rename(out)
    return out


def compile_ptx(name: str, **defines: int) -> str:
    """PTX of kernels/<name>.cu."""
    stem = "_".join([name, *(f"{k}{v}" for k, v in sorted(defines.items()))])
    options = [*PTX_FLAGS, *(f"-D{k}={v}" for k, v in defines.items())]
    out = S.build_directory() / "ptx" / f"{stem}.ptx"
    return _compile(KERNELS / f"{name}.cu", out, options).read_text()


def load_library(name: str) -> ctypes.CDLL:
    """Host and device code of kernels/<name>.cu, with the simulated device under its runtime."""
    out = S.build_directory() / "ptx" / f"{name}.so"
    library = _compile(KERNELS / f"{name}.cu", out, LIBRARY_FLAGS)
    ctypes.CDLL(str(S.build().with_name("libcudart_sim.so")), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))

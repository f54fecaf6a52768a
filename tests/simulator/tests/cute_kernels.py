"""The CUDA files of kernels/, compiled, and kept as long as their texts do not change."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from flash8_sim import nvcc

KERNELS = Path(__file__).resolve().parent / "kernels"
FLAGS = ["--use_fast_math"]


def _kept(name: str, suffix: str, compile_into: Callable[[Path, Path], None]) -> Path:
    """What `compile_into` makes of a file, in the user's cache."""
    compiler, cutlass = nvcc.find_nvcc(), nvcc.find_cutlass()
    if compiler is None or cutlass is None:
        pytest.skip("needs nvcc and the CUTLASS headers (pip install 'flash8[compile]')")
    source = KERNELS / f"{name.partition('-')[0]}.cu"
    texts = (source.read_text(), Path(nvcc.__file__).read_text(), str(compiler), str(cutlass))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flash8_sim"
    cache.mkdir(parents=True, exist_ok=True)
    out = cache / f"{name}-{digest}{suffix}"
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers would otherwise compile it twice
        if not out.exists():
            unfinished = out.with_name(f"unfinished-{out.name}")
            compile_into(source, unfinished)
            unfinished.rename(out)
    return out


def compile_ptx(name: str, **defines: int) -> str:
    """PTX of kernels/<name>.cu."""

    def compile_into(source: Path, out: Path) -> None:
        out.write_text(nvcc.compile_ptx(source, defines=defines, flags=FLAGS))

    stem = "-".join([name, *(f"{k}{v}" for k, v in sorted(defines.items()))])
    return _kept(stem, ".ptx", compile_into).read_text()


def load_library(name: str) -> ctypes.CDLL:
    """Host and device code of kernels/<name>.cu, with the simulated device under its runtime."""

    def compile_into(source: Path, out: Path) -> None:
        nvcc.compile_library(source, out, flags=FLAGS)

    return nvcc.load_library(_kept(name, ".so", compile_into))

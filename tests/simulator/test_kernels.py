# ruff: noqa: E501 - PTX text reads better unbroken
"""Kernels written with CuTe, compiled to PTX: right answers under every schedule and every check."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sim as S

KERNELS = S.SOURCE / "kernels"
FLAGS = [
    "-ptx",
    "-arch=compute_90a",
    "-std=c++17",
    "-O3",
    "--use_fast_math",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
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


def compile_ptx(source: Path, folder: Path, **defines: int) -> str:
    """PTX of a kernel, kept beside the simulator's build as long as its source does not change."""
    nvcc, cutlass = find_nvcc(), find_cutlass()
    if nvcc is None or cutlass is None:
        pytest.skip("needs nvcc and the CUTLASS headers (pip install 'flash8[compile]')")
    name = "_".join([source.stem, *(f"{k}{v}" for k, v in sorted(defines.items()))])
    out = folder / f"{name}.ptx"
    if out.exists() and out.stat().st_mtime > source.stat().st_mtime:
        return out.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(nvcc[0]), *FLAGS, *(f"-D{k}={v}" for k, v in defines.items()), f"-I{cutlass}"]
    command += [f"-I{folder}" for folder in nvcc[1]] + [str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out.read_text()


def bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << 16).view(np.float32)


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    e, m = (codes >> 3) & 15, codes & 7
    value = np.where(e == 0, m * 2.0**-9, (1 + m / 8) * 2.0 ** (e.astype(int) - 7))
    return np.where(codes & 128, -value, value).astype(np.float32)


class Gemm:
    """The GEMM of kernels/gemm.cu on the simulator."""

    def __init__(
        self, sim: S.Simulator, ptx: str, *, fp8: bool, cluster: int, m: int, n: int, k: int
    ) -> None:
        self.sim, self.fp8, self.cluster, self.size = sim, fp8, cluster, (m, n, k)
        self.module = sim.load(ptx)
        rng = np.random.default_rng(m * 7 + n * 3 + k)
        if fp8:
            a, b = (rng.integers(0, 256, s).astype(np.uint8) for s in ((m, k), (n, k)))
            a, b = (np.where((x & 127) > 0x50, x & 0xBF, x).astype(np.uint8) for x in (a, b))
            self.want = e4m3_values(a).astype(np.float64) @ e4m3_values(b).T.astype(np.float64)
        else:
            a, b = (bf16(rng.standard_normal(s)) for s in ((m, k), (n, k)))
            self.want = bf16_values(a).astype(np.float64) @ bf16_values(b).T.astype(np.float64)
        size, dtype, box = (1, "u8", 128) if fp8 else (2, "bf16", 64)
        self.a, self.b, self.c = sim.buffer(a), sim.buffer(b), sim.zeros((m, n), np.float32)
        self.map_a, self.map_b = (
            sim.tensor_map(
                x,
                dtype=dtype,
                shape=[k, rows],
                strides=[k * size],
                box=[box, box_rows],
                swizzle="128",
            )
            for x, rows, box_rows in ((self.a, m, 128 // cluster), (self.b, n, 128))
        )

    def run(self) -> np.ndarray:
        m, n, k = self.size
        self.c.write(np.full((m, n), np.nan, np.float32))
        grid = (-(-n // (128 * self.cluster)) * self.cluster, -(-m // 128))
        self.module.launch(
            "gemm",
            self.map_a,
            self.map_b,
            self.c,
            m,
            n,
            k,
            grid=grid,
            block=384,
            shared=200 * 1024,
            cluster=self.cluster,
        )
        return self.c.read()


@pytest.mark.parametrize(("fp8", "cluster"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("size", [(128, 256, 192), (200, 136, 320)])
def test_gemm(sim: S.Simulator, fp8: bool, cluster: int, size: tuple[int, int, int]) -> None:
    ptx = compile_ptx(
        KERNELS / "gemm.cu", S.build_directory() / "ptx", GEMM_FP8=int(fp8), GEMM_CLUSTER=cluster
    )
    gemm = Gemm(sim, ptx, fp8=fp8, cluster=cluster, m=size[0], n=size[1], k=size[2])
    tolerance = (2e-3 if fp8 else 1e-5) * np.abs(gemm.want).max()
    first = None
    for seed in range(13):
        sim.configure(seed=seed)
        got = gemm.run()
        first = got if first is None else first
        np.testing.assert_allclose(got, gemm.want, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(got, first)  # no schedule changes a bit


@pytest.mark.slow
@pytest.mark.parametrize(("fp8", "cluster"), [(False, 1), (True, 1), (False, 2)])
def test_gemm_gives_no_false_alarm_in_200_seeds(sim: S.Simulator, fp8: bool, cluster: int) -> None:
    ptx = compile_ptx(
        KERNELS / "gemm.cu", S.build_directory() / "ptx", GEMM_FP8=int(fp8), GEMM_CLUSTER=cluster
    )
    gemm = Gemm(sim, ptx, fp8=fp8, cluster=cluster, m=128, n=256, k=448)
    for seed in range(200):
        sim.configure(seed=seed)
        gemm.run()

"""Kernels written with CuTe, as PTX: right answers under every schedule and every check."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

import flash8_sim as S
from cute_kernels import compile_ptx, load_library


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


@pytest.mark.parametrize(
    ("fp8", "cluster"),
    [
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
        (False, 2),
    ],
)
@pytest.mark.parametrize("size", [(128, 256, 192), (200, 136, 320)])
def test_gemm(sim: S.Simulator, fp8: bool, cluster: int, size: tuple[int, int, int]) -> None:
    ptx = compile_ptx("gemm", GEMM_FP8=int(fp8), GEMM_CLUSTER=cluster)
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
    ptx = compile_ptx("gemm", GEMM_FP8=int(fp8), GEMM_CLUSTER=cluster)
    gemm = Gemm(sim, ptx, fp8=fp8, cluster=cluster, m=128, n=256, k=448)
    for seed in range(200):
        sim.configure(seed=seed)
        gemm.run()


def test_a_launch_from_host_code(sim: S.Simulator) -> None:
    """Through the runtime that CUTLASS's launchers use, without CUTLASS, which compiles long."""
    library = load_library("launch")
    x = sim.buffer(np.arange(200, dtype=np.float32))
    pointer = ctypes.c_void_p(x.pointer)
    assert library.launch_add(pointer, ctypes.c_float(0.5), 200) == 0
    np.testing.assert_array_equal(x.read(), np.arange(200, dtype=np.float32) + 0.5)
    x.write(np.zeros(200, np.float32))
    assert library.launch_add_rank(pointer, 4) == 0 and sim.report()["ok"]
    np.testing.assert_array_equal(x.read()[:128], np.repeat([0, 1, 0, 1], 32))


class CollectiveGemm:
    """The GEMM of kernels/collective_gemm.cu: CUTLASS's collectives, launched by CUTLASS."""

    def __init__(self, sim: S.Simulator, *, m: int, n: int, k: int) -> None:
        self.sim, self.size = sim, (m, n, k)
        self.launch = load_library("collective_gemm").collective_gemm
        rng = np.random.default_rng(m * 7 + n * 3 + k)
        a, b = (bf16(rng.standard_normal(s)) for s in ((m, k), (n, k)))
        product = bf16_values(a).astype(np.float64) @ bf16_values(b).T.astype(np.float64)
        self.want = 0.5 * product
        self.a, self.b, self.d = sim.buffer(a), sim.buffer(b), sim.zeros((m, n), np.uint16)

    def run(self) -> np.ndarray:
        self.d.write(np.full(self.d.shape, 0x7FC0, np.uint16))  # NaN
        pointers = [ctypes.c_void_p(x.pointer) for x in (self.a, self.b, self.d)]
        status = self.launch(*pointers, *self.size, ctypes.c_float(0.5), 4)
        report = self.sim.report()
        assert status == 0 and report["ok"], report["error"]
        return bf16_values(self.d.read())


@pytest.mark.slow
@pytest.mark.parametrize("size", [(128, 128, 64), (256, 256, 192), (200, 136, 320)])
def test_collective_gemm(sim: S.Simulator, size: tuple[int, int, int]) -> None:
    gemm = CollectiveGemm(sim, m=size[0], n=size[1], k=size[2])
    first = None
    for seed in range(13):
        sim.configure(seed=seed)
        got = gemm.run()
        first = got if first is None else first
        np.testing.assert_allclose(got, gemm.want, rtol=2**-8, atol=1e-4)  # D is rounded to bf16
        np.testing.assert_array_equal(got, first)
    m_tiles, n_tiles = 2 * -(-size[0] // 128), -(-size[1] // 128)  # in clusters of two along M
    a_bytes = m_tiles * n_tiles * 64 * size[2] * 2
    b_bytes = m_tiles // 2 * n_tiles * 128 * size[2] * 2  # multicast: once a cluster
    assert sim.report()["statistics"]["bytes"]["tensor load"] == a_bytes + b_bytes


@pytest.mark.slow
def test_collective_gemm_gives_no_false_alarm_in_200_seeds(sim: S.Simulator) -> None:
    gemm = CollectiveGemm(sim, m=256, n=256, k=448)
    for seed in range(200):
        sim.configure(seed=seed)
        gemm.run()

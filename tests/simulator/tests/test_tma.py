# ruff: noqa: E501 - PTX text reads better unbroken
"""TMA: boxes of tensors of 1 to 5 dimensions, edges, swizzles, reductions, multicast, bulk copies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import flash8_sim as S

MODULE = ".extern .shared .align 1024 .b8 mem[];"
SPAN = {"none": 0, "32": 2, "64": 4, "128": 8}
BARRIER = 32768


def swizzle(address: int, mode: str) -> int:
    """The 16-byte unit of a row changes places with the row's number (CUDA guide, TMA swizzle modes)."""
    units = SPAN[mode]
    return address ^ ((address >> 7) % units << 4) if units else address


def load_ptx(dimensions: int, bytes_: int) -> str:
    """Loads one box at given coordinates, waits, and copies shared memory out as it lies."""
    at = ", ".join(f"c{i}" for i in range(dimensions))
    coordinates = " ".join(f"ld.param.u32 c{i}, [c + {4 * i}];" for i in range(dimensions))
    return S.kernel(
        f""".reg .pred p; .reg .b32 t, s, x, i, c<5>; .reg .b64 m, o, g; mov.u32 t, %tid.x; mov.u32 s, mem; setp.ne.u32 p, t, 0; @p bra $W;
    mbarrier.init.shared::cta.b64 [mem + {BARRIER}], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [mem + {BARRIER}], {bytes_}; {coordinates}
    mov.b64 m, map; cvta.param.u64 m, m; add.u32 x, s, {BARRIER};
    cp.async.bulk.tensor.{dimensions}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [s], [m, {{{at}}}], [x];
    $W: bar.sync 0; {{ .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [mem + {BARRIER}], 0; @ok bra D; bra L; D: }}
    ld.param.u64 o, [out]; mov.u32 i, t;
    $C: mul.lo.u32 x, i, 4; add.u32 x, x, s; mad.wide.u32 g, i, 4, o; ld.shared.u32 x, [x]; st.global.u32 [g], x; add.u32 i, i, 64; setp.lt.u32 p, i, {bytes_ // 4}; @p bra $C; ret;""",
        parameters=".param .align 64 .b8 map[128], .param .u64 out, .param .align 4 .b8 c[20]",
        module=MODULE,
    )


def store_ptx(dimensions: int, bytes_: int, operation: str) -> str:
    at = ", ".join(f"c{i}" for i in range(dimensions))
    coordinates = " ".join(f"ld.param.u32 c{i}, [c + {4 * i}];" for i in range(dimensions))
    verb = (
        f"cp.reduce.async.bulk.tensor.{dimensions}d.global.shared::cta.{operation}.tile.bulk_group"
        if operation
        else f"cp.async.bulk.tensor.{dimensions}d.global.shared::cta.tile.bulk_group"
    )
    return S.kernel(
        f""".reg .pred p; .reg .b32 t, s, x, i, c<5>; .reg .b64 m, o, g; mov.u32 t, %tid.x; mov.u32 s, mem; ld.param.u64 o, [src]; mov.u32 i, t;
    $C: mad.wide.u32 g, i, 4, o; ld.global.u32 x, [g]; mad.lo.u32 c0, i, 4, s; st.shared.u32 [c0], x; add.u32 i, i, 64; setp.lt.u32 p, i, {bytes_ // 4}; @p bra $C;
    fence.proxy.async.shared::cta; bar.sync 0; setp.ne.u32 p, t, 0; @p bra $E; {coordinates} mov.b64 m, map; cvta.param.u64 m, m;
    {verb} [m, {{{at}}}], [s]; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0; $E: ret;""",
        parameters=".param .align 64 .b8 map[128], .param .u64 src, .param .align 4 .b8 c[20]",
        module=MODULE,
    )


def box_of(
    tensor: np.ndarray,
    at: tuple[int, ...],
    box: tuple[int, ...],
    steps: tuple[int, ...],
    fill: float,
) -> np.ndarray:
    """The box as it lies in shared memory, unswizzled; coordinates and extents innermost first."""
    counts = [-(-b // s) for b, s in zip(box, steps, strict=True)]
    out = np.full(counts[::-1], fill, tensor.dtype)
    for index in itertools.product(*(range(n) for n in counts)):
        where = [a + i * s for a, i, s in zip(at, index, steps, strict=True)]
        if all(0 <= w < n for w, n in zip(where, tensor.shape[::-1], strict=True)):
            out[index[::-1]] = tensor[tuple(where[::-1])]
    return out


def coordinates(*at: int) -> bytes:
    return np.array([*at, *[0] * (5 - len(at))], np.int32).tobytes()


def describe(
    sim: S.Simulator,
    buffer: S.Buffer,
    tensor: np.ndarray,
    dtype: str,
    box: tuple[int, ...],
    **options: object,
) -> S.TensorMap:
    return sim.tensor_map(
        buffer,
        dtype=dtype,
        shape=tensor.shape[::-1],
        strides=tensor.strides[:-1][::-1],
        box=box,
        **options,
    )  # type: ignore[arg-type]


CASES = [
    # shape (outermost first), box (innermost first), coordinates
    ((200,), (64,), (16,)),
    ((200,), (64,), (160,)),
    ((200,), (64,), (-20,)),
    ((24, 64), (32, 8), (0, 0)),
    ((24, 64), (32, 8), (48, 20)),
    ((24, 64), (32, 8), (-8, -3)),
    ((5, 9, 32), (16, 4, 3), (8, 6, 3)),
    ((2, 3, 5, 16), (16, 3, 2, 2), (4, 3, 2, 1)),
    ((2, 2, 3, 4, 8), (8, 2, 2, 2, 1), (0, 3, 2, 1, 1)),
    ((2, 2, 3, 4, 8), (8, 2, 2, 2, 1), (0, 3, 2, 1, 2)),
]


@pytest.mark.parametrize(("shape", "box", "at"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tiled_load(
    sim: S.Simulator, shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], seed: int
) -> None:
    sim.configure(seed=seed)
    tensor = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    want = box_of(tensor, at, box, (1,) * len(box), 0.0)
    out = sim.zeros(want.size, np.float32)
    buffer = sim.buffer(tensor)
    sim.load(load_ptx(len(box), want.nbytes)).launch(
        "k",
        describe(sim, buffer, tensor, "f32", box),
        out,
        coordinates(*at),
        block=64,
        shared=40960,
    )
    np.testing.assert_array_equal(out.read(), want.reshape(-1))


@pytest.mark.parametrize("mode", ["none", "32", "64", "128"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_swizzled_load(sim: S.Simulator, mode: str, dtype: type) -> None:
    size = np.dtype(dtype).itemsize
    inner = (16 * SPAN[mode] or 64) // size
    tensor = np.random.default_rng(1).integers(0, 200, (40, 2 * inner)).astype(dtype)
    want = box_of(tensor, (inner // 2, 3), (inner, 32), (1, 1), 0)
    raw, placed = want.reshape(-1).view(np.uint8), np.zeros(want.nbytes, np.uint8)
    for i in range(0, len(raw), 16):
        placed[swizzle(i, mode) : swizzle(i, mode) + 16] = raw[i : i + 16]
    out = sim.zeros(want.nbytes, np.uint8)
    name = {1: "u8", 2: "u16", 4: "f32"}[size]
    buffer = sim.buffer(tensor)
    sim.load(load_ptx(2, want.nbytes)).launch(
        "k",
        describe(sim, buffer, tensor, name, (inner, 32), swizzle=mode),
        out,
        coordinates(inner // 2, 3),
        block=64,
        shared=40960,
    )
    np.testing.assert_array_equal(out.read(), placed)


def test_element_strides_and_nan_fill(sim: S.Simulator) -> None:
    tensor = np.random.default_rng(2).standard_normal((20, 64)).astype(np.float32)
    # cuda.h: without interleaving the stride of dimension 0 is ignored.
    want = box_of(tensor, (40, 14), (32, 24), (1, 3), np.nan)
    out = sim.zeros(want.size, np.float32)
    buffer = sim.buffer(tensor)
    tensor_map = describe(
        sim, buffer, tensor, "f32", (32, 24), element_strides=[2, 3], nan_fill=True
    )
    sim.load(load_ptx(2, want.nbytes)).launch(
        "k", tensor_map, out, coordinates(40, 14), block=64, shared=40960
    )
    np.testing.assert_array_equal(out.read(), want.reshape(-1))
    assert np.isnan(want).any()


@pytest.mark.parametrize("operation", ["", "add", "min", "max"])
@pytest.mark.parametrize(("shape", "box", "at"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tiled_store_and_reduce(
    sim: S.Simulator,
    operation: str,
    shape: tuple[int, ...],
    box: tuple[int, ...],
    at: tuple[int, ...],
    seed: int,
) -> None:
    sim.configure(seed=seed)
    rng = np.random.default_rng(3)
    dtype, name = (np.int32, "s32") if operation in ("min", "max") else (np.float32, "f32")
    tensor = rng.integers(-50, 50, shape).astype(dtype)
    tile = rng.integers(-50, 50, box[::-1]).astype(dtype)
    want = tensor.copy()
    join = {"": lambda o, n: n, "add": np.add, "min": np.minimum, "max": np.maximum}[operation]
    for index in itertools.product(*(range(n) for n in box)):
        where = tuple(a + i for a, i in zip(at, index, strict=True))[::-1]
        if all(0 <= w < n for w, n in zip(where, shape, strict=True)):
            want[where] = join(want[where], tile[index[::-1]])
    buffer = sim.buffer(tensor)
    sim.load(store_ptx(len(box), tile.nbytes, operation)).launch(
        "k",
        describe(sim, buffer, tensor, name, box),
        sim.buffer(tile),
        coordinates(*at),
        block=64,
        shared=40960,
    )
    np.testing.assert_array_equal(buffer.read(), want)


def test_swizzled_store_undoes_a_swizzled_load(sim: S.Simulator) -> None:
    data = np.arange(32 * 64, dtype=np.uint16)
    placed = np.zeros(data.nbytes, np.uint8)
    for i in range(0, data.nbytes, 16):
        placed[swizzle(i, "128") : swizzle(i, "128") + 16] = data.view(np.uint8)[i : i + 16]
    out = sim.zeros((32, 64), np.uint16)
    tensor_map = sim.tensor_map(
        out, dtype="u16", shape=[64, 32], strides=[128], box=[64, 32], swizzle="128"
    )
    sim.load(store_ptx(2, placed.nbytes, "")).launch(
        "k", tensor_map, sim.buffer(placed), coordinates(0, 0), block=64, shared=40960
    )
    np.testing.assert_array_equal(out.read().reshape(-1), data)


@pytest.mark.parametrize("seed", range(4))
def test_multicast(sim: S.Simulator, seed: int) -> None:
    """Each of four CTAs sends its quarter to all; every CTA ends up with all of them."""
    ptx = S.kernel(
        f""".reg .pred p; .reg .b32 t, s, x, r, y; .reg .b16 mask; .reg .b64 m, o; mov.u32 t, %tid.x; mov.u32 s, mem; mov.u32 r, %cluster_ctarank; setp.ne.u32 p, t, 0; @p bra $I;
    mbarrier.init.shared::cta.b64 [mem + {BARRIER}], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [mem + {BARRIER}], 4096;
    $I: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; @p bra $W; mov.b64 m, map; cvta.param.u64 m, m; mul.lo.u32 y, r, 8; mad.lo.u32 x, r, 1024, s; mov.u16 mask, 15; mov.u32 r, 0; add.u32 s, s, {BARRIER};
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [x], [m, {{r, y}}], [s], mask;
    $W: {{ .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [mem + {BARRIER}], 0; @ok bra D; bra L; D: }}
    mov.u32 r, %ctaid.x; ld.param.u64 o, [out]; mad.lo.u32 r, r, 1024, t; mad.wide.u32 o, r, 4, o; mov.u32 s, mem; mad.lo.u32 s, t, 4, s;
    {" ".join(f"ld.shared.u32 x, [s + {128 * i}]; st.global.u32 [o + {128 * i}], x;" for i in range(32))}
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret;""",
        parameters=".param .align 64 .b8 map[128], .param .u64 out",
        module=MODULE,
    )
    sim.configure(seed=seed)
    data = np.random.default_rng(4).standard_normal((32, 32)).astype(np.float32)
    out = sim.zeros((4, 32, 32), np.float32)
    buffer = sim.buffer(data)
    sim.load(ptx).launch(
        "k", describe(sim, buffer, data, "f32", (32, 8)), out, grid=4, cluster=4, shared=40960
    )
    np.testing.assert_array_equal(out.read(), np.broadcast_to(data, (4, 32, 32)))


@pytest.mark.parametrize("seed", range(4))
def test_bulk_copies(sim: S.Simulator, seed: int) -> None:
    """global -> shared -> the other CTA's shared -> global, stored plainly and added."""
    ptx = S.kernel(
        f""".reg .pred p, lead; .reg .b32 t, s, x, r, b; .reg .b64 a, o; mov.u32 t, %tid.x; mov.u32 s, mem; mov.u32 r, %cluster_ctarank; setp.ne.u32 lead, t, 0; @lead bra $I;
    mbarrier.init.shared::cta.b64 [mem + {BARRIER}], 1; mbarrier.init.shared::cta.b64 [mem + {BARRIER + 8}], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [mem + {BARRIER + 8}], 1024;
    $I: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; @lead bra $E;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [mem + {BARRIER}], 1024; ld.param.u64 a, [src]; mad.wide.u32 a, r, 1024, a; add.u32 b, s, {BARRIER};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [a], 1024, [b];
    {{ .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [mem + {BARRIER}], 0; @ok bra D; bra L; D: }}
    xor.b32 x, r, 1; add.u32 t, s, 1024; mapa.shared::cluster.u32 t, t, x; add.u32 b, s, {BARRIER + 8}; mapa.shared::cluster.u32 b, b, x;
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [t], [s], 1024, [b];
    {{ .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [mem + {BARRIER + 8}], 0; @ok bra D; bra L; D: }}
    ld.param.u64 o, [out]; mad.wide.u32 o, r, 1024, o; add.u32 x, s, 1024; cp.async.bulk.global.shared::cta.bulk_group [o], [x], 1024; ld.param.u64 o, [sum];
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [o], [x], 1024; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    $E: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; ret;""",
        parameters=".param .u64 src, .param .u64 out, .param .u64 sum",
        module=MODULE,
    )
    sim.configure(seed=seed)
    data = np.random.default_rng(5).integers(0, 99, (2, 256)).astype(np.float32)
    out, total = sim.zeros((2, 256), np.float32), sim.zeros(256, np.float32)
    sim.load(ptx).launch("k", sim.buffer(data), out, total, grid=2, cluster=2, shared=40960)
    np.testing.assert_array_equal(out.read(), data[::-1])
    np.testing.assert_array_equal(total.read(), data.sum(0))

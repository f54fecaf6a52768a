# ruff: noqa: E501 - PTX text reads better unbroken
"""Loads, stores, atomics, address spaces and cp.async."""

from __future__ import annotations

import numpy as np
import pytest

import flash8_sim as S
from lanewise import lanewise

LANES = np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("kind", "dtype", "register"),
    [
        ("u8", np.uint8, "b16"),
        ("s8", np.int8, "b16"),
        ("u16", np.uint16, "b16"),
        ("s16", np.int16, "b16"),
        ("u32", np.uint32, "b32"),
        ("s32", np.int32, "b32"),
        ("b64", np.uint64, "b64"),
        ("f32", np.float32, "f32"),
        ("f64", np.float64, "f64"),
    ],
)
@pytest.mark.parametrize("vector", [1, 2, 4])
@pytest.mark.parametrize("space", ["global", "shared", "generic", "local"])
def test_load_store(
    sim: S.Simulator, kind: str, dtype: type, register: str, vector: int, space: str
) -> None:
    """Through every space: global -> space -> global, a vector a lane."""
    size = np.dtype(dtype).itemsize
    if vector * size > 16:
        pytest.skip("vectors have at most 16 bytes")
    v = "" if vector == 1 else f".v{vector}"
    regs = "v0" if vector == 1 else "{" + ", ".join(f"v{i}" for i in range(vector)) + "}"
    middle = {
        "global": "",
        "shared": f"mov.u32 m, mem; mad.lo.u32 m, t, {vector * size}, m; st.shared{v}.{kind} [m], {regs}; bar.warp.sync -1; ld.shared{v}.{kind} {regs}, [m];",
        "generic": f"mov.u64 g, mem; cvta.shared.u64 g, g; mad.wide.u32 g, t, {vector * size}, g; st{v}.{kind} [g], {regs}; ld{v}.{kind} {regs}, [g];",
        "local": f"mov.u64 g, spill; cvta.local.u64 g, g; st{v}.{kind} [g], {regs}; ld.local{v}.{kind} {regs}, [spill];",
    }[space]
    ptx = S.kernel(
        f""".shared .align 16 .b8 mem[512]; .local .align 16 .b8 spill[16]; .reg .{register} v<4>; .reg .b32 t, m; .reg .b64 a, b, g; mov.u32 t, %tid.x;
    ld.param.u64 a, [pa]; mad.wide.u32 a, t, {vector * size}, a; ld.param.u64 b, [pb]; mad.wide.u32 b, t, {vector * size}, b;
    ld.global{v}.{kind} {regs}, [a]; {middle} st.global{v}.{kind} [b], {regs}; ret;""",
        parameters=".param .u64 pa, .param .u64 pb",
    )
    data = np.random.default_rng(0).integers(0, 256, 32 * vector * size).astype(np.uint8)
    out = sim.zeros(data.shape, np.uint8)
    sim.load(ptx).launch("k", sim.buffer(data), out)
    np.testing.assert_array_equal(out.read(), data)


def test_narrow_loads_extend(sim: S.Simulator) -> None:
    ptx = S.kernel(
        """.reg .b32 t, x; .reg .b64 a, b, w; mov.u32 t, %tid.x; ld.param.u64 a, [pa]; cvt.u64.u32 w, t; add.s64 a, a, w; ld.param.u64 b, [pb]; mad.wide.u32 b, t, 16, b;
    ld.global.s8 x, [a]; st.global.u32 [b], x; ld.global.u8 x, [a]; st.global.u32 [b + 4], x; ld.global.s8 w, [a]; st.global.u64 [b + 8], w; ret;""",
        parameters=".param .u64 pa, .param .u64 pb",
    )
    data = np.arange(-16, 16, dtype=np.int8)
    out = sim.zeros((32, 4), np.uint32)
    sim.load(ptx).launch("k", sim.buffer(data), out)
    got = out.read()
    np.testing.assert_array_equal(got[:, 0].view(np.int32), data)
    np.testing.assert_array_equal(got[:, 1], data.view(np.uint8))
    np.testing.assert_array_equal(got[:, 2:].copy().view(np.int64)[:, 0], data)


def test_parameters_of_every_kind(sim: S.Simulator) -> None:
    """Offsets by alignment, a blob read through a register, the address of a parameter, sign extension."""
    ptx = S.kernel(
        """.reg .b32 x; .reg .b64 p, o, w; .reg .f32 f; ld.param.u64 o, [out]; ld.param.s8 x, [small]; st.global.u32 [o], x;
    ld.param.f32 f, [real]; st.global.f32 [o + 4], f; mov.b64 p, blob; ld.param.u32 x, [p + 8]; st.global.u32 [o + 8], x;
    cvta.param.u64 p, p; ld.u32 x, [p + 4]; st.global.u32 [o + 12], x; ld.param.s32 w, [blob + 4]; st.global.u64 [o + 16], w; ret;""",
        parameters=".param .u64 out, .param .u8 small, .param .f32 real, .param .align 16 .b8 blob[12]",
    )
    out = sim.zeros(6, np.uint32)
    blob = np.array([1, -2, 3], np.int32).tobytes()
    sim.load(ptx).launch("k", out, np.int8(-5), np.float32(1.5), blob)
    got = out.read()
    np.testing.assert_array_equal(
        got.view(np.int32), [-5, np.float32(1.5).view(np.int32), 3, -2, -2, -1]
    )


def test_module_variables(sim: S.Simulator) -> None:
    module = ".visible .global .align 4 .u32 counter = 7;\n.const .align 8 .f32 table[3] = {0f3F800000, 0f40000000, 2.5};\n.global .align 8 .u64 where = generic(counter);"
    ptx = S.kernel(
        """.reg .b32 x; .reg .f32 f; .reg .b64 o, g; ld.param.u64 o, [out]; atom.global.add.u32 x, [counter], 5; st.global.u32 [o], x;
    ld.const.f32 f, [table + 8]; st.global.f32 [o + 4], f; ld.global.u64 g, [where]; ld.u32 x, [g]; st.global.u32 [o + 8], x; ret;""",
        parameters=".param .u64 out",
        module=module,
    )
    out = sim.zeros(3, np.uint32)
    sim.load(ptx).launch("k", out, block=1)
    np.testing.assert_array_equal(out.read(), [7, np.float32(2.5).view(np.uint32), 12])


@pytest.mark.parametrize(
    ("op", "dtype", "want"),
    [
        ("add.u32", np.uint32, np.sum),
        ("add.f32", np.float32, np.sum),
        ("add.u64", np.uint64, np.sum),
        ("max.s32", np.int32, np.max),
        ("min.u32", np.uint32, np.min),
        ("xor.b32", np.uint32, np.bitwise_xor.reduce),
        ("or.b32", np.uint32, np.bitwise_or.reduce),
        ("add.f64", np.float64, np.sum),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("returns", [False, True])
def test_atomics(
    sim: S.Simulator, op: str, dtype: type, want: object, space: str, returns: bool
) -> None:
    data = np.random.default_rng(2).integers(0, 1000, 64).astype(dtype)
    size = data.itemsize
    reg = f"b{8 * size}"
    target = "[g]" if space == "global" else "[mem]"
    start = (
        ""
        if space == "global"
        else f"setp.ne.u32 p, t, 0; @p bra $S; ld.global.{reg} x, [g]; st.shared.{reg} [mem], x; $S: bar.sync 0;"
    )
    finish = (
        ""
        if space == "global"
        else f"bar.sync 0; setp.ne.u32 p, t, 0; @p bra $F; ld.shared.{reg} x, [mem]; st.global.{reg} [g], x; $F:"
    )
    action = f"atom.{space}.{op} old, {target}, v;" if returns else f"red.{space}.{op} {target}, v;"
    ptx = S.kernel(
        f""".shared .align 8 .b8 mem[8]; .reg .pred p; .reg .b32 t; .reg .b64 a, g; .reg .{reg} v, x, old; mov.u32 t, %tid.x; ld.param.u64 a, [pa]; ld.param.u64 g, [pg];
    mad.wide.u32 a, t, {size}, a; ld.global.{reg} v, [a]; {start} {action} {finish} ret;""",
        parameters=".param .u64 pa, .param .u64 pg",
    )
    first = np.array([500], dtype)
    out = sim.buffer(first)
    sim.load(ptx).launch("k", sim.buffer(data), out, block=64)
    assert out.read()[0] == want(np.concatenate([first, data]))  # type: ignore[operator]


def test_compare_and_swap_exchange_and_counters(sim: S.Simulator) -> None:
    ptx = S.kernel(
        """.reg .b32 t, x; .reg .b64 g, o; mov.u32 t, %tid.x; ld.param.u64 g, [pg]; ld.param.u64 o, [po]; mad.wide.u32 o, t, 12, o;
    atom.global.cas.b32 x, [g], t, 77; st.global.u32 [o], x; atom.global.inc.u32 x, [g + 4], 9; st.global.u32 [o + 4], x; atom.global.exch.b32 x, [g + 8], t; st.global.u32 [o + 8], x; ret;""",
        parameters=".param .u64 pg, .param .u64 po",
    )
    cells, out = sim.buffer(np.array([5, 0, 99], np.uint32)), sim.zeros((32, 3), np.uint32)
    sim.load(ptx).launch("k", cells, out)
    got = out.read()
    np.testing.assert_array_equal(got[:, 0], np.where(LANES <= 5, 5, 77))
    np.testing.assert_array_equal(got[:, 1], LANES % 10)
    np.testing.assert_array_equal(got[:, 2], np.concatenate([[99], LANES[:-1]]))
    np.testing.assert_array_equal(cells.read(), [77, 2, 31])


def test_address_space_queries(sim: S.Simulator) -> None:
    text = """mov.u64 u0, mem; cvta.shared.u64 u0, u0; isspacep.shared p, u0; selp.u32 d0, 1, 0, p; isspacep.global p, u0; selp.u32 d1, 1, 0, p;
    cvta.to.shared.u64 u1, u0; cvt.u32.u64 t0, u1; mov.u32 t1, mem; sub.u32 d2, t0, t1; ld.param.u64 u2, [out0]; isspacep.global p, u2; selp.u32 d3, 1, 0, p;"""
    got = lanewise(sim, ".shared .align 4 .b8 mem[4];" + text, [], *[np.uint32] * 4)
    assert [int(x[0]) for x in got] == [1, 0, 0, 1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_cp_async(sim: S.Simulator, bytes_: int, seed: int) -> None:
    """Two groups; the second lane half copies fewer bytes and gets zeros behind them."""
    ptx = S.kernel(
        f""".shared .align 16 .b8 mem[2048]; .reg .pred p; .reg .b32 t, m, n, i, x; .reg .b64 a, b; mov.u32 t, %tid.x; mov.u32 m, mem; mad.lo.u32 m, t, 16, m;
    ld.param.u64 a, [pa]; mad.wide.u32 a, t, {bytes_}, a; setp.lt.u32 p, t, 16; selp.u32 n, {bytes_}, {bytes_ // 2 if bytes_ > 4 else 0}, p;
    cp.async.{"cg" if bytes_ == 16 else "ca"}.shared.global [m], [a], {bytes_}, n; cp.async.commit_group;
    cp.async.ca.shared.global.L2::128B [m + 512], [a], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.param.u64 b, [pb]; mad.wide.u32 b, t, 20, b;
    {" ".join(f"ld.shared.u32 x, [m + {4 * i}]; st.global.u32 [b + {4 * i}], x;" for i in range(bytes_ // 4))}
    cp.async.wait_all; ld.shared.u32 x, [m + 512]; st.global.u32 [b + 16], x; ret;""",
        parameters=".param .u64 pa, .param .u64 pb",
    )
    sim.configure(seed=seed)
    data = (
        np.random.default_rng(0)
        .integers(1, 2**32, 32 * bytes_ // 4, dtype=np.uint64)
        .astype(np.uint32)
    )
    out = sim.zeros((32, 5), np.uint32)
    sim.load(ptx).launch("k", sim.buffer(data), out)
    rows = data.reshape(32, -1)
    want = rows.copy()
    want[16:, (bytes_ // 2 if bytes_ > 4 else 0) // 4 :] = 0
    np.testing.assert_array_equal(out.read()[:, : bytes_ // 4], want)
    np.testing.assert_array_equal(out.read()[:, 4], rows[:, 0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noinc", [False, True])
def test_cp_async_arrives_on_an_mbarrier(sim: S.Simulator, noinc: bool, seed: int) -> None:
    count, suffix = (32, ".noinc") if noinc else (1, "")
    arrive = (
        ""
        if noinc
        else "setp.ne.u32 p, t, 0; @p bra $NO; mbarrier.arrive.shared::cta.b64 _, [bar]; $NO:"
    )
    ptx = S.kernel(
        f""".shared .align 16 .b8 mem[512]; .shared .align 8 .b64 bar; .reg .pred p; .reg .b32 t, m, x; .reg .b64 a, b; mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra $R;
    mbarrier.init.shared::cta.b64 [bar], {count}; $R: bar.sync 0; setp.lt.u32 p, t, 32; @!p bra $W; mov.u32 m, mem; mad.lo.u32 m, t, 16, m; ld.param.u64 a, [pa]; mad.wide.u32 a, t, 16, a;
    cp.async.cg.shared.global [m], [a], 16; cp.async.mbarrier.arrive{suffix}.shared::cta.b64 [bar]; bar.warp.sync -1; {arrive}
    $W: {{ .reg .pred ok; L: mbarrier.try_wait.parity.shared::cta.b64 ok, [bar], 0; @ok bra D; bra L; D: }}
    mov.u32 m, mem; mad.lo.u32 m, t, 4, m; ld.shared.u32 x, [m]; ld.param.u64 b, [pb]; mad.wide.u32 b, t, 4, b; st.global.u32 [b], x; ret;""",
        parameters=".param .u64 pa, .param .u64 pb",
    )
    sim.configure(seed=seed)
    data = np.arange(128, dtype=np.uint32)
    out = sim.zeros(128, np.uint32)
    sim.load(ptx).launch("k", sim.buffer(data), out, block=128)
    np.testing.assert_array_equal(out.read(), data)

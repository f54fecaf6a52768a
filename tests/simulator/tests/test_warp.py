# ruff: noqa: E501 - PTX text reads better unbroken
"""Exchanges between lanes, divergence, and 8x8 matrix moves."""

from __future__ import annotations

import numpy as np
import pytest

import flash8_sim as S
from lanewise import lanewise

LANES = np.arange(32, dtype=np.uint32)


def shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The PTX ISA's pseudo-code of shfl.sync."""
    segment, clamp = (c >> 8) & 31, c & 31
    low, high = lane & segment, (lane & segment) | (clamp & ~segment & 31)
    if mode == "up":
        j = lane - b
        ok = j >= high
    elif mode == "down":
        j = lane + b
        ok = j <= high
    elif mode == "bfly":
        j = lane ^ b
        ok = j <= high
    else:
        j = low | (b & ~segment & 31)
        ok = j <= high
    return (j if ok else lane), ok


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 4])
def test_shfl(sim: S.Simulator, mode: str, width: int) -> None:
    a = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    c = ((32 - width) << 8) | (0 if mode == "up" else 31)
    for b in (0, 1, 2, 5, 15, 31):
        text = f"shfl.sync.{mode}.b32 d0|p, a0, {b}, {c}, -1; selp.u32 d1, 1, 0, p;"
        got, valid = lanewise(sim, text, [a], np.uint32, np.uint32)
        want = [shuffle(mode, lane, b, c) for lane in range(32)]
        np.testing.assert_array_equal(got, a[[w[0] for w in want]])
        np.testing.assert_array_equal(valid, [w[1] for w in want])


def test_votes_and_elections(sim: S.Simulator) -> None:
    a = np.array([3] * 10 + [8] * 20 + [3, 9], np.uint32)
    text = """setp.eq.u32 p, a0, 3; vote.sync.ballot.b32 d0, p, -1; vote.sync.any.pred q, p, -1; selp.u32 d1, 1, 0, q;
    vote.sync.all.pred q, p, -1; selp.u32 d2, 1, 0, q; vote.sync.uni.pred q, p, -1; selp.u32 d3, 1, 0, q;
    match.any.sync.b32 d4, a0, -1; elect.sync d5|q, -1; selp.u32 d6, 1, 0, q; activemask.b32 d7;"""
    got = lanewise(sim, text, [a], *[np.uint32] * 8)
    mask = {v: sum(1 << i for i in range(32) if a[i] == v) for v in (3, 8, 9)}
    want = [mask[3], 1, 0, 0, [mask[int(v)] for v in a], 0, LANES == 0, 2**32 - 1]
    for have, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(have, np.broadcast_to(np.array(expected, np.uint32), 32))
    equal, all_equal = lanewise(
        sim,
        "match.all.sync.b32 d0|p, a0, -1; selp.u32 d1, 1, 0, p;",
        [np.full(32, 7, np.uint32)],
        np.uint32,
        np.uint32,
    )
    assert (equal == 2**32 - 1).all() and all_equal.all()


@pytest.mark.parametrize(
    ("op", "want"),
    [
        ("add.u32", lambda a: a.sum()),
        ("min.s32", lambda a: a.view(np.int32).min()),
        ("max.u32", lambda a: a.max()),
        ("and.b32", np.bitwise_and.reduce),
        ("or.b32", np.bitwise_or.reduce),
        ("xor.b32", np.bitwise_xor.reduce),
    ],
)
def test_redux(sim: S.Simulator, op: str, want: object) -> None:
    a = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    (got,) = lanewise(sim, f"redux.sync.{op} d0, a0, -1;", [a], np.uint32)
    np.testing.assert_array_equal(got, np.full(32, int(want(a)) % 2**32, np.uint32))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        *[
            (f"{op}{q}.f32", "needs sm_100a; the device is sm_90a")
            for op, q in [
                ("min", ""),
                ("max", ""),
                ("min", ".abs"),
                ("max", ".NaN"),
                ("min", ".abs.NaN"),
            ]
        ],
        ("add.b32", "redux.sync takes"),
        ("min.b32", "redux.sync takes"),
        ("and.u32", "redux.sync takes"),
        ("add.u64", "redux.sync takes"),
        ("min.abs.s32", "modifier .abs"),
    ],
)
def test_forms_of_redux_that_do_not_exist_here(sim: S.Simulator, form: str, words: str) -> None:
    register = {"64": ".b64", "32": ".b32"}[form[-2:]]
    with pytest.raises(S.SimulatorError) as caught:
        sim.load(S.kernel(f".reg {register} x;\nredux.sync.{form} x, x, -1; ret;"))
    assert words in str(caught.value) and "PTX line 11" in str(caught.value)


def test_nested_divergence_meets_again(sim: S.Simulator) -> None:
    text = """mov.u32 d0, 0; setp.lt.u32 p, a0, 16; @p bra $LOW;
    add.u32 d0, d0, 100; bra $OUT;
    $LOW: setp.lt.u32 q, a0, 5; @q bra $FEW; add.u32 d0, d0, 10; bra $IN;
    $FEW: add.u32 d0, d0, 1;
    $IN: activemask.b32 d1; add.u32 d0, d0, 1000;
    $OUT: activemask.b32 d2;"""
    value, inside, outside = lanewise(
        sim,
        text.replace("mov.u32 d0, 0;", "mov.u32 d0, 0; mov.u32 d1, 0;"),
        [LANES],
        *[np.uint32] * 3,
    )
    np.testing.assert_array_equal(value, np.where(LANES < 5, 1001, np.where(LANES < 16, 1010, 100)))
    np.testing.assert_array_equal(inside, np.where(LANES < 16, 0xFFFF, 0))
    assert (outside == 2**32 - 1).all()


def test_loops_with_different_counts(sim: S.Simulator) -> None:
    text = """mov.u32 d0, 0; mov.u32 t0, 0;
    $LOOP: setp.ge.u32 p, t0, a0; @p bra $END; add.u32 d0, d0, t0; add.u32 t0, t0, 1; bra $LOOP;
    $END: activemask.b32 d1;"""
    total, mask = lanewise(sim, text, [LANES], np.uint32, np.uint32)
    np.testing.assert_array_equal(total, LANES * (LANES - np.uint32(1)) // 2)
    assert (mask == 2**32 - 1).all()


def test_lanes_that_wait_for_lanes_of_their_own_warp(sim: S.Simulator) -> None:
    """A spinning lane must not keep the others of its warp from what it spins for."""
    ptx = S.kernel(
        """
    .shared .align 8 .b64 bar; .reg .pred p, done; .reg .b32 r, a; .reg .b64 o;
    mov.u32 r, %tid.x; mov.u32 a, bar; setp.ne.u32 p, r, 0; @p bra $SKIP; mbarrier.init.shared.b64 [a], 1;
    $SKIP: bar.warp.sync -1; setp.eq.u32 p, r, 31; @p bra $ARRIVE;
    $WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [a], 0; @done bra $OUT; bra $WAIT;
    $ARRIVE: mbarrier.arrive.shared.b64 _, [a];
    $OUT: ld.param.u64 o, [out]; mad.wide.u32 o, r, 4, o; st.global.u32 [o], r; ret;""",
        parameters=".param .u64 out",
    )
    out = sim.zeros(32, np.uint32)
    sim.load(ptx).launch("k", out)
    np.testing.assert_array_equal(out.read(), LANES)


def matrix_kernel(move: str, count: int, is_load: bool) -> str:
    """Copies 1 KB into shared memory, moves matrices, writes registers (load) or memory (store) out."""
    regs = ", ".join(f"m{i}" for i in range(count))
    into = (
        " ".join(f"ld.global.u32 m{i}, [src + {128 * i}];" for i in range(4)) if not is_load else ""
    )
    out = (
        " ".join(f"st.global.u32 [dst + {128 * i}], m{i};" for i in range(count)) if is_load else ""
    )
    operands = f"{{{regs}}}, [row]" if is_load else f"[row], {{{regs}}}"
    copy_in = (
        " ".join(
            f"ld.global.u32 x, [src + {128 * i}]; st.shared.u32 [s + {128 * i}], x;"
            for i in range(4)
        )
        if is_load
        else ""
    )
    zero = "" if is_load else " ".join(f"st.shared.u32 [s + {128 * i}], 0;" for i in range(4))
    copy_out = (
        ""
        if is_load
        else "bar.warp.sync -1; "
        + " ".join(
            f"ld.shared.u32 x, [s + {128 * i}]; st.global.u32 [dst + {128 * i}], x;"
            for i in range(4)
        )
    )
    return S.kernel(
        f""".shared .align 16 .b8 mem[512]; .reg .b32 m<4>, x, t, s, row; .reg .b64 src, dst;
    mov.u32 t, %tid.x; mov.u32 s, mem; mad.lo.u32 row, t, 16, s; mad.lo.u32 s, t, 4, s;
    ld.param.u64 src, [a]; mad.wide.u32 src, t, 4, src; ld.param.u64 dst, [b]; mad.wide.u32 dst, t, 4, dst;
    {into} {copy_in} {zero} bar.warp.sync -1; {move} {operands}; {out} {copy_out} ret;""",
        parameters=".param .u64 a, .param .u64 b",
    )


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(sim: S.Simulator, count: int, trans: bool) -> None:
    data = np.arange(256, dtype=np.uint16)
    out = sim.zeros(128, np.uint32)
    t = ".trans" if trans else ""
    sim.load(
        matrix_kernel(f"ldmatrix.sync.aligned.m8n8.x{count}{t}.shared.b16", count, True)
    ).launch("k", sim.buffer(data), out)
    got = out.read().view(np.uint16).reshape(4, 32, 2)
    for m in range(count):
        matrix = data[64 * m : 64 * m + 64].reshape(8, 8)
        matrix = matrix.T if trans else matrix
        np.testing.assert_array_equal(
            got[m].reshape(8, 8), matrix
        )  # lane l: row l / 4, columns 2 (l % 4) and next


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix(sim: S.Simulator, count: int, trans: bool) -> None:
    data = np.arange(1, 257, dtype=np.uint16)
    out = sim.zeros(256, np.uint16)
    t = ".trans" if trans else ""
    sim.load(
        matrix_kernel(f"stmatrix.sync.aligned.m8n8.x{count}{t}.shared.b16", count, False)
    ).launch("k", sim.buffer(data), out)
    got = out.read()
    for m in range(count):
        fragment = data[64 * m : 64 * m + 64].reshape(8, 8)
        np.testing.assert_array_equal(
            got[64 * m : 64 * m + 64].reshape(8, 8), fragment.T if trans else fragment
        )
    assert not got[64 * count :].any()


def test_movmatrix(sim: S.Simulator) -> None:
    data = np.arange(64, dtype=np.uint16)
    (got,) = lanewise(
        sim, "movmatrix.sync.aligned.m8n8.trans.b16 d0, a0;", [data.view(np.uint32)], np.uint32
    )
    np.testing.assert_array_equal(got.view(np.uint16).reshape(8, 8), data.reshape(8, 8).T)


def test_special_registers(sim: S.Simulator) -> None:
    names = [
        "%tid.x",
        "%tid.y",
        "%ntid.x",
        "%ntid.y",
        "%ctaid.x",
        "%ctaid.y",
        "%nctaid.x",
        "%nctaid.y",
        "%laneid",
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%clusterid.x",
        "%lanemask_lt",
    ]
    body = f""".reg .b32 v, i, b, n; .reg .b64 o; mov.u32 i, %tid.y; mov.u32 n, %ntid.x; mov.u32 v, %tid.x; mad.lo.u32 i, i, n, v;
    mov.u32 b, %ctaid.y; mov.u32 v, %nctaid.x; mul.lo.u32 b, b, v; mov.u32 v, %ctaid.x; add.u32 b, b, v; mad.lo.u32 i, b, 64, i;
    ld.param.u64 o, [out]; mad.wide.u32 o, i, {4 * len(names)}, o; """
    body += (
        " ".join(f"mov.u32 v, {n}; st.global.u32 [o + {4 * j}], v;" for j, n in enumerate(names))
        + " ret;"
    )
    out = sim.zeros((8, 64, len(names)), np.uint32)
    sim.load(S.kernel(body, parameters=".param .u64 out")).launch(
        "k", out, grid=(4, 2), block=(16, 4), cluster=(2, 1)
    )
    got = out.read()
    for cta in range(8):
        for thread in range(64):
            x, y, lane = cta % 4, cta // 4, thread % 32
            want = [
                thread % 16,
                thread // 16,
                16,
                4,
                x,
                y,
                4,
                2,
                lane,
                x % 2,
                2,
                x // 2,
                (1 << lane) - 1,
            ]
            np.testing.assert_array_equal(got[cta, thread], want)

# ruff: noqa: E501 - PTX text reads better unbroken
"""Integer arithmetic, logic, shifts and bit fields against NumPy and Python integers."""

from __future__ import annotations

import numpy as np
import pytest

import flash8_sim as S
from lanewise import lanewise

WIDTHS = {16: (np.uint16, np.int16), 32: (np.uint32, np.int32), 64: (np.uint64, np.int64)}


def draw(bits: int, signed: bool, seed: int, count: int = 256) -> np.ndarray:
    kind = WIDTHS[bits][int(signed)]
    raw = np.random.default_rng(seed).integers(0, 2**63, count, dtype=np.uint64) * np.uint64(3)
    raw = raw >> np.random.default_rng(seed + 9).integers(0, 60, count, dtype=np.uint64)
    edges = np.array([0, 1, 2, 3, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1], np.uint64)
    return (
        np.concatenate([np.repeat(edges, 10), np.tile(edges, 10), raw])
        .astype(WIDTHS[bits][0])
        .view(kind)
    )


def pair(bits: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    a = draw(bits, signed, 1)
    return a, np.roll(draw(bits, signed, 2), 7)


def wrap(values: list[int], bits: int, signed: bool) -> np.ndarray:
    return (
        np.array([v % 2**bits for v in values], np.uint64)
        .astype(WIDTHS[bits][0])
        .view(WIDTHS[bits][int(signed)])
    )


def divide(x: int, y: int) -> int:
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


OPERATIONS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "min": min,
    "max": max,
    "div": divide,
    "rem": lambda x, y: x - y * divide(x, y),
}


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_arithmetic(sim: S.Simulator, name: str, bits: int, signed: bool) -> None:
    a, b = pair(bits, signed)
    if name in ("div", "rem"):
        b = np.where(b == 0, 1, b).astype(b.dtype)
    (got,) = lanewise(
        sim, f"{name}.{'s' if signed else 'u'}{bits} d0, a0, a1;", [a, b], a.dtype.type
    )
    want = [OPERATIONS[name](int(x), int(y)) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(got, wrap(want, bits, signed))


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_mul_hi_and_mad(sim: S.Simulator, bits: int, signed: bool) -> None:
    a, b = pair(bits, signed)
    c = np.roll(a, 3)
    kind = f"{'s' if signed else 'u'}{bits}"
    hi, mad = lanewise(
        sim,
        f"mul.hi.{kind} d0, a0, a1; mad.lo.{kind} d1, a0, a1, a2;",
        [a, b, c],
        a.dtype.type,
        a.dtype.type,
    )
    triples = [(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(hi, wrap([(x * y) >> bits for x, y, _ in triples], bits, signed))
    np.testing.assert_array_equal(mad, wrap([x * y + z for x, y, z in triples], bits, signed))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("signed", [False, True])
def test_mul_and_mad_wide(sim: S.Simulator, bits: int, signed: bool) -> None:
    a, b = pair(bits, signed)
    wide = WIDTHS[2 * bits][int(signed)]
    c = np.roll(a, 3).astype(wide)
    kind = f"{'s' if signed else 'u'}{bits}"
    mul, mad = lanewise(
        sim, f"mul.wide.{kind} d0, a0, a1; mad.wide.{kind} d1, a0, a1, a2;", [a, b, c], wide, wide
    )
    products = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(mul, wrap(products, 2 * bits, signed))
    np.testing.assert_array_equal(
        mad, wrap([p + int(z) for p, z in zip(products, c, strict=True)], 2 * bits, signed)
    )


def test_saturation_and_carry(sim: S.Simulator) -> None:
    a, b = pair(32, True)
    add, sub = lanewise(
        sim, "add.sat.s32 d0, a0, a1; sub.sat.s32 d1, a0, a1;", [a, b], np.int32, np.int32
    )
    np.testing.assert_array_equal(add, np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1))
    np.testing.assert_array_equal(sub, np.clip(a.astype(np.int64) - b, -(2**31), 2**31 - 1))
    x, y = pair(64, False)
    text = """mov.b64 {t0, t1}, a0; mov.b64 {t2, t3}, a1;
    add.cc.u32 t4, t0, t2; addc.u32 t5, t1, t3; mov.b64 d0, {t4, t5};
    sub.cc.u32 t4, t0, t2; subc.u32 t5, t1, t3; mov.b64 d1, {t4, t5};"""
    total, difference = lanewise(sim, text, [x, y], np.uint64, np.uint64)
    np.testing.assert_array_equal(total, x + y)
    np.testing.assert_array_equal(difference, x - y)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_negation(sim: S.Simulator, bits: int) -> None:
    a, b = pair(bits, False)
    k = a.dtype.type
    got = lanewise(
        sim,
        f"and.b{bits} d0, a0, a1; or.b{bits} d1, a0, a1; xor.b{bits} d2, a0, a1; not.b{bits} d3, a0; "
        f"neg.s{bits} d4, a0; abs.s{bits} d5, a0; cnot.b{bits} d6, a0;",
        [a, b],
        *[k] * 7,
    )
    s = a.view(WIDTHS[bits][1])
    for have, want in zip(
        got,
        [a & b, a | b, a ^ b, ~a, (-s).view(k), np.abs(s).view(k), (a == 0).astype(k)],
        strict=True,
    ):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts(sim: S.Simulator, bits: int) -> None:
    a = draw(bits, False, 3)
    n = (np.arange(len(a)) % (bits + 9)).astype(np.uint32)
    k = a.dtype.type
    left, logical, arithmetic = lanewise(
        sim,
        f"shl.b{bits} d0, a0, a1; shr.u{bits} d1, a0, a1; shr.s{bits} d2, a0, a1;",
        [a, n],
        k,
        k,
        k,
    )
    pairs = [(int(x), int(y)) for x, y in zip(a, n, strict=True)]
    signed = [(int(x), int(y)) for x, y in zip(a.view(WIDTHS[bits][1]), n, strict=True)]
    np.testing.assert_array_equal(left, wrap([x << y for x, y in pairs], bits, False))
    np.testing.assert_array_equal(logical, wrap([x >> y for x, y in pairs], bits, False))
    np.testing.assert_array_equal(arithmetic, wrap([x >> y for x, y in signed], bits, False))


def test_funnel_shift(sim: S.Simulator) -> None:
    a, b = pair(32, False)
    n = (np.arange(len(a)) % 40).astype(np.uint32)
    got = lanewise(
        sim,
        "shf.l.wrap.b32 d0, a0, a1, a2; shf.r.wrap.b32 d1, a0, a1, a2; "
        "shf.l.clamp.b32 d2, a0, a1, a2; shf.r.clamp.b32 d3, a0, a1, a2;",
        [a, b, n],
        *[np.uint32] * 4,
    )
    both = [(int(y) << 32) | int(x) for x, y in zip(a, b, strict=True)]
    wrapped, clamped = [int(v) & 31 for v in n], [min(int(v), 32) for v in n]
    for have, amounts, left in (
        (got[0], wrapped, True),
        (got[1], wrapped, False),
        (got[2], clamped, True),
        (got[3], clamped, False),
    ):
        want = [
            ((v << s) >> 32 if left else v >> s) & 0xFFFFFFFF
            for v, s in zip(both, amounts, strict=True)
        ]
        np.testing.assert_array_equal(have, np.array(want, np.uint32))


def test_bit_counts(sim: S.Simulator) -> None:
    a = draw(32, False, 4)
    popc, clz, brev, find, amount = lanewise(
        sim,
        "popc.b32 d0, a0; clz.b32 d1, a0; brev.b32 d2, a0; bfind.u32 d3, a0; bfind.shiftamt.u32 d4, a0;",
        [a],
        *[np.uint32] * 5,
    )
    values = [int(x) for x in a]
    np.testing.assert_array_equal(popc, [bin(x).count("1") for x in values])
    np.testing.assert_array_equal(clz, [32 - x.bit_length() for x in values])
    np.testing.assert_array_equal(brev, [int(f"{x:032b}"[::-1], 2) for x in values])
    np.testing.assert_array_equal(find, [(x.bit_length() - 1) % 2**32 for x in values])
    np.testing.assert_array_equal(amount, [32 - x.bit_length() if x else 2**32 - 1 for x in values])
    wide = draw(64, False, 4)
    popc64, clz64 = lanewise(sim, "popc.b64 d0, a0; clz.b64 d1, a0;", [wide], np.uint32, np.uint32)
    np.testing.assert_array_equal(popc64, [bin(int(x)).count("1") for x in wide])
    np.testing.assert_array_equal(clz64, [64 - int(x).bit_length() for x in wide])


def test_bit_fields(sim: S.Simulator) -> None:
    a, b = pair(32, False)
    rng = np.random.default_rng(5)
    position = rng.integers(0, 40, len(a)).astype(np.uint32)
    length = rng.integers(0, 40, len(a)).astype(np.uint32)
    unsigned, signed, insert = lanewise(
        sim,
        "bfe.u32 d0, a0, a2, a3; bfe.s32 d1, a0, a2, a3; bfi.b32 d2, a0, a1, a2, a3;",
        [a, b, position, length],
        *[np.uint32] * 3,
    )
    for i in range(len(a)):
        x, y, pos, size = int(a[i]), int(b[i]), int(position[i]), int(length[i])
        sign = (x >> min(pos + size - 1, 31)) & 1 if size else 0
        bits = [(x >> (pos + j)) & 1 if j < size and pos + j < 32 else None for j in range(32)]
        assert unsigned[i] == sum((v or 0) << j for j, v in enumerate(bits))
        assert signed[i] == sum((sign if v is None else v) << j for j, v in enumerate(bits))
        field = (((1 << min(size, 32)) - 1) << pos) & 0xFFFFFFFF
        assert insert[i] == (y & ~field & 0xFFFFFFFF) | ((x << pos) & field)


def test_prmt(sim: S.Simulator) -> None:
    a, b = pair(32, False)
    selector = (
        np.random.default_rng(6).integers(0, 2**32, len(a), dtype=np.uint64).astype(np.uint32)
    )
    modes = ["", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"]
    got = lanewise(
        sim,
        " ".join(f"prmt.b32{m} d{i}, a0, a1, a2;" for i, m in enumerate(modes)),
        [a, b, selector],
        *[np.uint32] * 7,
    )
    for i in range(len(a)):
        data = [(int(a[i]) >> (8 * j)) & 0xFF for j in range(4)] + [
            (int(b[i]) >> (8 * j)) & 0xFF for j in range(4)
        ]
        s, low = int(selector[i]), int(selector[i]) & 3

        def pick(nibble: int, data: list[int] = data) -> int:
            value = data[nibble & 7]
            return (0xFF if value & 0x80 else 0) if nibble & 8 else value

        chosen = [
            [(s >> (4 * j)) & 15 for j in range(4)],
            [low + j for j in range(4)],
            [(low - j) % 8 for j in range(4)],
            [low] * 4,
            [max(j, low) for j in range(4)],
            [min(j, low) for j in range(4)],
            [(low & 1) * 2 + j % 2 for j in range(4)],
        ]
        for have, nibbles in zip(got, chosen, strict=True):
            assert have[i] == sum(pick(n) << (8 * j) for j, n in enumerate(nibbles))


@pytest.mark.parametrize("table", [0x00, 0x80, 0xE8, 0x96, 0xCA, 0xFE, 0x1B])
def test_lop3(sim: S.Simulator, table: int) -> None:
    a, b = pair(32, False)
    c = np.roll(b, 5)
    (got,) = lanewise(sim, f"lop3.b32 d0, a0, a1, a2, {table};", [a, b, c], np.uint32)
    want = np.zeros_like(a)
    for bit in range(32):
        index = ((a >> bit) & 1) << 2 | ((b >> bit) & 1) << 1 | ((c >> bit) & 1)
        want |= ((table >> index) & 1).astype(np.uint32) << np.uint32(bit)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("compare", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("signed", [False, True])
def test_setp_selp(sim: S.Simulator, compare: str, bits: int, signed: bool) -> None:
    a, b = pair(bits, signed)
    b = np.where(np.arange(len(b)) % 3 == 0, a, b)
    text = f"setp.{compare}.{'s' if signed else 'u'}{bits} p|q, a0, a1; selp.u32 d0, 7, 3, p; selp.b32 d1, 1, 0, q;"
    chosen, inverse = lanewise(sim, text, [a, b], np.uint32, np.uint32)
    holds = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[
        compare
    ]
    np.testing.assert_array_equal(chosen, np.where(holds, 7, 3))
    np.testing.assert_array_equal(inverse, ~holds)


def test_predicate_logic(sim: S.Simulator) -> None:
    a, b = pair(32, False)
    text = """setp.gt.u32 p, a0, 1000; setp.lt.and.u32 q, a1, 5000, p; setp.lt.or.u32 r, a1, 5000, !p;
    selp.u32 d0, 1, 0, q; selp.u32 d1, 1, 0, r; xor.pred r, p, q; selp.u32 d2, 1, 0, r;
    not.pred r, p; and.pred r, r, q; selp.u32 d3, 1, 0, r; mov.u32 d4, 5; @!p mov.u32 d4, 9; set.gt.u32.u32 d5, a0, a1;"""
    got = lanewise(sim, text, [a, b], *[np.uint32] * 6)
    p, lt = a > 1000, b < 5000
    q = lt & p
    for have, want in zip(
        got,
        [q, lt | ~p, p ^ q, ~p & q, np.where(p, 5, 9), np.where(a > b, 2**32 - 1, 0)],
        strict=True,
    ):
        np.testing.assert_array_equal(have, want.astype(np.uint32))

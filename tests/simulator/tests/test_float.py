# ruff: noqa: E501 - PTX text reads better unbroken
"""Floating-point arithmetic and conversions against NumPy and formats written from their definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import flash8_sim as S
from lanewise import interesting_floats, lanewise

FORMATS = {
    "f16": (5, 10, True),
    "bf16": (8, 7, True),
    "e4m3": (4, 3, False),
    "e5m2": (5, 2, True),
    "tf32": (8, 10, True),
}


def decode(code: int, fmt: str) -> float:
    """The value of a code: sign, exponent and mantissa fields taken apart."""
    e_bits, m_bits, has_inf = FORMATS[fmt]
    sign = -1.0 if code >> (e_bits + m_bits) & 1 else 1.0
    e, m = (code >> m_bits) & (2**e_bits - 1), code & (2**m_bits - 1)
    bias = 2 ** (e_bits - 1) - 1
    if e == 2**e_bits - 1 and has_inf:
        return sign * np.inf if m == 0 else np.nan
    if not has_inf and e == 2**e_bits - 1 and m == 2**m_bits - 1:
        return np.nan
    return sign * (
        m * 2.0 ** (1 - bias - m_bits) if e == 0 else (1 + m / 2**m_bits) * 2.0 ** (e - bias)
    )


def table(fmt: str) -> np.ndarray:
    e_bits, m_bits, _ = FORMATS[fmt]
    return np.array([decode(c, fmt) for c in range(2 ** (e_bits + m_bits))])


def nearest(values: np.ndarray, fmt: str, *, satfinite: bool) -> np.ndarray:
    """Codes by search among all finite codes: nearest, ties to the even code."""
    codes = table(fmt)
    finite = int(np.sum(np.isfinite(codes)))
    grid = codes[:finite]
    e_bits, m_bits, _ = FORMATS[fmt]
    size = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(grid, size, side="left"), 1, finite - 1)
    low, high = grid[above - 1], grid[above]
    middle = (low + high) / 2
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    code = np.where(size == grid[0], 0, code)
    limit = grid[-1] + (grid[-1] - grid[-2]) / 2
    infinity = finite - 1 if satfinite else finite
    code = np.where(size >= limit, infinity, code)
    code = np.where(size > grid[-1], np.where(size >= limit, infinity, finite - 1), code)
    code = np.where(np.isnan(values), 2 ** (e_bits + m_bits) - 1, code)
    sign = np.signbit(values) & ~np.isnan(values)
    return code + np.where(sign, 2 ** (e_bits + m_bits), 0)


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits, any NaN for any NaN."""
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    raw = np.uint32 if got.dtype == np.float32 else np.uint64
    np.testing.assert_array_equal(got.view(raw)[~nan], want.view(raw)[~nan])


def ftz(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x).astype(np.float32)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    np.seterr(all="ignore")


@pytest.mark.parametrize("flush", [False, True])
def test_f32_arithmetic(sim: S.Simulator, flush: bool) -> None:
    a = interesting_floats(500)
    b, c = np.roll(a, 13), np.roll(a, 101)
    f, z = (".ftz", ftz) if flush else ("", lambda x: x)
    names = [
        f"add{f}.f32 d0, a0, a1;",
        f"sub{f}.f32 d1, a0, a1;",
        f"mul{f}.f32 d2, a0, a1;",
        f"div.rn{f}.f32 d3, a0, a1;",
        f"neg{f}.f32 d4, a0;",
        f"abs{f}.f32 d5, a0;",
        f"sqrt.rn{f}.f32 d6, a0;",
        f"rcp.rn{f}.f32 d7, a0;",
    ]
    got = lanewise(sim, " ".join(names), [a, b], *[np.float32] * 8)
    x, y = z(a), z(b)
    for have, want in zip(
        got, [x + y, x - y, x * y, x / y, -x, np.abs(x), np.sqrt(x), np.float32(1) / x], strict=True
    ):
        same(have, z(want.astype(np.float32)))
    (fma,) = lanewise(sim, f"fma.rn{f}.f32 d0, a0, a1, a2;", [a, b, c], np.float32)
    x, y, w = (z(v) for v in (a, b, c))
    exact = [
        float(_round32(Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))))
        if np.isfinite(p) and np.isfinite(q) and np.isfinite(r)
        else float(p) * float(q) + float(r)
        for p, q, r in zip(x, y, w, strict=True)
    ]
    want = np.array(exact).astype(np.float32)
    nonzero = want != 0  # the sign of an exact zero is not in the fraction
    same(fma[nonzero], z(want)[nonzero])


def _round32(x: Fraction) -> float:
    """Nearest float32 (ties to even) of an exact value."""
    if x == 0:
        return 0.0
    size = abs(x)
    e = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, -150)
    while Fraction(2) ** (e + 1) <= size:
        e += 1
    unit = Fraction(2) ** (max(e, -126) - 23)
    count = round(size / unit)
    value = float(count * unit) if count * unit < Fraction(2) ** 128 else np.inf
    return value if x > 0 else -value


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(sim: S.Simulator, mode: str) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal(512).astype(np.float32) for _ in range(2))
    add, mul = lanewise(
        sim,
        f"add.{mode}.f32 d0, a0, a1; mul.{mode}.f32 d1, a0, a1;",
        [a, b],
        np.float32,
        np.float32,
    )
    for have, exact in (
        (add, [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(a, b, strict=True)]),
        (mul, [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)]),
    ):
        for h, e in zip(have, exact, strict=True):
            value, down = Fraction(float(h)), mode == "rm" or (mode == "rz" and e > 0)
            other = Fraction(
                float(np.nextafter(h, np.float32(np.inf if down else -np.inf), dtype=np.float32))
            )
            assert value <= e < other if down else other < e <= value


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_max(sim: S.Simulator, name: str) -> None:
    a = interesting_floats(300)
    b = np.roll(a, 17)
    plain, nan = lanewise(
        sim, f"{name}.f32 d0, a0, a1; {name}.NaN.f32 d1, a0, a1;", [a, b], np.float32, np.float32
    )
    pick = np.fmin if name == "min" else np.fmax
    want = pick(a, b).astype(np.float32)
    zero = (a == 0) & (b == 0)
    negative = (np.signbit(a) | np.signbit(b)) if name == "min" else (np.signbit(a) & np.signbit(b))
    want = np.where(zero, np.where(negative, np.float32(-0.0), np.float32(0)), want)
    same(plain, want)
    same(nan, np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), want))


@pytest.mark.parametrize(
    ("op", "function", "relative", "absolute"),
    [
        ("ex2.approx.ftz", np.exp2, 2.0**-22, 0),
        ("lg2.approx.ftz", np.log2, 2.0**-22, 2.0**-22),
        ("rcp.approx.ftz", np.reciprocal, 2.0**-23, 0),
        ("rsqrt.approx.ftz", lambda x: 1 / np.sqrt(x), 2.0**-22, 0),
        ("sqrt.approx.ftz", np.sqrt, 2.0**-22, 0),
        ("sin.approx.ftz", np.sin, 0, 2.0**-20),
        ("cos.approx.ftz", np.cos, 0, 2.0**-20),
        ("tanh.approx", np.tanh, 2.0**-11, 0),
    ],
)
def test_special_functions_within_the_stated_error(
    sim: S.Simulator, op: str, function: object, relative: float, absolute: float
) -> None:
    x = np.concatenate([np.linspace(-3, 3, 3001), np.linspace(-130, 129, 800)]).astype(np.float32)
    if op.startswith(("lg2", "rsqrt", "sqrt")):
        x = np.abs(x) + np.float32(1e-6)
    if op.startswith(("sin", "cos")):
        x = np.clip(x, -3, 3)
    (got,) = lanewise(sim, f"{op}.f32 d0, a0;", [x], np.float32)
    want = ftz(function(x.astype(np.float64)).astype(np.float32)).astype(np.float64)  # type: ignore[operator]
    finite = np.isfinite(want) & (np.abs(want) >= 2.0**-126)
    error = np.abs(got[finite] - want[finite])
    assert np.all(error <= relative * 1.01 * np.abs(want[finite]) + absolute)
    special = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    (edge,) = lanewise(sim, "ex2.approx.ftz.f32 d0, a0;", [special], np.float32)
    np.testing.assert_array_equal(edge, [np.inf, 0, np.nan, 1])


def test_float_comparisons_and_nan(sim: S.Simulator) -> None:
    a = interesting_floats(200)
    b = np.where(np.arange(len(a)) % 3 == 0, a, np.roll(a, 5)).astype(np.float32)
    names = ["eq", "ne", "lt", "le", "gt", "ge"]
    text = " ".join(
        f"setp.{n}{u}.f32 p, a0, a1; selp.u32 d{i * 2 + j}, 1, 0, p;"
        for i, n in enumerate(names)
        for j, u in enumerate(["", "u"])
    )
    text += " setp.num.f32 p, a0, a1; selp.u32 d12, 1, 0, p; setp.nan.f32 p, a0, a1; selp.u32 d13, 1, 0, p;"
    got = lanewise(sim, text, [a, b], *[np.uint32] * 14)
    nan = np.isnan(a) | np.isnan(b)
    for i, holds in enumerate([a == b, (a != b) & ~nan, a < b, a <= b, a > b, a >= b]):
        np.testing.assert_array_equal(got[2 * i], holds)
        np.testing.assert_array_equal(got[2 * i + 1], holds | nan)
    np.testing.assert_array_equal(got[12], ~nan)
    np.testing.assert_array_equal(got[13], nan)


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_f32_to_sixteen_bits(sim: S.Simulator, fmt: str) -> None:
    x = np.concatenate([interesting_floats(4000), np.repeat(table(fmt), 1)[::7].astype(np.float32)])
    one, two = lanewise(
        sim,
        f"cvt.rn.{fmt}.f32 d0, a0; cvt.rn.{fmt}x2.f32 d1, a0, a1;",
        [x, np.roll(x, 1)],
        np.uint16,
        np.uint32,
    )
    want = nearest(x, fmt, satfinite=False)
    np.testing.assert_array_equal(one, want)
    np.testing.assert_array_equal(two >> 16, want)
    np.testing.assert_array_equal(two & 0xFFFF, np.roll(want, 1))
    (zero,) = lanewise(sim, f"cvt.rz.{fmt}.f32 d0, a0;", [x], np.uint16)
    finite = np.isfinite(x)
    values = np.array([decode(int(c), fmt) for c in zero])[finite]
    assert np.all(np.abs(values) <= np.abs(x[finite].astype(np.float64)))


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_every_sixteen_bit_code_to_f32_and_back(sim: S.Simulator, fmt: str) -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    up, back = lanewise(
        sim, f"cvt.f32.{fmt} d0, a0; cvt.rn.{fmt}.f32 d1, d0;", [codes], np.float32, np.uint16
    )
    want = np.concatenate([table(fmt), -table(fmt)]).astype(np.float32)
    same(up, want)
    ok = ~np.isnan(want)
    np.testing.assert_array_equal(back[ok], codes[ok])


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_f32_to_eight_bits(sim: S.Simulator, fmt: str) -> None:
    grid = table(fmt)
    grid = grid[np.isfinite(grid)]
    middles = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    near = np.concatenate(
        [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))]
    )
    x = np.concatenate([interesting_floats(5000), near, -near])
    packed, relu = lanewise(
        sim,
        f"cvt.rn.satfinite.{fmt}x2.f32 d0, a0, a1; cvt.rn.satfinite.relu.{fmt}x2.f32 d1, a0, a1;",
        [x, np.roll(x, 1)],
        np.uint16,
        np.uint16,
    )
    want = nearest(x, fmt, satfinite=True)
    np.testing.assert_array_equal(packed >> 8, want)
    np.testing.assert_array_equal(packed & 0xFF, np.roll(want, 1))
    np.testing.assert_array_equal(relu >> 8, np.where(np.signbit(x) & ~np.isnan(x), 0, want))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_every_pair_of_eight_bit_codes(sim: S.Simulator, fmt: str) -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    halves, back = lanewise(
        sim,
        f"cvt.rn.f16x2.{fmt}x2 d0, a0; cvt.rn.satfinite.{fmt}x2.f16x2 d1, d0;",
        [codes],
        np.uint32,
        np.uint16,
    )
    values = np.array([decode(c, fmt) for c in range(256)])
    low = np.array([decode(int(h) & 0xFFFF, "f16") for h in halves])
    high = np.array([decode(int(h) >> 16, "f16") for h in halves])
    np.testing.assert_array_equal(low, values[codes & 0xFF])
    np.testing.assert_array_equal(high, values[codes >> 8])
    ok = np.isfinite(low) & np.isfinite(high)
    np.testing.assert_array_equal(back[ok], codes[ok])


def test_half_to_eight_bits_over_all_halves(sim: S.Simulator) -> None:
    codes = np.arange(2**16, dtype=np.uint32)
    (got,) = lanewise(
        sim, "cvt.rn.satfinite.e4m3x2.f16x2 d0, a0;", [codes | codes << np.uint32(16)], np.uint16
    )
    values = np.concatenate([table("f16"), -table("f16")])
    want = nearest(values, "e4m3", satfinite=True)
    np.testing.assert_array_equal(got & 0xFF, want)
    np.testing.assert_array_equal(got >> 8, want)


def test_integer_float_conversions(sim: S.Simulator) -> None:
    x = np.concatenate(
        [
            interesting_floats(1000),
            np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2**31, -(2**31), 2**32, 4e9], np.float32),
        ]
    )
    modes = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for name, function in modes.items():
        s, u, f = lanewise(
            sim,
            f"cvt.{name}.s32.f32 d0, a0; cvt.{name}.u32.f32 d1, a0; cvt.{name}.f32.f32 d2, a0;",
            [x],
            np.int32,
            np.uint32,
            np.float32,
        )
        rounded = np.nan_to_num(function(x.astype(np.float64)), nan=0.0)
        np.testing.assert_array_equal(
            s, np.clip(rounded, -(2**31), 2**31 - 1).astype(np.int64).astype(np.int32)
        )
        np.testing.assert_array_equal(
            u, np.clip(rounded, 0, 2**32 - 1).astype(np.uint64).astype(np.uint32)
        )
        same(f, function(x).astype(np.float32))
    n = np.random.default_rng(1).integers(-(2**31), 2**31, 500).astype(np.int32)
    f, g, w, back = lanewise(
        sim,
        "cvt.rn.f32.s32 d0, a0; cvt.rn.f32.u32 d1, a0; cvt.s64.s32 d2, a0; cvt.u32.u64 d3, d2;",
        [n],
        np.float32,
        np.float32,
        np.int64,
        np.uint32,
    )
    same(f, n.astype(np.float32))
    same(g, n.view(np.uint32).astype(np.float32))
    np.testing.assert_array_equal(w, n)
    np.testing.assert_array_equal(back, n.view(np.uint32))
    narrow = lanewise(
        sim,
        "cvt.u8.u32 h0, a0; cvt.u32.u8 d0, h0; cvt.s8.s32 h1, a0; cvt.s32.s8 d1, h1; cvt.sat.u8.s32 h2, a0; cvt.u32.u16 d2, h2;",
        [n],
        np.uint32,
        np.int32,
        np.uint32,
    )
    np.testing.assert_array_equal(narrow[0], n & 0xFF)
    np.testing.assert_array_equal(narrow[1], n.astype(np.int8))
    np.testing.assert_array_equal(narrow[2], np.clip(n, 0, 255))


@pytest.mark.parametrize(("suffix", "bits"), [("rn", False), ("rna", True)])
def test_tf32(sim: S.Simulator, suffix: str, bits: bool) -> None:
    x = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    x = np.concatenate(
        [x, (x.view(np.uint32) & np.uint32(0xFFFFE000) | np.uint32(0x1000)).view(np.float32)]
    )
    (got,) = lanewise(sim, f"cvt.{suffix}.tf32.f32 d0, a0;", [x], np.float32)
    raw = x.view(np.uint32)
    tie = 0x1000 if bits else 0xFFF + ((raw >> 13) & 1)
    np.testing.assert_array_equal(got.view(np.uint32), ((raw + tie) & 0xFFFFE000).astype(np.uint32))


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_packed_half_arithmetic(sim: S.Simulator, fmt: str) -> None:
    rng = np.random.default_rng(8)
    a, b, c = (rng.integers(0, 2**32, 600, dtype=np.uint64).astype(np.uint32) for _ in range(3))
    t = f"{fmt}x2"
    got = lanewise(
        sim,
        f"add.rn.{t} d0, a0, a1; sub.rn.{t} d1, a0, a1; mul.rn.{t} d2, a0, a1; fma.rn.{t} d3, a0, a1, a2; fma.rn.relu.{t} d4, a0, a1, a2;",
        [a, b, c],
        *[np.uint32] * 5,
    )
    for shift in (0, 16):
        x, y, z = (np.array([decode(int(v) >> shift & 0xFFFF, fmt) for v in w]) for w in (a, b, c))
        for have, exact in zip(got, [x + y, x - y, x * y, None, None], strict=True):
            if exact is None:
                continue
            code = have >> shift & 0xFFFF
            np.testing.assert_array_equal(code, nearest(exact, fmt, satfinite=False))
        finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
        for i in np.nonzero(finite)[0][:200]:
            exact_sum = Fraction(x[i]) * Fraction(y[i]) + Fraction(z[i])
            code = int(got[3][i]) >> shift & 0xFFFF
            value = decode(code, fmt)
            if np.isfinite(value) and exact_sum != 0:
                near = [decode(code + d, fmt) for d in (-1, 1) if 0 <= (code + d) & 0x7FFF < 0x7C00]
                assert all(
                    abs(Fraction(value) - exact_sum) <= abs(Fraction(v) - exact_sum)
                    for v in near
                    if np.isfinite(v)
                )
            assert (int(got[4][i]) >> shift & 0xFFFF) == (
                0 if exact_sum < 0 else code
            ) or exact_sum == 0

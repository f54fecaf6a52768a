# ruff: noqa: E501 - PTX text reads better unbroken
"""wgmma: where every operand and accumulator element lies, and how the hardware adds.

Operands are placed in shared memory here by the layouts of the PTX ISA ("Shared Memory Matrix Layout",
"Strides", "Swizzling modes"), written down anew in NumPy; registers by its fragment figures.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import flash8_sim as S

SPAN = {"none": 16, "32": 32, "64": 64, "128": 128}
MODE = {"none": 0, "128": 1, "64": 2, "32": 3}
SIZE = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}
FIELDS = {"f16": (5, 10), "bf16": (8, 7), "e4m3": (4, 3), "e5m2": (5, 2)}


def values_of(codes: np.ndarray, kind: str) -> np.ndarray:
    """Float64 values of operand codes."""
    if kind == "tf32":
        return (codes & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    e_bits, m_bits = FIELDS[kind]
    e = ((codes.astype(np.int64) >> m_bits) & (2**e_bits - 1)).astype(int)
    m = codes.astype(np.int64) & (2**m_bits - 1)
    bias = 2 ** (e_bits - 1) - 1
    size = np.where(
        e == 0,
        m * 2.0 ** (1 - bias - m_bits),
        (1 + m / 2**m_bits) * 2.0 ** (e - bias).astype(float),
    )
    return np.where((codes.astype(np.int64) >> (e_bits + m_bits)) & 1, -size, size)


def draw(shape: tuple[int, int], kind: str, rng: np.random.Generator) -> np.ndarray:
    """Codes of moderate finite values."""
    if kind == "tf32":
        return rng.standard_normal(shape).astype(np.float32).view(np.uint32)
    if kind == "bf16":
        return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(
            np.uint16
        )
    if kind == "f16":
        return rng.standard_normal(shape).astype(np.float16).view(np.uint16)
    top = 0x48 if kind == "e4m3" else 0x44
    return (rng.integers(0, top, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)


def place(matrix: np.ndarray, swizzle: str, mn_major: bool) -> tuple[np.ndarray, int]:
    """Bytes of a (rows of M or N, K) matrix in shared memory, and its descriptor without the address."""
    rows, k_count = matrix.shape
    size, span = matrix.itemsize, SPAN[swizzle]
    per_unit = 16 // size
    room = np.zeros(rows * k_count * size * 8, np.uint8)  # holes of narrow tiles
    raw = matrix.reshape(rows, k_count, 1).view(np.uint8).reshape(rows, k_count, size)
    if swizzle == "none":
        leading, stride = 128, 128 * (2 if not mn_major else k_count // 8)
        if mn_major:
            leading, stride = 128, 128 * (k_count // 8)
    elif mn_major:
        stride = 8 * span  # to the next 8 rows of K
        leading = stride * (k_count // 8)  # to the next span of M or N
    else:
        leading, stride = 16, 8 * span
    for r in range(rows):
        for k in range(k_count):
            if not mn_major:
                unit, byte = divmod(k * size, 16)
                at = r % 8 * (16 if swizzle == "none" else span) + r // 8 * stride + byte
                at += unit * (leading if swizzle == "none" else 16)
            else:
                unit, byte = divmod(r * size, 16)
                if swizzle == "none":
                    at = unit * stride + k % 8 * 16 + k // 8 * leading + byte
                else:
                    at = (
                        unit % (span // 16) * 16
                        + unit // (span // 16) * leading
                        + k % 8 * span
                        + k // 8 * stride
                        + byte
                    )
            row_bits = {
                "none": 0,
                "32": (at >> 7 & 1) << 4,
                "64": (at >> 7 & 3) << 4,
                "128": (at >> 7 & 7) << 4,
            }[swizzle]
            room[(at ^ row_bits) : (at ^ row_bits) + size] = raw[r, k]
    assert per_unit * size == 16
    return room, MODE[swizzle] << 62 | (stride >> 4) << 32 | (leading >> 4) << 16


def accumulator_index(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of register j of thread t of the warpgroup, as arrays [128, n / 2]."""
    t, j = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    return t // 32 * 16 + t % 32 // 4 + 8 * (j // 2 % 2), j // 4 * 8 + t % 4 * 2 + j % 2


def wgmma_ptx(
    n: int,
    kind_a: str,
    kind_b: str,
    result: str,
    *,
    k: int,
    registers: bool,
    negate: tuple[int, int],
    trans: tuple[int, int],
    scale_d: bool,
    a_bytes: int,
    b_bytes: int,
) -> str:
    count = n // 2 if result == "f32" else n // 4
    acc = ", ".join(f"acc{i}" for i in range(count))
    sixteen = SIZE[kind_a] == 2
    flags = f"{negate[0]}, {negate[1]}"
    if sixteen:
        flags += f", {trans[1]}" if registers else f", {trans[0]}, {trans[1]}"
    a_operand = "{r0, r1, r2, r3}" if registers else "da"
    a_load = " ".join(f"ld.global.u32 r{i}, [ga + {4 * i}];" for i in range(4)) if registers else ""
    return S.kernel(
        f"""
    .reg .b32 tid, s, x, i, r<4>; .reg .b64 da, db, g, ga, gb, gc; .reg .pred p; .reg .b32 acc<{count}>;
    mov.u32 tid, %tid.x; mov.u32 s, mem;
    ld.param.u64 ga, [a]; ld.param.u64 gb, [b]; ld.param.u64 gc, [c];
    {"mad.wide.u32 ga, tid, 16, ga;" if registers else f"mov.u32 i, tid; $A: mul.wide.u32 g, i, 4; add.s64 g, g, ga; ld.global.u32 x, [g]; mad.lo.u32 r0, i, 4, s; st.shared.u32 [r0], x; add.u32 i, i, 128; setp.lt.u32 p, i, {a_bytes // 4}; @p bra $A;"}
    mov.u32 i, tid; $B: mul.wide.u32 g, i, 4; add.s64 g, g, gb; ld.global.u32 x, [g]; mad.lo.u32 r0, i, 4, s; st.shared.u32 [r0 + 65536], x; add.u32 i, i, 128; setp.lt.u32 p, i, {b_bytes // 4}; @p bra $B;
    fence.proxy.async.shared::cta; bar.sync 0;
    mad.wide.u32 gc, tid, {4 * count}, gc;
    {" ".join(f"ld.global.u32 acc{i}, [gc + {4 * i}];" for i in range(count))}
    {a_load}
    shr.u32 x, s, 4; cvt.u64.u32 da, x; add.s64 db, da, 4096; ld.param.u64 g, [desc_a]; or.b64 da, da, g; ld.param.u64 g, [desc_b]; or.b64 db, db, g;
    setp.{"ne" if scale_d else "eq"}.u32 p, s, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{result}.{kind_a}.{kind_b} {{{acc}}}, {a_operand}, db, p, {flags};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    {" ".join(f"st.global.u32 [gc + {4 * i}], acc{i};" for i in range(count))} ret;""",
        parameters=".param .u64 a, .param .u64 b, .param .u64 c, .param .u64 desc_a, .param .u64 desc_b",
        module=".extern .shared .align 1024 .b8 mem[];",
    )


def run(
    sim: S.Simulator,
    n: int,
    kind_a: str,
    kind_b: str,
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray,
    *,
    result: str = "f32",
    swizzle: tuple[str, str] = ("128", "128"),
    trans: tuple[int, int] = (0, 0),
    negate: tuple[int, int] = (1, 1),
    registers: bool = False,
    scale_d: bool = True,
) -> np.ndarray:
    """D for A (64, K) and B (n, K) codes, C (64, n) float32 or float16."""
    k = a.shape[1]
    if registers:
        lanes = np.empty((128, 4), np.uint32)
        group = 4 // a.itemsize
        for t in range(128):
            for j in range(4):
                row, column = (
                    t // 32 * 16 + t % 32 // 4 + 8 * (j % 2),
                    t % 4 * group + j // 2 * k // 2,
                )
                lanes[t, j] = np.ascontiguousarray(a[row, column : column + group]).view(np.uint32)[
                    0
                ]
        a_room, desc_a = lanes.view(np.uint8).reshape(-1), 0
    else:
        a_room, desc_a = place(a, swizzle[0], bool(trans[0]))
    b_room, desc_b = place(b, swizzle[1], bool(trans[1]))
    rows, columns = accumulator_index(n)
    fragment = np.ascontiguousarray(c[rows, columns])
    ptx = wgmma_ptx(
        n,
        kind_a,
        kind_b,
        result,
        k=k,
        registers=registers,
        negate=negate,
        trans=trans,
        scale_d=scale_d,
        a_bytes=a_room.nbytes,
        b_bytes=b_room.nbytes,
    )
    buffers = [sim.buffer(x) for x in (a_room, b_room, fragment)]
    module = sim.load(ptx)
    module.launch(
        "k", *buffers, np.uint64(desc_a), np.uint64(desc_b), block=128, shared=65536 + b_room.nbytes
    )
    out = np.empty_like(c)
    out[rows, columns] = buffers[2].read().view(c.dtype).reshape(fragment.shape)
    for buffer in buffers:
        buffer.free()
    module.unload()
    return out


def hardware_sum(
    a: np.ndarray, b: np.ndarray, c: float, kind_a: str, kind_b: str, result: str = "f32"
) -> float:
    """One element as Hopper adds it, in exact fractions: align to the largest exponent, truncate, add, round."""
    smallest = {"f16": -14, "bf16": -126, "tf32": -126, "e4m3": -6, "e5m2": -14}
    fraction_bits = 13 if SIZE[kind_a] == 1 else 25

    def exponent(x: float, low: int) -> int:
        return -126 if x == 0 else max(int(np.floor(np.log2(abs(x)))), low)

    top = max(
        [exponent(c, -126)]
        + [
            exponent(x, smallest[kind_a]) + exponent(y, smallest[kind_b])
            for x, y in zip(a, b, strict=True)
        ]
    )
    unit = Fraction(2) ** (top - fraction_bits)

    def truncated(x: Fraction) -> Fraction:
        return int(x / unit) * unit

    total = truncated(Fraction(c)) + sum(
        (truncated(Fraction(x) * Fraction(y)) for x, y in zip(a, b, strict=True)), Fraction(0)
    )
    if result == "f16":
        return float(np.float16(float(total)))
    if total == 0:
        return 0.0
    bits = 13 if SIZE[kind_a] == 1 else 23
    last = Fraction(2) ** (max(int(np.floor(np.log2(float(abs(total))))), -126) - bits)
    return float(int(total / last) * last)


CHECKED = np.r_[0:64:7, 8, 15, 17, 33, 47, 55]  # rows: exact fractions are slow


def expected(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, kind_a: str, kind_b: str, result: str = "f32"
) -> np.ndarray:
    x, y = values_of(a, kind_a), values_of(b, kind_b)
    return np.array(
        [
            [
                hardware_sum(x[i], y[j], float(c[i, j]), kind_a, kind_b, result)
                for j in range(len(y))
            ]
            for i in CHECKED
        ]
    )


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32", "e4m3", "e5m2"])
@pytest.mark.parametrize("swizzle", ["none", "32", "64", "128"])
def test_k_major_operands(sim: S.Simulator, kind: str, swizzle: str) -> None:
    rng = np.random.default_rng(1)
    k = 32 // SIZE[kind]
    a, b = draw((64, k), kind, rng), draw((24, k), kind, rng)
    c = rng.standard_normal((64, 24)).astype(np.float32)
    got = run(sim, 24, kind, kind, a, b, c, swizzle=(swizzle, swizzle))
    np.testing.assert_array_equal(got[CHECKED], expected(a, b, c, kind, kind).astype(np.float32))


@pytest.mark.parametrize("swizzle", ["none", "32", "64", "128"])
@pytest.mark.parametrize("trans", [(0, 1), (1, 0), (1, 1)])
def test_mn_major_operands(sim: S.Simulator, swizzle: str, trans: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    a, b = draw((64, 16), "bf16", rng), draw((128, 16), "bf16", rng)
    c = np.zeros((64, 128), np.float32)
    got = run(sim, 128, "bf16", "bf16", a, b, c, swizzle=(swizzle, swizzle), trans=trans)
    want = values_of(a, "bf16") @ values_of(b, "bf16").T
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32", "e4m3", "e5m2"])
def test_operand_a_in_registers(sim: S.Simulator, kind: str) -> None:
    rng = np.random.default_rng(3)
    k = 32 // SIZE[kind]
    a, b = draw((64, k), kind, rng), draw((16, k), kind, rng)
    c = rng.standard_normal((64, 16)).astype(np.float32)
    got = run(sim, 16, kind, kind, a, b, c, registers=True)
    np.testing.assert_array_equal(got[CHECKED], expected(a, b, c, kind, kind).astype(np.float32))


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_n(sim: S.Simulator, n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = draw((64, 16), "f16", rng), draw((n, 16), "f16", rng)
    c = np.zeros((64, n), np.float32)
    got = run(sim, n, "f16", "f16", a, b, c)
    np.testing.assert_allclose(
        got, values_of(a, "f16") @ values_of(b, "f16").T, rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("negate", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("scale_d", [False, True])
def test_signs_and_scale_d(sim: S.Simulator, negate: tuple[int, int], scale_d: bool) -> None:
    rng = np.random.default_rng(4)
    a, b = draw((64, 16), "bf16", rng), draw((8, 16), "bf16", rng)
    c = rng.standard_normal((64, 8)).astype(np.float32)
    got = run(sim, 8, "bf16", "bf16", a, b, c, negate=negate, scale_d=scale_d)
    want = negate[0] * negate[1] * (values_of(a, "bf16") @ values_of(b, "bf16").T) + (
        c if scale_d else 0
    )
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["f16", "e4m3", "e5m2"])
def test_half_accumulators(sim: S.Simulator, kind: str) -> None:
    rng = np.random.default_rng(5)
    k = 32 // SIZE[kind]
    a, b = draw((64, k), kind, rng), draw((16, k), kind, rng)
    c = rng.standard_normal((64, 16)).astype(np.float16)
    got = run(sim, 16, kind, kind, a, b, c, result="f16")
    np.testing.assert_array_equal(
        got[CHECKED], expected(a, b, c, kind, kind, "f16").astype(np.float16)
    )


@pytest.mark.parametrize(
    ("kind_a", "kind_b"),
    [
        ("e4m3", "e4m3"),
        ("e5m2", "e4m3"),
        ("e4m3", "e5m2"),
        ("e5m2", "e5m2"),
        ("f16", "f16"),
        ("bf16", "bf16"),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 2.0**12])
def test_accumulation_is_the_hardwares(
    sim: S.Simulator, kind_a: str, kind_b: str, spread: float
) -> None:
    """Products far below the accumulator lose their low bits, as they do on the device."""
    rng = np.random.default_rng(6)
    k = 32 // SIZE[kind_a]
    a, b = draw((64, k), kind_a, rng), draw((16, k), kind_b, rng)
    a[rng.integers(0, 4, a.shape) == 0] = 0
    c = (rng.standard_normal((64, 16)) * spread).astype(np.float32)
    got = run(sim, 16, kind_a, kind_b, a, b, c)
    np.testing.assert_array_equal(
        got[CHECKED], expected(a, b, c, kind_a, kind_b).astype(np.float32)
    )


def test_eight_bit_accumulators_keep_13_bits(sim: S.Simulator) -> None:
    a, b = np.zeros((64, 32), np.uint8), np.zeros((8, 32), np.uint8)
    c = np.random.default_rng(7).standard_normal((64, 8)).astype(np.float32)
    got = run(sim, 8, "e4m3", "e4m3", a, b, c)
    np.testing.assert_array_equal(got.view(np.uint32), c.view(np.uint32) & np.uint32(0xFFFFFC00))


def test_nan_and_infinity(sim: S.Simulator) -> None:
    a, b = np.full((64, 16), 0x3C00, np.uint16), np.full((8, 16), 0x3C00, np.uint16)
    a[0, 3], a[1, 5], a[2, 7] = 0x7C00, 0xFC00, 0x7E00
    a[3, 0], a[3, 1] = 0x7C00, 0xFC00
    got = run(sim, 8, "f16", "f16", a, b, np.zeros((64, 8), np.float32))
    assert (
        np.all(got[0] == np.inf)
        and np.all(got[1] == -np.inf)
        and np.all(np.isnan(got[2:4]))
        and np.all(got[4:] == 16)
    )
    np.testing.assert_array_equal(got.view(np.uint32)[2], np.full(8, 0x7FFFFFFF))


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("e4m3", 0x7F),
        ("e5m2", 0x7F),
        ("e5m2", 0x7C),
        ("f16", 0x7E00),
        ("f16", 0x7C00),
        ("bf16", 0x7FC0),
        ("bf16", 0x7F80),
    ],
)
def test_zero_times_what_is_not_finite_is_nan(sim: S.Simulator, kind: str, code: int) -> None:
    """Masked probabilities are zero, and rows of V that nobody wrote may hold anything."""
    k, dtype = 32 // SIZE[kind], np.uint8 if SIZE[kind] == 1 else np.uint16
    a, b = np.zeros((64, k), dtype), np.zeros((8, k), dtype)
    b[5, 3] = code
    for first in (0, draw((1, 1), kind, np.random.default_rng(9))[0, 0]):
        a[:, 0] = first  # with and without a product that is not zero
        got = run(sim, 8, kind, kind, a, b, np.zeros((64, 8), np.float32))
        assert np.all(np.isnan(got[:, 5])) and not np.any(np.isnan(np.delete(got, 5, axis=1)))


def test_plain_accumulation_is_close(sim: S.Simulator) -> None:
    rng = np.random.default_rng(8)
    a, b = draw((64, 16), "bf16", rng), draw((64, 16), "bf16", rng)
    c = rng.standard_normal((64, 64)).astype(np.float32)
    exact = run(sim, 64, "bf16", "bf16", a, b, c)
    with sim.configured(exact_16bit=False):
        plain = run(sim, 64, "bf16", "bf16", a, b, c)
    np.testing.assert_allclose(plain, exact, rtol=1e-5, atol=1e-5)

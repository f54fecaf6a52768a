# ruff: noqa: E501 - PTX text reads better unbroken
"""mma.sync, from the PTX ISA: which element each register of a fragment holds, and the product."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import flash8_sim as S

Place = tuple[int, int]


def place_a(lane: int, i: int) -> Place:
    """Element ai of A (PTX ISA, matrix fragments for mma.m16n8k16 and mma.m16n8k8)."""
    group, thread = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)


def place_b(lane: int, i: int) -> Place:
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (0 if i < 2 else 8), group


def place_c(lane: int, i: int) -> Place:
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def fragments(
    matrix: NDArray[np.generic], place: Callable[[int, int], Place], count: int
) -> NDArray[np.uint32]:
    """The registers of 32 lanes, [register][lane]; 16-bit elements lie low first."""
    elements = np.array(
        [[matrix[place(lane, i)] for i in range(count)] for lane in range(32)],
        matrix.dtype,
    )
    return np.ascontiguousarray(elements).view(np.uint32).T.copy()


def matrix_of(registers: NDArray[np.uint32], dtype: type) -> NDArray[np.generic]:
    """The 16 x 8 matrix that the registers of D hold."""
    elements = np.ascontiguousarray(registers.T).view(dtype)
    result = np.zeros((16, 8), dtype)
    for lane in range(32):
        for i in range(4):
            result[place_c(lane, i)] = elements[lane, i]
    return result


def bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(codes: NDArray[np.generic], kind: str) -> NDArray[np.float64]:
    if kind == "bf16":
        return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return codes.view(np.float16).astype(np.float64)


def text(k: int, kind: str, accumulator: str, d: str = "d", c: str = "c") -> str:
    count = 4 if accumulator == "f32" else 2
    names = [
        ", ".join(f"{name}{i}" for i in range(n))
        for name, n in ((d, count), ("a", k // 4), ("b", k // 8), (c, count))
    ]
    operands = ", ".join(f"{{{group}}}" for group in names)
    return (
        f"mma.sync.aligned.m16n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator} {operands};"
    )


def run(
    sim: S.Simulator,
    instruction: str,
    a: NDArray[np.uint32],
    b: NDArray[np.uint32],
    c: NDArray[np.uint32],
    result: str = "d",
) -> NDArray[np.uint32]:
    loads = [
        f"ld.global.u32 {name}{i}, [g{name} + {128 * i}];"
        for name, registers in (("a", a), ("b", b), ("c", c))
        for i in range(len(registers))
    ]
    stores = [f"st.global.u32 [gd + {128 * i}], {result}{i};" for i in range(len(c))]
    addresses = [
        f"ld.param.u64 g{n}, [{n}]; mad.wide.u32 g{n}, t, 4, g{n};" for n in ("a", "b", "c", "d")
    ]
    ptx = S.kernel(
        f".reg .b32 t, a<4>, b<4>, c<4>, d<4>; .reg .b64 ga, gb, gc, gd; .reg .pred p; mov.u32 t, %tid.x; {' '.join(addresses)}\n{' '.join(loads)}\n{instruction}\n{' '.join(stores)} ret;",
        parameters=".param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d",
    )
    out = sim.zeros(c.shape, np.uint32)
    sim.load(ptx).launch("k", sim.buffer(a), sim.buffer(b), sim.buffer(c), out)
    return out.read()


FORMS = [
    (k, *kinds) for k in (16, 8) for kinds in (("f16", "f32"), ("bf16", "f32"), ("f16", "f16"))
]


def encode(x: NDArray[np.float32], kind: str) -> NDArray[np.generic]:
    return bf16(x) if kind == "bf16" else x.astype(np.float16)


@pytest.mark.parametrize(("k", "kind", "accumulator"), FORMS)
@pytest.mark.parametrize("exact", [True, False])
def test_every_element_is_where_the_isa_says(
    sim: S.Simulator, k: int, kind: str, accumulator: str, exact: bool
) -> None:
    """Small integers: every sum is exact, so nothing but the places can be wrong."""
    sim.configure(exact_16bit=exact)
    rng = np.random.default_rng(k)
    a, b, c = (
        rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8))
    )
    dtype = np.float32 if accumulator == "f32" else np.float16
    registers = run(
        sim,
        text(k, kind, accumulator),
        fragments(encode(a, kind), place_a, k // 2),
        fragments(encode(b, kind), place_b, k // 4),
        fragments(c.astype(dtype), place_c, 4),
    )
    np.testing.assert_array_equal(matrix_of(registers, dtype), (a @ b + c).astype(dtype))


@pytest.mark.parametrize(("k", "kind", "accumulator"), FORMS)
def test_the_product_is_as_precise_as_the_isa_promises(
    sim: S.Simulator, k: int, kind: str, accumulator: str
) -> None:
    """At least single precision, or half precision where the accumulators are .f16."""
    rng = np.random.default_rng(k + 1)
    a, b = (encode(rng.standard_normal(s).astype(np.float32), kind) for s in ((16, k), (k, 8)))
    dtype = np.float32 if accumulator == "f32" else np.float16
    c = rng.standard_normal((16, 8)).astype(dtype)
    want = widen(a, kind) @ widen(b, kind) + c
    got = matrix_of(
        run(
            sim,
            text(k, kind, accumulator),
            fragments(a, place_a, k // 2),
            fragments(b, place_b, k // 4),
            fragments(c, place_c, 4),
        ),
        dtype,
    )
    scale = np.abs(widen(a, kind)) @ np.abs(widen(b, kind)) + np.abs(c)
    # (k + 1) terms truncated to 2^-25 of the largest, and one rounding of the result.
    step = (k + 1) * 2.0**-25 + (2.0**-23 if accumulator == "f32" else 2.0**-11)
    assert (np.abs(got - want) <= step * scale).all()


def test_the_result_may_take_the_place_of_the_operands(sim: S.Simulator) -> None:
    rng = np.random.default_rng(5)
    a, b, c = (
        rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8))
    )
    given = (
        fragments(encode(a, "f16"), place_a, 8),
        fragments(encode(b, "f16"), place_b, 4),
        fragments(c, place_c, 4),
    )
    for d in ("a", "c"):
        got = run(sim, text(16, "f16", "f32", d=d), *given, result=d)
        np.testing.assert_array_equal(matrix_of(got, np.float32), a @ b + c)
    # C's registers as D in the opposite order.
    turned = text(16, "f16", "f32").replace("{d0, d1, d2, d3}", "{c3, c2, c1, c0}")
    got = run(sim, turned, *given, result="c")[::-1]
    np.testing.assert_array_equal(matrix_of(got.copy(), np.float32), a @ b + c)


ONES = (np.full((4, 32), 0x3C003C00, np.uint32), np.full((2, 32), 0x3C003C00, np.uint32))


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (
            text(16, "f16", "f32").replace("{b0, b1}", "{b0, b2}"),
            "register that lanes 0xffffffff never",
        ),
        (f"setp.lt.u32 p, t, 16; @p {text(16, 'f16', 'f32')}", "all 32 lanes must execute it"),
        (
            f"setp.lt.u32 p, t, 16; @p bra $X; {text(16, 'f16', 'f32')} $X:",
            "waits for lanes 0x0000ffff",
        ),
    ],
)
def test_faults(sim: S.Simulator, instruction: str, words: str) -> None:
    with pytest.raises(S.SimulatorError, match=words):
        run(sim, instruction, *ONES, np.zeros((4, 32), np.uint32))


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (text(16, "f16", "f32").replace(".row.col", ".col.row"), "A is .row"),
        (text(16, "f16", "f32").replace("m16n8k16", "m8n8k4"), ".m16n8k16"),
        (text(16, "bf16", "f16"), "is modelled for"),
        (text(16, "f16", "f32").replace("f16.f16.f32", "f16.bf16.f32"), "is modelled for"),
        (text(16, "f16", "f32").replace("f16.f16.f32", "f16.f16.f16"), "is modelled for"),
        (text(16, "f16", "f32").replace("{b0, b1}", "{b0}"), "vector of 2 registers"),
        (text(8, "f16", "f32").replace("{b0}", "b0"), "vector of 1 registers"),
        (text(16, "s8", "s32"), "is modelled for"),
    ],
)
def test_forms_that_are_refused(sim: S.Simulator, instruction: str, words: str) -> None:
    registers = ".reg .b32 a<4>, b<4>, c<4>, d<4>;"
    with pytest.raises(S.SimulatorError) as caught:
        sim.load(S.kernel(f"{registers}\n{instruction} ret;"))
    assert words in str(caught.value) and "PTX line 11" in str(caught.value)

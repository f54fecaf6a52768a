# ruff: noqa: E501 - PTX text reads better unbroken
"""atom and red, from the PTX ISA: which operations exist on which types, and vectors in global memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import flash8_sim as S
from planted import messages

HALVES = ("f16", "bf16", "f16x2", "bf16x2")
REGISTER = {
    **dict.fromkeys(("b16", "u16", "f16", "bf16"), "h"),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), "x"),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), "d"),
}
# PTX ISA, the tables of atom and red; .noftz is part of the operation.
SCALAR = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    "add.noftz": HALVES,
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
    "inc": ("u32",),
    "dec": ("u32",),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
    "min.noftz": (),
    "max.noftz": (),
}
VECTOR = {
    "v2": {"add": ("f32",), **dict.fromkeys(("add.noftz", "min.noftz", "max.noftz"), HALVES)},
    "v4": {"add": ("f32",), **dict.fromkeys(("add.noftz", "min.noftz", "max.noftz"), HALVES)},
    "v8": dict.fromkeys(("add.noftz", "min.noftz", "max.noftz"), ("f16", "bf16")),
}


def instruction(opcode: str, space: str, operation: str, kind: str, vector: str = "") -> str:
    register = REGISTER[kind]
    count = int(vector[1]) if vector else 1
    value = "{" + ", ".join([register] * count) + "}" if vector else register
    result = f"{value}, " if opcode == "atom" else ""
    third = f", {register}" if operation == "cas" else ""
    middle = f".{vector}" if vector else ""
    address = "s" if space == ".shared" else "g"
    return f"{opcode}{space}.{operation}{middle}.{kind} {result}[{address}], {value}{third};"


def is_loaded(sim: S.Simulator, text: str) -> bool:
    message = ""
    try:
        sim.load(S.kernel(f".reg .b16 h; .reg .b32 x, s; .reg .b64 d, g;\n{text} ret;")).unload()
    except S.SimulatorError as error:
        message = str(error)
    assert not message or "PTX line 11" in message, message
    return not message


@pytest.mark.parametrize("opcode", ["atom", "red"])
@pytest.mark.parametrize("space", [".global", ".shared", ""])
def test_scalar_forms(sim: S.Simulator, opcode: str, space: str) -> None:
    for operation, kinds in SCALAR.items():
        for kind in REGISTER:
            exists = kind in kinds and (opcode == "atom" or operation not in ("exch", "cas"))
            text = instruction(opcode, space, operation, kind)
            assert is_loaded(sim, text) == exists, text


@pytest.mark.parametrize("opcode", ["atom", "red"])
@pytest.mark.parametrize("space", [".global", ".shared", ""])
@pytest.mark.parametrize("vector", ["v2", "v4", "v8"])
def test_vector_forms(sim: S.Simulator, opcode: str, space: str, vector: str) -> None:
    for operation, kind in itertools.product(SCALAR, REGISTER):
        if operation == "cas":
            continue
        exists = space != ".shared" and kind in VECTOR[vector].get(operation, ())
        text = instruction(opcode, space, operation, kind, vector)
        assert is_loaded(sim, text) == exists, text


@pytest.mark.parametrize(
    "text",
    [
        "red.global.add.v2.f32 [g], {x};",
        "red.global.add.v2.f32 [g], x;",
        "red.global.add.f32 [g], {x};",
        "atom.global.add.v2.f32 x, [g], {x, x};",
        "atom.global.add.v4.f32 {x, x}, [g], {x, x, x, x};",
    ],
)
def test_the_vector_has_the_stated_length(sim: S.Simulator, text: str) -> None:
    assert not is_loaded(sim, text)


def as_f32(codes: np.ndarray, kind: str) -> np.ndarray:
    if kind.startswith("bf16"):
        return (codes.astype(np.uint32) << 16).view(np.float32)
    return codes.view(np.float16).astype(np.float32)


def as_codes(values: np.ndarray, kind: str) -> np.ndarray:
    if kind.startswith("bf16"):
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16)


def run_vector(
    sim: S.Simulator,
    opcode: str,
    vector: str,
    operation: str,
    kind: str,
    old: np.ndarray,
    b: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """32 lanes with a vector each: what memory holds afterwards, and what atom returned."""
    count, register = int(vector[1]), REGISTER[kind]
    step = {"h": 2, "x": 4, "d": 8}[register]
    values, results = ([f"{register}{i + at}" for i in range(count)] for at in (0, count))
    returned = "{" + ", ".join(results) + "}, " if opcode == "atom" else ""
    ptx = S.kernel(
        f""".reg .b16 h<16>; .reg .b32 t, x<8>; .reg .b64 g, gb, go; mov.u32 t, %tid.x;
        ld.param.u64 g, [data]; ld.param.u64 gb, [b]; ld.param.u64 go, [out];
        mad.wide.u32 g, t, {step * count}, g; mad.wide.u32 gb, t, {step * count}, gb; mad.wide.u32 go, t, {step * count}, go;
        {" ".join(f"ld.global.b{8 * step} {v}, [gb + {step * i}];" for i, v in enumerate(values))}
        {opcode}.global.{operation}.{vector}.{kind} {returned}[g], {{{", ".join(values)}}};
        {" ".join(f"st.global.b{8 * step} [go + {step * i}], {v};" for i, v in enumerate(results if opcode == "atom" else []))} ret;""",
        parameters=".param .u64 data, .param .u64 b, .param .u64 out",
    )
    data, out = sim.buffer(old), sim.zeros(old.shape, old.dtype)
    sim.load(ptx).launch("k", data, sim.buffer(b), out)
    return data.read(), out.read()


VECTORS = [(v, o, k) for v, table in VECTOR.items() for o, kinds in table.items() for k in kinds]


@pytest.mark.parametrize("opcode", ["atom", "red"])
@pytest.mark.parametrize(("vector", "operation", "kind"), VECTORS)
def test_vectors(sim: S.Simulator, opcode: str, vector: str, operation: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    shape = (32, int(vector[1]) * (2 if kind.endswith("x2") else 1))
    a, b = (rng.standard_normal(shape).astype(np.float32) * 4 for _ in range(2))
    join = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation.partition(".")[0]]
    if kind == "f32":
        want, old = join(a, b), a
        got, returned = run_vector(sim, opcode, vector, operation, kind, a, b)
    else:
        old, given = as_codes(a, kind), as_codes(b, kind)
        want = as_codes(join(as_f32(old, kind), as_f32(given, kind)), kind)
        got, returned = run_vector(sim, opcode, vector, operation, kind, old, given)
    np.testing.assert_array_equal(got, want)
    if opcode == "atom":
        np.testing.assert_array_equal(returned, old)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_zeros_nans_and_subnormals_of_halves(sim: S.Simulator, kind: str) -> None:
    """-0 is less than +0, a NaN loses to a number, and .noftz keeps subnormals."""
    nan, canonical, tiny = 0x7E00 if kind == "f16" else 0x7FC0, 0x7FFF, 0x0003
    old = np.tile(np.array([0x0000, 0x8000, nan, 0x3C00, nan, tiny, 0x8000, 0x0000], np.uint16), 32)
    b = np.tile(np.array([0x8000, 0x0000, 0x3C00, nan, nan, tiny, 0x8000, 0x0000], np.uint16), 32)
    low = [0x8000, 0x8000, 0x3C00, 0x3C00, canonical, tiny, 0x8000, 0x0000]
    high = [0x0000, 0x0000, 0x3C00, 0x3C00, canonical, tiny, 0x8000, 0x0000]
    total = [0x0000, 0x0000, canonical, canonical, canonical, 2 * tiny, 0x8000, 0x0000]
    for operation, want in (("min", low), ("max", high), ("add", total)):
        got, _ = run_vector(sim, "red", "v8", f"{operation}.noftz", kind, old, b)
        np.testing.assert_array_equal(got, np.tile(np.array(want, np.uint16), 32), operation)


def one_lane(sim: S.Simulator, body: str, old: np.ndarray, shared: int = 0) -> np.ndarray:
    ptx = S.kernel(
        f".reg .b32 s, x<4>; .reg .b64 g, w; .reg .pred p; ld.param.u64 g, [data]; mov.u32 s, %tid.x; setp.ne.u32 p, s, 0; @p bra $E; mov.u32 s, mem;\n{body}\n$E: ret;",
        parameters=".param .u64 data",
        module=".extern .shared .align 16 .b8 mem[];",
    )
    data = sim.buffer(old)
    sim.load(ptx).launch("k", data, shared=shared)
    return data.read()


def test_f32_sums_have_subnormals_in_shared_memory_only(sim: S.Simulator) -> None:
    tiny = np.array([1, 0x80000001, 0x00800000, 0x00800000], np.uint32)
    add = "mov.b32 x0, 1; mov.b32 x1, 0x80000001; mov.b32 x2, 0x80800001; mov.b32 x3, 0x3f800000;"
    flushed = np.array([0, 0x80000000, 0x80000000, 0x3F800000], np.uint32)
    for text in (
        "red.global.add.v4.f32 [g], {x0, x1, x2, x3};",
        "red.add.v4.f32 [g], {x0, x1, x2, x3};",
    ):
        np.testing.assert_array_equal(one_lane(sim, add + text, tiny), flushed)
    scalar = " ".join(f"red.global.add.f32 [g + {4 * i}], x{i};" for i in range(4))
    np.testing.assert_array_equal(one_lane(sim, add + scalar, tiny), flushed)
    kept = np.array([2, 0x80000002, 0x80000001, 0x3F800000], np.uint32)
    for space, address in ((".shared", "s"), ("", "w")):
        through = " ".join(
            f"st.shared.u32 [s + {4 * i}], {int(v)}; red{space}.add.f32 [{address} + {4 * i}], x{i}; ld.shared.u32 x{i}, [s + {4 * i}]; st.global.u32 [g + {4 * i}], x{i};"
            for i, v in enumerate(tiny)
        )
        body = f"{add} cvt.u64.u32 w, s; cvta.shared.u64 w, w; {through}"
        np.testing.assert_array_equal(one_lane(sim, body, tiny, 64), kept)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("red.global.add.v4.f32 [g + 8], {x0, x0, x0, x0};", "not aligned to the 16 bytes"),
        ("red.global.add.v4.f32 [g + 16], {x0, x0, x0, x0};", "access of 16 bytes"),
        (
            "cvt.u64.u32 w, s; cvta.shared.u64 w, w; red.add.v2.f32 [w], {x0, x0};",
            "in global memory",
        ),
        ("red.global.add.v2.f32 [g], {x0, x1};", "register that lanes 0x00000001 never wrote"),
    ],
)
def test_faults_of_vectors(sim: S.Simulator, body: str, message: str) -> None:
    with pytest.raises(S.SimulatorError, match=message):
        one_lane(sim, f"mov.b32 x0, 0; {body}", np.zeros(4, np.float32), 64)


def test_vectors_of_two_ctas_do_not_race_but_a_load_does(sim: S.Simulator) -> None:
    text = S.kernel(
        ".reg .b64 g; .reg .b32 x, c; .reg .pred p; ld.param.u64 g, [data]; mov.b32 x, 0x3f800000;\nred.global.add.v2.f32 [g], {x, x};\nret;",
        parameters=".param .u64 data",
    )
    for seed in range(6):
        sim.configure(seed=seed)
        data = sim.zeros(2, np.float32)
        sim.load(text).launch("k", data, grid=4)
        np.testing.assert_array_equal(data.read(), [128, 128])
    loads = sim.load(text.replace("\nret;", "\nld.global.f32 x, [g + 4]; ret;"))
    found = messages(sim, lambda: loads.launch("k", sim.zeros(2, np.float32), grid=4), 20)
    assert found and all("[race]" in message for message in found)

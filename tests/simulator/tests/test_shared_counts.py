# ruff: noqa: E501 - PTX text reads better unbroken
"""Wavefronts of shared memory and operand bytes of wgmma, as the report counts them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flash8_sim as S
from flash8_sim.benchmark import OPERANDS, wgmma
from planted import program

MODULE = ".extern .shared .align 1024 .b8 mem[];"
BODY = """
.reg .b32 t, a, x; .reg .b64 y; .reg .b16 c; .reg .pred p; mov.u32 t, %tid.x; {index} mad.lo.u32 a, x, {bytes}, 0; mov.u32 x, mem; add.u32 a, a, x; cvt.u64.u32 y, t; cvt.u16.u32 c, t;
{store} //tag store
{load} //tag load
ret;
"""
VALUES = {1: "u8", 2: "u16", 4: "u32", 8: "v2.u32", 16: "v4.u32"}
REGISTERS = {1: "c", 2: "c", 4: "x", 8: "{x, t}", 16: "{x, t, x, t}"}


def shared(sim: S.Simulator) -> Any:
    return sim.report()["statistics"]["shared"]


def counts(sim: S.Simulator, bytes_: int, index: str, guard: str = "") -> list[tuple[int, int]]:
    """Wavefronts and extra ones of a store and a load of `bytes_` a lane at mem + bytes_ * x."""
    access = f"shared.{VALUES[bytes_]}"
    body = BODY
    for name, text in (
        ("index", index),
        ("bytes", str(bytes_)),
        ("store", f"{guard} st.{access} [a], {REGISTERS[bytes_]};"),
        ("load", f"{guard} ld.{access} {REGISTERS[bytes_]}, [a];"),
    ):
        body = body.replace("{" + name + "}", text)
    ptx, lines = program(body, "", MODULE)
    sim.load(ptx).launch("k", shared=65536)
    found = {entry["line"]: entry for entry in shared(sim)["by_line"]}
    assert set(found) == {lines["store"], lines["load"]}
    assert found[lines["load"]]["opcode"] == f"ld.{access}"
    entries = [found[lines[tag]] for tag in ("store", "load")]
    assert [entry["executed"] for entry in entries] == [1, 1]
    return [(entry["wavefronts"], entry["extra_wavefronts"]) for entry in entries]


# bytes a lane, the unit of so many bytes that lane t touches, wavefronts, of them extra
PATTERNS = [
    (4, "mov.u32 x, t;", 1, 0),  # stride 1
    (4, "mul.lo.u32 x, t, 2;", 2, 1),
    (4, "mul.lo.u32 x, t, 3;", 1, 0),
    (4, "mul.lo.u32 x, t, 32;", 32, 31),
    (4, "mul.lo.u32 x, t, 33;", 1, 0),  # rows padded by a word
    (4, "mov.u32 x, 5;", 1, 0),  # one word for all
    (4, "and.b32 x, t, 7;", 1, 0),
    (4, "and.b32 x, t, 1; mul.lo.u32 x, x, 32;", 2, 1),  # two words of one bank
    (4, "xor.b32 x, t, 31;", 1, 0),
    (1, "mov.u32 x, t;", 1, 0),  # lanes share words
    (1, "mul.lo.u32 x, t, 128;", 32, 31),
    (2, "mov.u32 x, t;", 1, 0),
    (2, "mul.lo.u32 x, t, 4;", 2, 1),
    (8, "mov.u32 x, t;", 2, 0),  # half warps
    (8, "mul.lo.u32 x, t, 2;", 4, 2),
    (8, "mul.lo.u32 x, t, 16;", 32, 30),
    (8, "mov.u32 x, 3;", 2, 0),
    (16, "mov.u32 x, t;", 4, 0),  # quarter warps
    (16, "mul.lo.u32 x, t, 2;", 8, 4),
    (16, "mul.lo.u32 x, t, 8;", 32, 28),  # rows of 128 bytes
    (16, "mul.lo.u32 x, t, 9;", 4, 0),  # padded by 16
    (16, "and.b32 x, t, 7; xor.b32 x, x, 5; mad.lo.u32 x, t, 8, x;", 4, 0),  # swizzled rows
    (16, "mov.u32 x, 2;", 4, 0),
]


@pytest.mark.parametrize(("bytes_", "index", "wavefronts", "extra"), PATTERNS)
def test_banks(sim: S.Simulator, bytes_: int, index: str, wavefronts: int, extra: int) -> None:
    assert counts(sim, bytes_, index) == [(wavefronts, extra)] * 2


@pytest.mark.parametrize(("lanes", "wavefronts"), [(1, 1), (16, 16), (20, 20)])
def test_idle_lanes_do_not_count(sim: S.Simulator, lanes: int, wavefronts: int) -> None:
    index = f"setp.lt.u32 p, t, {lanes}; mul.lo.u32 x, t, 32;"
    assert counts(sim, 4, index, "@p") == [(wavefronts, wavefronts - 1)] * 2


def test_a_quarter_without_lanes_needs_no_wavefront(sim: S.Simulator) -> None:
    index = "setp.ge.u32 p, t, 20; mov.u32 x, t;"
    assert counts(sim, 16, index, "@p") == [(2, 0)] * 2


MATRICES = """
.reg .b32 t, a, x, y, z, w; mov.u32 t, %tid.x; mov.u32 x, mem; mad.lo.u32 a, t, 16, x;
st.shared.v4.u32 [a], {t, t, t, t}; mad.lo.u32 w, t, 4, x; add.u32 w, w, 512; bar.warp.sync -1;
and.b32 y, t, {lanes}; mad.lo.u32 a, y, {pitch}, x;
stmatrix.sync.aligned.m8n8.x{n}.shared.b16 [a], {from}; //tag store
bar.warp.sync -1;
ldmatrix.sync.aligned.m8n8.x{n}.shared.b16 {to}, [a]; //tag load
ret;
"""


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(("pitch", "each"), [(16, 1), (32, 2), (128, 8), (144, 1)])
def test_matrices(sim: S.Simulator, number: int, pitch: int, each: int) -> None:
    """A matrix of 8 rows is a wavefront where the rows lie in different banks."""
    body = MATRICES
    for name, text in (
        ("lanes", str(number * 8 - 1)),
        ("pitch", str(pitch)),
        ("n", str(number)),
        ("from", "{" + ", ".join(["t"] * number) + "}"),
        ("to", "{" + ", ".join("xyzw"[:number]) + "}"),
    ):
        body = body.replace("{" + name + "}", text)
    ptx, lines = program(body, "", MODULE)
    sim.load(ptx).launch("k", shared=65536)
    found = {entry["line"]: entry for entry in shared(sim)["by_line"]}
    for tag in ("store", "load"):
        entry = found[lines[tag]]
        assert entry["wavefronts"] == number * each
        assert entry["extra_wavefronts"] == number * (each - 1)


def test_sums_by_cta(sim: S.Simulator) -> None:
    """CTA (0, 1, 0) stores with a stride of 32 words, the other three with 1."""
    body = """.reg .b32 t, a, c; .reg .pred p; mov.u32 t, %tid.x; mov.u32 a, %ctaid.x; mov.u32 c, %ctaid.y; setp.eq.u32 p, c, 1; setp.eq.and.u32 p, a, 0, p;
    selp.u32 c, 128, 4, p; mov.u32 a, mem; mad.lo.u32 a, t, c, a; st.shared.u32 [a], t; ret;"""
    sim.load(S.kernel(body, module=MODULE)).launch("k", grid=(2, 2), block=64, shared=8192)
    report = shared(sim)
    sums = {tuple(e["cta"]): (e["wavefronts"], e["extra_wavefronts"]) for e in report["by_cta"]}
    assert sums == {(0, 0, 0): (2, 0), (1, 0, 0): (2, 0), (0, 1, 0): (64, 62), (1, 1, 0): (2, 0)}
    assert (report["executed"], report["wavefronts"], report["extra_wavefronts"]) == (8, 70, 62)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_operands_of_wgmma(sim: S.Simulator, eight_bit: bool) -> None:
    """Two warpgroups, each 16 products of m64n128 over K of 16 (or 8 over 32): 32 bytes of K a row."""
    data = sim.buffer(np.zeros(OPERANDS // 2, np.uint16))
    sim.load(wgmma(eight_bit, 3)).launch("k", data, block=256, shared=OPERANDS)
    products = 3 * 2 * 2 * (4 if eight_bit else 8)
    report = shared(sim)
    assert report["wgmma_a_bytes"] == products * 64 * 32
    assert report["wgmma_b_bytes"] == products * 128 * 32
    lines = [entry for entry in report["by_line"] if entry["opcode"].startswith("wgmma")]
    assert sum(entry["executed"] for entry in lines) == products
    for entry in lines:
        assert entry["wgmma_a_bytes"] == entry["executed"] * 64 * 32
        assert entry["wgmma_b_bytes"] == entry["executed"] * 128 * 32

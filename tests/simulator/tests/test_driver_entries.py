# ruff: noqa: E501 - PTX text reads better unbroken
"""The driver entries: what they do, and that whatever is unknown says so."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import numpy as np
import pytest

import flash8_sim as S


def load_error(sim: S.Simulator, body: str, **options: str) -> str:
    with pytest.raises(S.SimulatorError) as caught:
        sim.load(S.kernel(body, **options))
    assert caught.value.name in ("CUDA_ERROR_INVALID_PTX", "CUDA_ERROR_NOT_SUPPORTED")
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("ret;\nfrobnicate.u32 x, y;", ["PTX line 11", "frobnicate.u32", "unknown instruction"]),
        (".reg .b32 x;\nadd.u32.sparkling x, x, x; ret;", ["PTX line 11", "sparkling"]),
        (".reg .b32 x; .reg .b64 y;\nadd.u32 x, x, y; ret;", ["PTX line 11", "64 bits"]),
        ("bra $NOWHERE; ret;", ["unknown label", "$NOWHERE"]),
        (".reg .b32 x; mov.u32 x, nothing; ret;", ["unknown name 'nothing'"]),
        (".reg .b32 x; mov.u32 x, %wonder; ret;", ["unknown special register %wonder"]),
        (".reg .b32 x; add.u32 x, x; ret;", ["3 to 3 operands"]),
        (".reg .b32 x; add.u32 x, x x; ret;", ["PTX line 10", "expected ','"]),
        (
            "wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16 {}, 0, 0, 1, 1, 1, 0, 0; ret;",
            ["no such shape"],
        ),
        ("call foo, (); ret;", ["calls are not supported"]),
        ("@p ret;", ["guard 'p'"]),
    ],
)
def test_bad_ptx_is_refused_with_its_line(sim: S.Simulator, body: str, words: list[str]) -> None:
    message = load_error(sim, body)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        ".version 8.0",
        S.HEADER + ".visible .entry k() {",
        S.HEADER + ".visible .entry k() { /* ",
    ],
)
def test_malformed_modules(sim: S.Simulator, text: str) -> None:
    with pytest.raises(S.SimulatorError, match="CUDA_ERROR_INVALID_PTX"):
        sim.load(text)


def test_a_cubin_is_refused_as_no_binary_for_this_device(sim: S.Simulator) -> None:
    with pytest.raises(S.SimulatorError, match="CUDA_ERROR_NO_BINARY_FOR_GPU"):
        sim.load("\x7fELF...")


def test_an_unknown_entry_says_so(sim: S.Simulator) -> None:
    entry, status = ctypes.c_void_p(), ctypes.c_int()
    with pytest.raises(S.SimulatorError, match="no driver entry cuGraphLaunch"):
        sim.call(
            "cuGetProcAddress_v2",
            b"cuGraphLaunch",
            ctypes.byref(entry),
            13000,
            ctypes.c_uint64(0),
            ctypes.byref(status),
        )
    sim.call(
        "cuGetProcAddress_v2",
        b"cuMemAlloc",
        ctypes.byref(entry),
        13000,
        ctypes.c_uint64(0),
        ctypes.byref(status),
    )
    assert entry.value


def test_device_attributes(sim: S.Simulator) -> None:
    value = ctypes.c_int()
    for attribute, want in ((75, 9), (76, 0), (97, 227 * 1024), (16, 132), (10, 32)):
        sim.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        assert value.value == want
    with pytest.raises(S.SimulatorError, match="attribute 999"):
        sim.call("cuDeviceGetAttribute", ctypes.byref(value), 999, 0)


def test_memory_is_checked(sim: S.Simulator) -> None:
    buffer = sim.buffer(np.arange(10, dtype=np.float32))
    np.testing.assert_array_equal(buffer.read(), np.arange(10))
    with pytest.raises(S.SimulatorError, match="past the end of allocation"):
        sim.call(
            "cuMemsetD8_v2",
            ctypes.c_uint64(buffer.pointer + 40),
            ctypes.c_ubyte(0),
            ctypes.c_size_t(4),
        )
    sim.call(
        "cuMemsetD32_v2", ctypes.c_uint64(buffer.pointer), ctypes.c_uint(7), ctypes.c_size_t(10)
    )
    assert (buffer.read().view(np.uint32) == 7).all()
    buffer.free()
    with pytest.raises(S.SimulatorError, match="no allocation"):
        buffer.free()


def test_host_memory_can_be_used_in_place(sim: S.Simulator) -> None:
    ptx = S.kernel(
        ".reg .b32 t; .reg .b64 g; mov.u32 t, %tid.x; ld.param.u64 g, [p]; mad.wide.u32 g, t, 4, g; st.global.u32 [g], t; ret;",
        parameters=".param .u64 p",
    )
    array = np.zeros(32, np.uint32)
    module, pointer = sim.load(ptx), ctypes.c_uint64(array.ctypes.data)
    with pytest.raises(S.SimulatorError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        module.launch("k", pointer)
    sim.call(
        "flash8_sim_register_memory",
        ctypes.c_void_p(array.ctypes.data),
        ctypes.c_size_t(array.nbytes),
    )
    module.launch("k", pointer)
    np.testing.assert_array_equal(array, np.arange(32))
    sim.call("flash8_sim_unregister_memory", ctypes.c_void_p(array.ctypes.data))


def test_reports_count_and_draw(sim: S.Simulator) -> None:
    sim.configure(timeline=True)
    sim.load(S.kernel(".reg .b32 x; mov.u32 x, 1; add.u32 x, x, 1; bar.sync 0; ret;")).launch(
        "k", block=64, grid=3
    )
    report = sim.report()
    assert report["ok"] and report["statistics"]["instructions"] == {
        "alu": 6,
        "move": 6,
        "control": 6,
        "barrier": 6,
    }
    events = sim.timeline()["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1, 2} and all(e["dur"] >= 0 for e in events)


def test_host_threads_give_the_same_answer(sim: S.Simulator) -> None:
    ptx = S.kernel(
        ".reg .b32 t, b; .reg .b64 g; mov.u32 b, %ctaid.x; mov.u32 t, %tid.x; mad.lo.u32 t, b, 32, t; ld.param.u64 g, [p]; red.global.add.u32 [g], t; mad.wide.u32 g, t, 4, g; st.global.u32 [g + 4], t; ret;",
        parameters=".param .u64 p",
    )
    sim.configure(threads=2)
    out = sim.zeros(1 + 64 * 32, np.uint32)
    sim.load(ptx).launch("k", out, grid=64)
    np.testing.assert_array_equal(out.read()[1:], np.arange(2048))
    assert out.read()[0] == 2048 * 2047 // 2


def test_configuration(sim: S.Simulator) -> None:
    for bad in ({"seeed": 1}, {"seed": "x"}, {"async": "never"}, {"checks": 3}):
        with pytest.raises(S.SimulatorError, match="CUDA_ERROR_INVALID_VALUE"):
            sim.configure(**bad)
    code = "import flash8_sim; flash8_sim.Simulator()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"FLASH8_SIM_SEED": "minus one", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "seed: 'minus one' is no number" in done.stderr
    assert json.loads(sim.library.flash8_sim_totals())["launches"] >= 0

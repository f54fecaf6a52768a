"""setmaxnreg moves the registers that a CTA was launched with, and there are no others."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

import flash8_sim as S
from flash8_sim.nvcc import find_nvcc

# The first warpgroup releases, the others acquire; nobody ends before all have what they want.
BODY = """.reg .b32 t; .reg .pred p; mov.u32 t, %tid.x; setp.lt.u32 p, t, 128; @p bra $LOW;
setmaxnreg.inc.sync.aligned.u32 {high}; //inc
bra.uni $END;
$LOW: setmaxnreg.dec.sync.aligned.u32 {low}; //dec
$END: bar.sync 0; ret;"""
BOUNDS = ".maxntid {threads} .minnctapersm 1"


def ptx(low: int, high: int, directives: str) -> str:
    return S.kernel(BODY.format(low=low, high=high), directives=directives)


# 384 threads start with 168 registers each, 512 with 128: 504 and 512 for a thread of each group.
FITS = [(384, 40, 232), (384, 24, 240), (384, 56, 224), (512, 32, 160), (512, 56, 152)]
HANGS = [(384, 48, 232), (384, 32, 240), (512, 40, 160), (512, 56, 160)]


@pytest.mark.parametrize(("threads", "low", "high"), FITS)
def test_what_fits_the_registers_at_launch(
    sim: S.Simulator, threads: int, low: int, high: int
) -> None:
    for seed in range(3):
        sim.configure(seed=seed)
        text = ptx(low, high, BOUNDS.format(threads=threads))
        sim.load(text).launch("k", block=threads)


@pytest.mark.parametrize(("threads", "low", "high"), HANGS)
def test_one_step_more_waits_for_ever(sim: S.Simulator, threads: int, low: int, high: int) -> None:
    text = ptx(low, high, BOUNDS.format(threads=threads))
    line = S.line_of(text, "//inc")
    held = threads * (65536 // threads // 8 * 8)
    with pytest.raises(S.SimulatorError) as raised:
        sim.load(text).launch("k", block=threads)
    message = str(raised.value)
    assert "[deadlock] kernel k" in message
    assert f"at PTX line {line} (setmaxnreg.inc" in message
    assert re.search(rf"waits for setmaxnreg\.inc to {high} registers, .* of the {held} ", message)


def test_a_launch_of_fewer_threads_has_fewer_registers(sim: S.Simulator) -> None:
    """The count per thread is the kernel's, the pool is the launch's."""
    text = ptx(40, 208, BOUNDS.format(threads=512))  # 128 at launch
    sim.load(text).launch("k", block=256)  # 40 + 208 of 2 x 128
    with pytest.raises(S.SimulatorError, match=r"setmaxnreg\.inc to 208"):
        sim.load(text).launch("k", block=384)  # 40 + 2 x 208 of 3 x 128


@pytest.mark.parametrize("directives", ["", ".maxntid 384", ".reqntid 384"])
def test_what_ptxas_ignores_is_refused(sim: S.Simulator, directives: str) -> None:
    text = ptx(40, 232, directives)
    with pytest.raises(S.SimulatorError, match="ptxas ignores setmaxnreg here"):
        sim.load(text).launch("k", block=384)


ASKED = [
    (".maxntid 384 .minnctapersm 1", 232),
    (".maxntid 512 .minnctapersm 1", 152),
    (".maxntid 128, 3 .minnctapersm 1", 240),
    (".reqntid 256 .minnctapersm 1", 248),
    (".maxntid 256 .minnctapersm 2", 232),
    (".maxntid 400 .minnctapersm 1", 232),
    (".maxntid 288 .minnctapersm 1", 232),
    (".maxntid 544 .minnctapersm 1", 160),
    (".maxntid 130 .minnctapersm 3", 160),
    (".maxntid 384 .minnctapersm 1", 160),
    (".maxnreg 152", 160),
]


@pytest.mark.parametrize(("directives", "high"), ASKED)
def test_registers_at_launch_are_those_of_ptxas(
    sim: S.Simulator, tmp_path: Path, directives: str, high: int
) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("there is no ptxas")
    text = ptx(24, high, directives)
    source = tmp_path / "k.ptx"
    source.write_text(text)
    ptxas = nvcc.with_name("ptxas")
    command = [ptxas, "-arch=sm_90a", "-v", source, "-o", tmp_path / "k.cubin"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", log)
    assert used is not None
    assert registers(sim, text) == int(used[1])


def registers(sim: S.Simulator, text: str) -> int:
    """What the simulated driver says of kernel k: CU_FUNC_ATTRIBUTE_NUM_REGS."""
    function, value = ctypes.c_void_p(), ctypes.c_int()
    sim.call("cuModuleGetFunction", ctypes.byref(function), sim.load(text).handle, b"k")
    sim.call("cuFuncGetAttribute", ctypes.byref(value), ctypes.c_int(4), function)
    return value.value

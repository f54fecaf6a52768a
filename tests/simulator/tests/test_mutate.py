"""The mutation engine: what it changes in PTX, what becomes of mutants, lists of survivors."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pytest

import flash8_sim as S
import pipeline
from flash8_sim.mutate import (
    InvalidMutantError,
    compare,
    in_child,
    judge,
    known,
    mutations,
    survivors,
)
from flash8_sim.mutate.__main__ import main
from flash8_sim.mutate.known import Known

PTX = pipeline.program()

#: Mutants of the pipeline that nothing notices, and why.
EXPLAINED = {
    "relaxed mbarrier.arrive.expect_tx.shared::cta.b64": "its thread has written nothing",
    "reads only cp.async.bulk.wait_group": "the kernel ends behind it, and with it all writes",
}


def changed(instruction: str) -> dict[str, str]:
    """Kind and text of every mutant of one instruction, in a kernel of its own."""
    ptx = S.kernel(f".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<4>;\n{instruction}\nret;")
    start = ptx.index(instruction)
    found = {}
    for mutation in mutations(ptx):
        mutant = mutation.apply(ptx)
        found[mutation.kind] = mutant[start : mutant.index("\nret;")]
        assert mutant.count("\n") == ptx.count("\n")
        assert mutation.line == ptx[:start].count("\n") + 1
    return found


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("wgmma.wait_group.sync.aligned 1;", {
            "deleted": "",
            "one more pending": "wgmma.wait_group.sync.aligned 2;",
        }),
        ("cp.async.bulk.wait_group 0;", {
            "deleted": "",
            "one more pending": "cp.async.bulk.wait_group 1;",
            "reads only": "cp.async.bulk.wait_group.read 0;",
        }),
        ("fence.proxy.async;", {
            "deleted": "",
            "shared::cta only": "fence.proxy.async.shared::cta;",
            "global only": "fence.proxy.async.global;",
        }),
        ("fence.acq_rel.gpu;", {"deleted": "", "gpu to cta": "fence.acq_rel.cta;"}),
        ("membar.gl;", {"deleted": "", "gl to cta": "membar.cta;"}),
        ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 512;", {
            "deleted": "",
            "bytes +16": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 528;",
            "bytes -16": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 496;",
            "relaxed": "mbarrier.arrive.expect_tx.relaxed.cta.shared::cta.b64 _, [%r1], 512;",
        }),
        ("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];", {
            "deleted": "",
            "count + 1": "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1], 2;",
            "relaxed": "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r1];",
            "cluster to cta": "mbarrier.arrive.release.cta.shared::cluster.b64 _, [%r1];",
        }),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;", {
            "deleted": "mov.pred %p1, -1;",
            "parity": "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 1;",
            "relaxed": "mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 %p1, [%r1], 0;",
        }),
        ("mbarrier.init.shared::cta.b64 [%r1], %r2;", {
            "deleted": "",
            "count + 1": "{ .reg .b32 mutant_value; add.s32 mutant_value, %r2, 1; "
            "mbarrier.init.shared::cta.b64 [%r1], mutant_value; }",
            "count - 1": "{ .reg .b32 mutant_value; add.s32 mutant_value, %r2, -1; "
            "mbarrier.init.shared::cta.b64 [%r1], mutant_value; }",
        }),
        ("bar.sync 3, 128;", {
            "deleted": "",
            "count +32": "bar.sync 3, 160;",
            "count -32": "bar.sync 3, 96;",
            "arrive only": "bar.arrive 3, 128;",
        }),
        ("bar.sync 3, 128; bar.arrive 3, 128;", {
            "another barrier": "bar.sync 3, 128; bar.arrive 4, 128;",
            "deleted": "bar.sync 3, 128; ",
            "count +32": "bar.sync 3, 128; bar.arrive 3, 160;",
            "count -32": "bar.sync 3, 128; bar.arrive 3, 96;",
            "arrive only": "bar.arrive 3, 128; bar.arrive 3, 128;",
        }),
        ("@%p1 mbarrier.arrive.shared.b64 _, [%r1], 3;", {
            "deleted": "",
            "count + 1": "@%p1 mbarrier.arrive.shared.b64 _, [%r1], 4;",
            "relaxed": "@%p1 mbarrier.arrive.relaxed.cta.shared.b64 _, [%r1], 3;",
            "everyone": "mbarrier.arrive.shared.b64 _, [%r1], 3;",
        }),
        ("ld.acquire.gpu.global.u32 %r1, [%rd1];", {
            "acquire to relaxed": "ld.relaxed.gpu.global.u32 %r1, [%rd1];",
            "gpu to cta": "ld.acquire.cta.global.u32 %r1, [%rd1];",
        }),
        ("setmaxnreg.dec.sync.aligned.u32 32;", {
            "deleted": "",
            "registers + 8": "setmaxnreg.dec.sync.aligned.u32 40;",
        }),
        ("mapa.shared::cluster.u32 %r1, %r2, %r3;", {"own CTA": "mov.u32 %r1, %r2;"}),
        ("ld.global.u32 %r1, [%rd1]; // bar.sync 0;", {}),
    ],
)  # fmt: skip
def test_what_is_changed(instruction, expected):
    assert changed(instruction) == expected


def test_an_atomic_comes_apart(sim):
    body = """.reg .b64 a; .reg .b32 v, w; ld.param.u64 a, [out];
    mov.u32 w, 7; atom.global.add.u32 v, [a], w; red.global.max.u32 [a+4], w;
    atom.global.exch.b32 v, [a+8], w; atom.global.inc.u32 v, [a+12], w; ret;"""
    ptx = S.kernel(body, parameters=".param .u64 out")
    out = sim.zeros(4, np.uint32)
    apart = [m for m in mutations(ptx) if m.kind == "not atomic"]
    assert len(apart) == 4
    for mutation in apart:
        out.write(np.array([1, 2, 3, 7], np.uint32))
        sim.load(mutation.apply(ptx)).launch("k", out, block=1)
        assert out.read().tolist() == [8, 7, 7, 0]


def run_pipeline(sim: S.Simulator, ptx: str) -> None:
    try:
        mutant = pipeline.Pipeline(sim, ptx)
    except S.SimulatorError as error:
        raise InvalidMutantError(str(error)) from error
    for seed in range(4):
        np.testing.assert_allclose(mutant.run(seed), mutant.want, rtol=1e-2, atol=1e-2)


def test_a_small_kernel(sim):
    results = list(judge(PTX, lambda ptx: run_pipeline(sim, ptx)))
    survived = [r for r in results if r.verdict == "survived"]
    assert {r.mutation.id.rsplit(" ", 1)[0] for r in survived} == {*EXPLAINED}
    assert len(survived) == len(EXPLAINED) and all(r.reached for r in survived)
    assert [r for r in results if r.verdict == "refused"] == []
    assert len(results) == 39


def test_ids_outlive_a_recompilation():
    """Other registers, other arithmetic, other lines: the same ids in the same order."""
    again = PTX.replace("slot", "%r77").replace("bar.sync 0;", "\nadd.s32 x, x, 0;\nbar.sync 0;")
    ids = [m.id for m in mutations(PTX)]
    assert [m.id for m in mutations(again)] == ids
    assert len({*ids}) == len(ids)


def test_what_no_case_comes_to(sim):
    body = """.reg .pred p; .reg .b32 v; ld.param.u32 v, [n]; setp.eq.u32 p, v, 0; @p bra $END;
    fence.acq_rel.gpu; $END: ret;"""
    ptx = S.kernel(body, parameters=".param .u32 n")

    def launch(n: int) -> list[bool]:
        run = judge(ptx, lambda text: sim.load(text).launch("k", n))
        return [r.reached for r in run if r.verdict == "survived"]

    assert launch(0) == [False, False]
    assert launch(1) == [True, True]


def forever(ptx: str) -> None:
    while True:
        pass


def test_mutants_that_take_the_process_with_them():
    assert in_child(lambda ptx: None, "", 5) == ("survived", "")
    assert in_child(lambda ptx: False, "", 5) == ("killed", "")
    assert in_child(lambda ptx: [][0], "", 5) == ("killed", "list index out of range")
    assert in_child(forever, "", 1) == ("killed", "no end in 1 s")
    crash = f"crash, signal {int(signal.SIGSEGV)}"
    assert in_child(lambda ptx: os.kill(os.getpid(), signal.SIGSEGV), "", 5) == ("killed", crash)

    def refuse(ptx: str) -> None:
        raise InvalidMutantError("no such instruction")

    assert in_child(refuse, "", 5) == ("refused", "no such instruction")


def test_a_kernel_that_does_not_pass_as_it_is():
    with pytest.raises(ValueError, match="the unchanged kernel is killed"):
        survivors(PTX, lambda ptx: False)


def test_lists_are_held_to_what_survives(tmp_path):
    first, second, third, *_ = mutations(PTX)
    text = f'[[survivors]]\nwhy = "as it is"\nmutants = ["{first.id}", "gone bar.sync ff.0"]\n'
    (tmp_path / "list.toml").write_text(text)
    listed = known.load(tmp_path / "list.toml")
    passing = [PTX, first.apply(PTX), third.apply(PTX)]
    wrong = compare(judge(PTX, lambda p: p in passing, only=[first, second, third]), listed)
    assert [line.split(":")[0] for line in wrong] == [
        "unexplained",
        "listed, but there is no such mutation",
    ]
    assert third.id in wrong[0] and "gone bar.sync ff.0" in wrong[1]
    killed = judge(PTX, lambda p: p == PTX, only=[first])
    assert "listed as a survivor, but killed" in compare(killed, Known({first.id: "once"}))[0]
    for wrong_text, message in (
        (f'[[survivors]]\nmutants = ["{first.id}"]\n', "has no explanation"),
        (text + text, "is listed twice"),
    ):
        (tmp_path / "list.toml").write_text(wrong_text)
        with pytest.raises(ValueError, match=message):
            known.load(tmp_path / "list.toml")


COMMAND = """
import os, sys
text = open(sys.argv[1]).read()
assert sys.argv[1] == os.environ["MUTANT_PTX"]
sys.exit(125 if "bar.sync" not in text else 0 if "wait_group.sync.aligned 1" in text else 1)
"""


def test_the_command_line(tmp_path, capsys):
    ptx = "bar.sync 0;\nwgmma.wait_group.sync.aligned 1;"
    (tmp_path / "kernel.ptx").write_text(S.kernel(ptx))
    (tmp_path / "command.py").write_text(COMMAND)
    command = ["--", sys.executable, str(tmp_path / "command.py"), "{}"]
    assert main([str(tmp_path / "kernel.ptx"), *command]) == 1
    said = capsys.readouterr().out
    assert "2 killed, 1 refused" in said and "does not load: refused" in said
    assert main([str(tmp_path / "kernel.ptx"), "--only", "wait_group", *command]) == 0
    assert main([str(tmp_path / "kernel.ptx"), "--list"]) == 0
    assert "one more pending" in capsys.readouterr().out

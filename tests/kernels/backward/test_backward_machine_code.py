"""What must be true of the machine code of the backward kernel."""

import re

import pytest

import machine_code
import machine_order
from defaults import by_default
from flash8.backends.hopper.backward_variants import SHIPPED_BACKWARDS, BackwardVariant
from flash8.compiler import compile_unit
from simulated_device import missing_compiler

_NO_DISASSEMBLER = machine_code.missing_disassembler()

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.skipif(_NO_DISASSEMBLER is not None, reason=str(_NO_DISASSEMBLER)),
]

#: Instructions of an unmasked and a masked iteration, at most. Of FlashAttention-3 with the same
#: compiler: d128 486 masked, d64 673 / 780, d96 511, d192/128 396 per 64 x 96, d256 1723 per
#: 64 x 80.
MOST = {
    BackwardVariant("bf16", 128, 128, mask="causal"): (405, 480),
    BackwardVariant("bf16", 128, 128, deterministic=True): (405, 480),
    BackwardVariant("fp16", 64, 64, mask="local"): (590, 780),
    BackwardVariant("bf16", 96, 96, mask="causal"): (385, 460),
    BackwardVariant("bf16", 192, 128, mask="causal"): (352, 405),
    BackwardVariant("bf16", 256, 256, mask="local", deterministic=True): (440, 530),
    BackwardVariant("bf16", 128, 128, mask="causal", fp8=True): (395, 466),
    BackwardVariant("bf16", 64, 64, mask="causal", deterministic=True): (590, 710),
    BackwardVariant("fp16", 128, 128, mask="causal", dq="reduced"): (405, 480),
    BackwardVariant("bf16", 128, 128, mask="local", softcap=True, alibi=True): (620, 750),
    BackwardVariant("fp16", 192, 192, dq="reduced"): (352, 405),
    BackwardVariant("bf16", 256, 256, mask="causal", dq="reduced"): (440, 490),
}
KEPT = [v for v in list(MOST)[:7] if v.head_dim not in (96, 192, 256)]
VARIANTS = by_default(MOST, KEPT)


def mainloops(variant: BackwardVariant) -> list[machine_code.Loop]:
    code = machine_code.MachineCode.of(compile_unit(variant.unit()).cubin)
    return code.mainloops


@pytest.mark.parametrize("variant", VARIANTS)
def test_lean(variant):
    compiled = compile_unit(variant.unit())
    assert not compiled.report.problems()
    code = machine_code.MachineCode.of(compiled.cubin)
    assert code.local_accesses == 0, "spills or local arrays"
    groups = compiled.ptx.read_text().count("wgmma.commit_group")
    assert code.group_closings == code.arrivals == groups, "serialised products"
    loops = code.mainloops
    assert len(loops) == (3 if variant.mask == "local" else 2)
    unmasked, masked = MOST[variant]
    assert loops[0].instructions <= unmasked
    assert all(loop.instructions <= masked for loop in loops[1:])


@pytest.mark.slow
@pytest.mark.parametrize("variant", SHIPPED_BACKWARDS, ids=lambda v: v.name)
def test_what_ships(variant):
    compiled = compile_unit(variant.unit())
    (cost,) = compiled.report.kernels
    assert cost.spill_stores == cost.spill_loads == 0
    assert compiled.report.hangs() == []
    code = machine_code.MachineCode.of(compiled.cubin)
    groups = compiled.ptx.read_text().count("wgmma.commit_group")
    assert code.group_closings == code.arrivals == groups, "serialised products"
    assert machine_order.touched_in_flight(code.lines) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_exponentials_run_under_products(variant):
    """Of dK and dQ, which are issued before them. Softcap needs dK's registers first."""
    if variant.softcap:
        pytest.skip("P goes where dS was, so dK comes first")
    for loop in mainloops(variant):
        assert exponentials_before_the_wait_for_dk(loop.lines) >= 0.9


def exponentials_before_the_wait_for_dk(lines: tuple[tuple[int, str], ...]) -> float:
    """The share between the wait for S, which leaves two groups in flight, and the next one."""
    text = [line for _, line in lines]
    first = next(i for i, line in enumerate(text) if re.search(r"DEPBAR.LE gsb0, 0x2", line))
    found = before = 0
    waited = False
    for line in text[first + 1 :] + text[:first]:
        if "DEPBAR" in line:
            waited = True
        if "MUFU.EX2" in line:
            found += 1
            before += not waited
    return before / found


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_in_flight_keep_their_registers(variant):
    code = machine_code.MachineCode.of(compile_unit(variant.unit()).cubin)
    assert machine_order.touched_in_flight(code.lines) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_registers(variant):
    """What the warpgroups acquire is there: setmaxnreg draws on the CTA's own registers."""
    compiled = compile_unit(variant.unit())
    (cost,) = compiled.report.kernels
    ptx = compiled.ptx.read_text()
    (producer,) = {int(n) for n in re.findall(r"setmaxnreg\.dec\.\S+ (\d+)", ptx)}
    (consumer,) = {int(n) for n in re.findall(r"setmaxnreg\.inc\.\S+ (\d+)", ptx)}
    assert producer + 2 * consumer <= 3 * cost.registers
    assert compiled.report.hangs() == []

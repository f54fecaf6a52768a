"""What must be true of the machine code of every kernel that ships."""

import re
from dataclasses import replace

import pytest

import machine_code
import machine_order
from defaults import SHIPPED_BY_DEFAULT, by_default
from flash8.backends.hopper.variants import SHIPPED
from flash8.compiler import compile_unit
from simulated_device import missing_compiler

_NO_DISASSEMBLER = machine_code.missing_disassembler()

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.skipif(_NO_DISASSEMBLER is not None, reason=str(_NO_DISASSEMBLER)),
]


shipped = pytest.mark.parametrize("variant", by_default(SHIPPED, SHIPPED_BY_DEFAULT))


def machine_code_of(variant):
    return machine_code.MachineCode.of(compile_unit(variant.unit()).cubin)


@shipped
def test_lean(variant):
    compiled = compile_unit(variant.unit())
    code = machine_code_of(variant)
    assert code.local_accesses == 0, "spills or local arrays"
    assert not compiled.report.serialized
    assert code.products == ({"QGMMA"} if variant.dtype == "e4m3" else {"HGMMA"})
    groups = compiled.ptx.read_text().count("wgmma.commit_group")
    assert code.group_closings == code.arrivals == code.waits == groups
    row = machine_code.row(variant)
    assert row.spill_bytes == 0
    assert row.registers <= 168, "what 384 or 512 threads can start with"
    width = machine_code.tile(variant)[1]
    if variant.dtype == "e4m3" and machine_code.overlaps_pv(variant):
        # Narrower tiles, promoted: more instructions a key than the peer's, but they are not what
        # takes longest.
        assert row.issue_cycles <= max(row.tensor_cycles, row.exponential_cycles)
        return
    if row.peer_unmasked is not None:
        assert row.unmasked / width <= row.peer_unmasked / row.peer_block_n
    if row.peer_masked is not None:
        assert row.masked / width <= row.peer_masked / row.peer_block_n


def test_gathering_costs_the_consumers_little():
    """Two fences a tile: at most 3% more instructions than boxes of TMA."""
    gathered = next(variant for variant in SHIPPED if variant.gather)
    loaded = machine_code.row(replace(gathered, gather=False))
    found = machine_code.row(gathered)
    assert found.unmasked <= 1.03 * loaded.unmasked
    assert found.masked <= 1.03 * loaded.masked


WIDENED = [v for v in SHIPPED if v.cache == "e4m3" and v.head_dim > 64]  # of equal tiles
WIDENED_BY_DEFAULT = [v for v in WIDENED if v in SHIPPED_BY_DEFAULT]


@pytest.mark.parametrize("variant", by_default(WIDENED, WIDENED_BY_DEFAULT))
def test_widening_costs_the_consumers_nothing(variant):
    """Beside the kernel of a 16-bit cache."""
    same = machine_code.row(replace(variant, cache="same"))
    found = machine_code.row(variant)
    assert found.unmasked <= 1.03 * same.unmasked
    assert found.masked <= 1.03 * same.masked


@shipped
def test_registers(variant):
    """What the warpgroups acquire is there: setmaxnreg draws on the CTA's own registers."""
    compiled = compile_unit(variant.unit())
    (cost,) = compiled.report.kernels
    ptx = compiled.ptx.read_text()
    warpgroups = int(re.search(r"\.maxntid (\d+)", ptx)[1]) // 128
    (producer,) = {int(n) for n in re.findall(r"setmaxnreg\.dec\.\S+ (\d+)", ptx)}
    (consumer,) = {int(n) for n in re.findall(r"setmaxnreg\.inc\.\S+ (\d+)", ptx)}
    assert producer + (warpgroups - 1) * consumer <= warpgroups * cost.registers
    assert compiled.report.hangs() == []


@shipped
def test_order(variant):
    """Waits stand where the design has them, behind the softmax, and not where ptxas likes them."""
    loops = machine_code_of(variant).mainloops
    fp8 = variant.dtype == "e4m3"
    masked = {"none": 1 if fp8 else 0, "causal": 1, "local": 2}
    assert len(loops) == 1 + masked[variant.mask]
    takes_turns = fp8 or max(variant.head_dim, variant.head_dim_v) <= 128
    for loop in loops:
        found = machine_order.overlap(loop.lines)
        assert found.exponentials >= machine_code.tile(variant)[1] / 2, "64 rows over 128 threads"
        if takes_turns:
            assert found.without_turn is not None and found.without_turn >= 0.9
        else:
            assert found.without_turn is None
        if machine_code.overlaps_pv(variant):
            assert found.under_product is not None and found.under_product >= 0.9
            # FP8 adds P V to O in the other warpgroup's turn; in 16 bits nothing is added.
            assert found.added_without_turn in ((1.0,) if fp8 else (None,))


@shipped
def test_products_in_flight_keep_their_registers(variant):
    assert machine_order.touched_in_flight(machine_code_of(variant).lines) == []


@shipped
def test_the_next_tile_is_claimed_before_the_last_load(variant):
    """Behind a claim there are at most the boxes of one tile of V. Clusters claim nothing, and what
    is gathered is no box."""
    element = 1 if variant.dtype == "e4m3" else 2
    loads = machine_order.loads_behind_claims(machine_code_of(variant).lines)
    gathers = variant.gather or variant.cache == "e4m3"
    if variant.cluster or gathers:
        assert not any(loads)
        assert bool(loads) == gathers
        return
    row = machine_code.tile(variant)[1] if variant.v_colmajor else variant.head_dim_v * element
    panel = next(size for size in (128, 64, 32) if row % size == 0)
    boxes = 2 if variant.v_colmajor and row == 224 else row // panel
    assert max(loads) == boxes
    assert min(loads) in (0, boxes), "a tile without keys claims, too"

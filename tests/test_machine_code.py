"""What must be true of the machine code of every kernel that ships."""

import sys
from pathlib import Path

import pytest

from flash8.compiler import compile_unit
from flash8.variants import SHIPPED
from simulated_device import missing_compiler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import machine_code

_NO_DISASSEMBLER = machine_code.missing_disassembler()

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.skipif(_NO_DISASSEMBLER is not None, reason=str(_NO_DISASSEMBLER)),
]


@pytest.mark.parametrize("variant", SHIPPED, ids=lambda variant: variant.name)
def test_lean(variant):
    compiled = compile_unit(variant.unit())
    code = machine_code.MachineCode.of(compiled.cubin)
    assert code.local_accesses == 0, "spills or local arrays"
    assert not compiled.report.serialized
    assert code.products == ({"QGMMA"} if variant.dtype == "e4m3" else {"HGMMA"})
    groups = compiled.ptx.read_text().count("wgmma.commit_group")
    assert code.group_closings == code.arrivals == code.waits == groups
    row = machine_code.row(variant)
    assert row.spill_bytes == 0
    assert row.registers <= 168, "what 384 or 512 threads can start with"
    width = machine_code.tile(variant)[1]
    if row.peer_unmasked is not None:
        assert row.unmasked / width <= row.peer_unmasked / row.peer_block_n
    if row.peer_masked is not None:
        assert row.masked / width <= row.peer_masked / row.peer_block_n

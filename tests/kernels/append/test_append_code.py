"""What must be true of the appending kernel's machine code, by every schedule and for its bytes."""

import pytest
import torch

import machine_code
from append_cases import HEADS, HEADS_KV, LENGTHS, WIDTH, WIDTH_V, assert_same, make
from flash8.backends.hopper.append_variants import SHIPPED_APPENDS, AppendVariant
from flash8.compiler import compile_unit
from flash8.tensors.float8 import E4M3
from quantizer_device import device
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

_NO_DISASSEMBLER = machine_code.missing_disassembler()
_THREADS = 1024  # of a multiprocessor at a time
_REGISTERS = 65536
VARIANTS = [*SHIPPED_APPENDS, AppendVariant("fp32"), AppendVariant("fp32", "e4m3")]


@pytest.mark.skipif(_NO_DISASSEMBLER is not None, reason=str(_NO_DISASSEMBLER))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_lean(variant):
    compiled = compile_unit(variant.unit())
    assert compiled.report.problems() == []
    code = machine_code.MachineCode.of(compiled.cubin)
    assert code.local_accesses == 0, "spills or local arrays"
    (cost,) = compiled.report.kernels
    assert cost.registers * _THREADS <= _REGISTERS


@pytest.mark.parametrize("cache", [torch.bfloat16, E4M3], ids=["16 bits", "e4m3"])
def test_every_row_is_written_once(monkeypatch, cache):
    rows = 20 * len(LENGTHS)
    call = make(cache=cache, new=20, rotary_dim=16)
    call.on_kernels(monkeypatch)
    written = rows * HEADS_KV * (WIDTH + WIDTH_V) * cache.itemsize
    written += rows * HEADS * WIDTH * 2 + 4 * len(LENGTHS)
    assert device().report()["statistics"]["bytes"]["global store"] == written


@pytest.mark.slow
def test_no_false_alarm_in_200_seeds(monkeypatch):
    for options in (
        {"cache": E4M3, "page_size": 16, "new": (5, 0, 17), "rotary_dim": 32},
        {"rows": (4, 0, 2), "rotary_dim": 48, "interleaved": False},
    ):
        call = make(**options)
        want = call.copy().portable()
        for seed in range(200):
            try:
                assert_same(call.copy().on_kernels(monkeypatch, seed=seed), want)
            except RuntimeError as error:
                raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error

"""What must be true of the machine code of the quantizer kernels, and of the bytes they move."""

import json
import re

import pytest

import bench_quantize
import gpu_timing
import machine_code
import quantizer_traffic
from defaults import by_default
from flash8.backends.hopper.quantize_matrix_variants import SHIPPED_MATRIX_QUANTIZERS
from flash8.backends.hopper.quantize_variants import SHIPPED_QUANTIZERS
from flash8.compiler import compile_unit
from quantizer_device import device
from repository import ROOT
from simulated_device import missing_compiler

_NO_DISASSEMBLER = machine_code.missing_disassembler()
_REGISTERS = 65536  # of a multiprocessor
_ROWS = [
    pytest.param(v, id=v.name, marks=() if v.head_dim == 128 else pytest.mark.slow)
    for v in SHIPPED_QUANTIZERS
]


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.skipif(_NO_DISASSEMBLER is not None, reason=str(_NO_DISASSEMBLER))
@pytest.mark.parametrize("variant", _ROWS)
def test_lean(variant):
    compiled = compile_unit(variant.unit())
    assert compiled.report.problems() == []
    code = machine_code.MachineCode.of(compiled.cubin)
    assert code.local_accesses == 0, "spills or local arrays"
    (cost,) = compiled.report.kernels
    if variant.job == "mean_finish":
        return
    threads = 2 * variant.head_dim
    assert cost.registers * threads * (512 // threads) <= _REGISTERS, "512 threads at a time"
    bytes_per_thread = 64 * (4 if variant.dtype == "fp32" else 2)
    assert loads_in_flight(code) >= bytes_per_thread // 16, "a load waits for another"


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.skipif(_NO_DISASSEMBLER is not None, reason=str(_NO_DISASSEMBLER))
@pytest.mark.parametrize(
    "variant", by_default(SHIPPED_MATRIX_QUANTIZERS, SHIPPED_MATRIX_QUANTIZERS[:3])
)
def test_lean_operands_of_products(variant):
    compiled = compile_unit(variant.unit())
    assert compiled.report.problems() == []
    code = machine_code.MachineCode.of(compiled.cubin)
    assert code.local_accesses == 0, "spills or local arrays"
    (cost,) = compiled.report.kernels
    assert cost.registers * 512 <= _REGISTERS, "512 threads at a time"
    assert loads_in_flight(code) >= 8, "fewer than 128 bytes of a thread on their way"


def loads_in_flight(code: machine_code.MachineCode) -> int:
    """The most 16-byte loads between two branches."""
    most = count = 0
    for _, text in code.lines:
        if re.search(r"\b(BRA|BSSY|BSYNC|CALL|BAR)\b", text):
            count = 0
        count += bool(re.search(r"\bLDG\.E\.128\b", text))
        most = max(most, count)
    return most


def test_the_table_of_bytes_is_that_of_the_launches():
    stored = json.loads((ROOT / "bench/results/quantizer_traffic.json").read_text())
    assert stored == quantizer_traffic.rows()
    text = quantizer_traffic.table(stored)
    assert (ROOT / "bench/results/quantizer_traffic.md").read_text() == text
    assert text in (ROOT / "docs/fp8.md").read_text()


def test_what_granularity_allows_is_one_pass():
    for row in quantizer_traffic.rows():
        if row["launches"] == ["cast"]:
            assert row["moved"] == row["needed"]
        else:
            assert row["moved"] <= 2.4 * row["needed"]


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_every_case_of_the_gpu_benchmark_runs(monkeypatch):
    def call_once(call, **_):
        call()
        return gpu_timing.Timing(1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(bench_quantize, "time_call", call_once)
    with device().serving_cpu_tensors(monkeypatch):
        for name, request in bench_quantize.cases(256, 64, "cpu").items():
            row = bench_quantize.measure(name, request)
            assert row["bytes_needed"] <= row["bytes_moved"]
            assert row["needed_gb_per_s"] == row["bytes_needed"] * 1e-6

"""The kernels that ask the hardware, on the simulated device: their answers, no rates. What the
answers are compared with catches wrong programs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import facts
import flash8_sim
import machine_code
from hopper_facts import arithmetic, driver, formats, rates, registers
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    facts.compile_images(folder)
    return folder


@pytest.fixture(scope="module")
def library() -> str:
    return str(flash8_sim.library_path())


@pytest.fixture
def device(library, monkeypatch):
    monkeypatch.setenv("FLASH8_DRIVER", library)
    made = driver.Device()
    assert made.is_simulated and made.describe()["capability"] == [9, 0]
    return made


def test_e4m3_is_that_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(formats.e4m3_values(codes.numpy()), values, equal_nan=True)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 100
    x = torch.cat([x, x / 2**14, torch.tensor([0.0, -0.0, 17.0, 19.0, 447.0, 448.0])])
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(formats.e4m3_codes(x.numpy()), want)
    specials = np.array([np.nan, np.inf, -np.inf, 1e9], np.float32)
    assert formats.e4m3_codes(specials).tolist() == [0x7F, 0x7E, 0xFE, 0x7E]


@pytest.mark.parametrize("name", ["arithmetic", "rates", "wgmma", "l2"])
def test_answers_are_right(device, images, name):
    found = facts.measure(name, images, "ptx", quick=True)
    assert found and facts.unexpected(found) == []


@pytest.mark.parametrize(("given", "asked"), registers.PAIRS)
def test_exchanges_of_registers_end_if_the_launch_has_brought_that_many(
    device, images, given, asked
):
    module = facts.load(device, images, "registers", "ptx")
    if given + 2 * asked <= 3 * 168:
        assert registers.pair(device, module, given, asked)["as_expected"]
    else:
        with pytest.raises(driver.DriverError, match="deadlock"):
            registers.pair(device, module, given, asked)


def test_the_registers_at_launch_are_those_of_the_pool(images):
    compiled = facts.compile_source("registers")
    assert {kernel.registers for kernel in compiled.report.kernels} == {168}


def test_what_hangs_is_a_finding_and_no_hang(device, images):
    """With a limit that every process outlasts."""
    found = registers.run(images, "ptx", seconds=0.01)
    assert {row["outcome"] for row in found.values()} == {"hangs"}
    assert sum(row["as_expected"] for row in found.values()) == 2


#: (fact, what of its PTX, by what, where it shows)
MUTATIONS = [
    ("rates", "cvt.rn.f16x2.e4m3x2", "cvt.rn.f16x2.e5m2x2", "/unpack_e4m3"),
    ("rates", "neg.f32", "abs.f32", "/ex2_f32"),
    (
        "arithmetic",
        "cvt.rn.satfinite.e4m3x2.f32",
        "cvt.rn.satfinite.e5m2x2.f32",
        "/e4m3_conversion",
    ),
    ("arithmetic", "m64n8k32.f32.e4m3.e4m3", "m64n8k32.f32.e5m2.e4m3", "/fp8_accumulation"),
    ("l2", "0f3F800000", "0f3F000000", "/red_rows, 4 SMs, apart"),
    (
        "wgmma",
        "m64n64k16.f32.bf16.bf16",
        "m64n64k16.f32.f16.f16",
        "/wgmma_n64_shared, 0 stores, one SM",
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "where"), MUTATIONS)
def test_a_wrong_program_is_no_fast_one(device, images, tmp_path, name, old, new, where):
    text = (images / f"{name}.ptx").read_text()
    assert old in text
    (tmp_path / f"{name}.ptx").write_text(text.replace(old, new))
    assert where in facts.unexpected(facts.measure(name, tmp_path, "ptx", quick=True))


def test_another_width_of_the_accumulator_is_seen(device, images, monkeypatch):
    """As on a GPU that keeps 14 bits where the design assumes 13."""
    kinds = dict(arithmetic._KINDS)
    kinds["fp8"] = (*kinds["fp8"][:3], 14)
    monkeypatch.setattr(arithmetic, "_KINDS", kinds)
    found = facts.unexpected(facts.measure("arithmetic", images, "ptx", quick=True))
    assert found == ["/fp8_truncation", "/fp8_accumulation"]


def functions(cubin: Path) -> list[list[str]]:
    """The instructions of every kernel: addresses start at 0 with each."""
    found: list[list[str]] = []
    for address, text in machine_code.MachineCode.of(cubin).lines:
        if address == 0:
            found.append([])
        found[-1].append(re.sub(r"^@!?\w+\s+", "", text).split()[0])
    return found


@pytest.mark.skipif(machine_code.missing_disassembler() is not None, reason="no cuobjdump")
def test_the_compiler_has_left_what_is_timed(images):
    """Of operands that repeat ptxas would convert one, and hoist it: a rate of nothing."""
    unpack, product = "F2FP.F16.E4M3.UNPACK_B", "HMMA.16816.F32"
    counts = [
        (names.count(unpack), names.count(product)) for names in functions(images / "mma.cubin")
    ]
    converting = [pair for pair in counts if pair[0]]
    assert len(counts) == 3 and len(converting) == 2 and (0, 0) not in counts
    assert all(unpacks == 4 * products for unpacks, products in converting if products)
    for names in functions(images / "rates.cubin"):
        timed = max(names.count(x) for x in (unpack, "MUFU.EX2", "MUFU.EX2.F16"))
        assert timed >= 32, names
    products = [
        [x for x in names if x.startswith("HGMMA")] for names in functions(images / "wgmma.cubin")
    ]
    assert len(products) == 4 and all(len(found) >= 32 for found in products)


def test_the_hmma_model_sums_the_rows_of_a(images):
    """Where A's registers lie, by the PTX ISA's figure for m16n8k16: mma.sync is not simulated."""
    registers_of_a, sums = rates._mma_expected("mma_alone", 64, 3)
    warp = registers_of_a[:32, 1]  # the second chain of the first warp
    a = np.zeros((16, 16))
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + 8 * (i % 2), lane % 4 * 2 + 8 * (i // 2)
            pair = np.array([warp[lane, i] & 0xFFFF, warp[lane, i] >> 16])
            a[row, column : column + 2] = formats.fp16_values(pair)
    for lane in range(32):
        for i in range(4):
            want = 3 * a[lane // 4 + 8 * (i // 2)].sum()
            assert np.isclose(sums[lane, 1, i], want)

"""The cycle model reads machine code rightly, and its table is what the committed code gives."""

import json

import pytest

import cycle_model
import machine_code
from defaults import by_default
from peer_code import source
from simulated_device import missing_compiler
from sm_model import steps
from sm_model.machine import Machine, Unit
from sm_model.peers import PEERS
from sm_model.steps import Control, Kind

MACHINE = Machine()

#: Two instructions as cuobjdump prints them.
TEXT = """
	Function : kernel
        /*5060*/                   IMAD.U32 R8, RZ, RZ, UR50 ;       /* 0x00000032ff087e24 */
                                                                     /* 0x009fc6000f8e00ff */
        /*5080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR55+0x34040], R6 ;  /* 0x03404006ff0075a7 */
                                                                     /* 0x000e240008000177 */
"""  # noqa: E501


def step(text, control=None):
    return steps.step(text, control or Control(1, frozenset(), frozenset()), MACHINE)


def test_control_bits():
    assert steps.controls(TEXT) == {
        0x5060: Control(3, frozenset({0, 3}), frozenset()),
        0x5080: Control(2, frozenset(), frozenset({0})),
    }
    # The two scoreboards of one instruction: 1 for its result, 2 for its operands.
    both = (15 | 1 << 5 | 2 << 8 | 0b100001 << 11) << 41
    assert Control.of(both) == Control(15, frozenset({0, 5}), frozenset({1, 2}))


@pytest.mark.parametrize(
    "text, unit, taken",
    [
        ("FFMA.FTZ R24, R24, UR54, -R8.reuse", Unit.FMA, 1),
        ("IMAD.MOV.U32 R4, RZ, RZ, R15", Unit.FMA, 2),
        ("FMNMX.FTZ R8, R24, R5, !PT", Unit.ALU, 2),
        ("F2FP.BF16.F32.PACK_AB R176, R25, R24", Unit.ALU, 2),
        ("MUFU.EX2 R19, R19", Unit.MUFU, 8),
        ("SHFL.BFLY PT, R5, R10, 0x1, 0x1f", Unit.MEMORY, 4),
        ("@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR55+0x34050], RZ", Unit.MEMORY, 4),
        ("LDS.128 R4, [R2]", Unit.MEMORY, 16),
        ("UIADD3 UR14, UR42, 0x2, URZ", Unit.NONE, 0),
        ("@!UP0 BRA 0xe330", Unit.NONE, 0),
        ("WARPGROUP.ARRIVE", Unit.NONE, 0),
    ],
)
def test_units(text, unit, taken):
    found = step(text)
    assert (found.kind, found.unit, found.taken) == (Kind.PLAIN, unit, taken)


def test_waits_and_turns():
    assert step("BAR.SYNC.DEFER_BLOCKING R8, 0x100").kind is Kind.TAKE_TURN
    assert step("BAR.ARV R12, 0x100").kind is Kind.PASS_TURN
    found = step("WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert (found.kind, found.pending) == (Kind.WAIT_PRODUCTS, 1)


def test_products():
    first = step("HGMMA.64x176x16.F32.BF16 R24, gdesc[UR40], RZ, !UPT")
    assert (first.kind, first.taken, first.closes, first.starved) == (Kind.PRODUCT, 88, False, 0)
    assert (first.operand_bytes, first.b_bytes) == ((64 + 176) * 32, 176 * 32)
    values = step("HGMMA.64x128x16.F32.BF16 R112, R216, gdesc[UR12].tnspB, R112, gsb0")
    assert (values.taken, values.closes, values.operand_bytes) == (64, True, 128 * 32)
    float8 = step("QGMMA.64x128x32.F32.E4M3.E4M3 R88, gdesc[UR16], R88")
    assert (float8.taken, float8.operand_bytes) == (64, (64 + 128) * 32)
    # Rows of A are read for every product: with few columns that takes longer.
    narrow = step("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR40], R24")
    assert (narrow.taken, narrow.starved) == (16, 24 - 16)


def test_what_the_producer_moves():
    keys = step("QGMMA.64x128x32.F32.E4M3.E4M3 R88, gdesc[UR16], R88, gsb0")
    values = step("QGMMA.64x96x32.F32.E4M3.E4M3 R24, R152, gdesc[UR8], R24, gsb0")
    loop = [keys, keys, values, values, step("WARPGROUP.DEPBAR.LE gsb0, 0x0")]
    k, v = 128 * 64, 96 * 64
    assert steps.producers_bytes(loop, transposes=False) == k + v
    assert steps.producers_bytes(loop, transposes=True) == k + 3 * v
    assert steps.producers_bytes(loop, transposes=False, widens=True) == 2 * (k + v)


# ---------------------------------------------------------------------------------- calibration


def test_a_model_that_is_right_has_one_factor_and_no_error():
    peers = [x for x in PEERS if x.dtype == "bf16"]
    predicted = {x.name: x.published_share / 0.8 for x in peers}
    found = cycle_model.calibration(peers, predicted)
    assert found.factor == pytest.approx(0.8)
    assert list(found.errors.values()) == pytest.approx([0] * 3)
    # One that is predicted 1.331 times as busy: a factor of 1.1 less, for all.
    predicted[peers[0].name] *= 1.331
    found = cycle_model.calibration(peers, predicted)
    assert found.factor == pytest.approx(0.8 / 1.1)
    assert list(found.errors.values()) == pytest.approx([0.21, 1 / 1.1 - 1, 1 / 1.1 - 1])


def test_the_published_shares():
    """648 of 989.4, of a grid of 2048 tiles: 15.5 of 16 waves."""
    peer = next(x for x in PEERS if x.name == "fa3_bf16_d128")
    assert peer.published_share == pytest.approx(648 / 989.4 * 16 * 132 / 2048)


def test_the_source_of_a_peer():
    peer = next(x for x in PEERS if x.name == "fa3_e4m3_d256")
    kernel = "<90, 256, 256, 1, cutlass::float_e4m3_t, cutlass::bfloat16_t, false"
    assert kernel in source(peer)


# -------------------------------------------------------------------------------------- results


def results():
    return json.loads((cycle_model.RESULTS / "cycle_model.json").read_text())


def test_the_tables_are_those_of_the_results():
    found = results()
    ours, theirs = ([cycle_model.Row(**x) for x in found[key]] for key in ("kernels", "peers"))
    assert [x.name for x in ours] == [x.name for x in cycle_model.DEFAULT]
    assert [x.name for x in theirs] == [x.name for x in PEERS]
    text = (cycle_model.RESULTS / "cycle_model.md").read_text()
    assert text == "\n".join(
        [cycle_model.table([*theirs, *ours]), cycle_model.calibration_table(theirs)]
    )


CAUSAL = next(x for x in cycle_model.DEFAULT if x.name == "forward_bf16_d128_causal")
_REASON = missing_compiler() or machine_code.missing_disassembler()


@pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
@pytest.mark.parametrize("choice", by_default(cycle_model.DEFAULT, (CAUSAL,)))
def test_a_row_is_what_the_code_gives(choice):
    found = cycle_model.row(choice)
    assert vars(found) in results()["kernels"]
    counted = machine_code.row(choice.variant)
    if choice.polynomial_every == 0:
        assert found.instructions == counted.unmasked
    assert found.cycles >= counted.tensor_cycles
    assert found.tensor == pytest.approx(counted.tensor_cycles / found.cycles, abs=2e-3)
    assert found.shared == pytest.approx(counted.shared_cycles / found.cycles, abs=2e-3)


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="no such variant"):
        cycle_model.main(["forward_bf16_d65"])

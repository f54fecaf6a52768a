"""The reader of the machine code's order, on texts that are right and on planted mistakes."""

import pytest

import machine_order

QK = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0"  # R24 to R31
PV = "HGMMA.64x8x16.F32.BF16 R40, R60, gdesc[UR12].tnspB, R40, gsb0"  # R40 to R43, A in R60 to R63
WAIT_ONE, WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
TURN, PASS_ON = "BAR.SYNC.DEFER_BLOCKING R2, 0x100", "BAR.ARV R3, 0x100"
EXP = [f"MUFU.EX2 R{i}, R{i}" for i in range(24, 32)]


def code(*texts):
    """Lines of a disassembly. A text may be a list; -> N in one is the address of instruction N."""
    flat = []
    for text in texts:
        flat += text if isinstance(text, list) else [text]
    lines = []
    for i, text in enumerate(flat):
        before, arrow, number = text.partition("-> ")
        lines.append((16 * i, f"{before}{16 * int(number):#x}" if arrow else text))
    return lines


def loop(*texts):
    return code(*texts, "@P0 BRA -> 0")


def test_a_softmax_where_the_design_has_it():
    found = machine_order.overlap(loop(TURN, QK, PV, PASS_ON, WAIT_ONE, EXP, WAIT_ALL))
    assert found == machine_order.Overlap(8, 1.0, 1.0)


ADDS = [f"FFMA.FTZ R{i}, R9, R{i}, R{i - 40}" for i in range(80, 84)]  # O += T, R40 to R43


def test_a_sum_in_another_turn():
    found = machine_order.overlap(loop(TURN, QK, PV, PASS_ON, WAIT_ONE, EXP, WAIT_ALL, ADDS))
    assert found.added_without_turn == 1.0
    late = loop(WAIT_ONE, EXP, WAIT_ALL, ADDS[:1], TURN, ADDS[1:], QK, PV, PASS_ON)
    assert machine_order.overlap(late).added_without_turn == 0.25


def test_what_is_no_sum_of_a_product():
    """Exponents are made of other registers, and in place."""
    others = ["FFMA.FTZ R24, R24, R9, -R8", "FFMA.FTZ R40, R40, R9, -R8", "FMUL R80, R80, R9"]
    found = machine_order.overlap(loop(TURN, QK, PV, PASS_ON, WAIT_ONE, EXP, WAIT_ALL, others))
    assert found.added_without_turn is None


def test_a_wait_that_was_moved_up():
    found = machine_order.overlap(loop(TURN, QK, PV, PASS_ON, WAIT_ONE, EXP[:2], WAIT_ALL, EXP[2:]))
    assert found == machine_order.Overlap(8, 1.0, 0.25)


def test_a_turn_that_was_taken_early():
    found = machine_order.overlap(loop(QK, PASS_ON, WAIT_ALL, EXP[:2], TURN, EXP[2:], PV, WAIT_ALL))
    assert found.without_turn == 0.25


def test_a_loop_may_begin_anywhere():
    """The same loop, entered in the middle of its softmax."""
    found = machine_order.overlap(
        loop(EXP[:5], WAIT_ALL, TURN, QK, PV, PASS_ON, WAIT_ONE, EXP[5:], "FADD R1, R1, R1")
    )
    assert found == machine_order.Overlap(8, 1.0, 1.0)


def test_a_loop_without_turns():
    assert machine_order.overlap(loop(QK, PV, WAIT_ONE, EXP, WAIT_ALL)).without_turn is None


CLEAN = [QK, PV, WAIT_ONE, *EXP, WAIT_ALL, "FMUL R40, R40, R1", "F2FP.BF16.PACK_AB R60, R25, R24"]


def test_registers_that_wait_for_their_product():
    assert machine_order.touched_in_flight(loop(CLEAN)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "FMUL R43, R43, R1",  # an accumulator
        "@P1 FADD R2, R40, R1",
        "F2FP.BF16.PACK_AB R63, R25, R24",  # A
        "LDS.128 R57, [R5]",  # R57 to R60
        "LDG.E.64 R42, desc[UR4][R6.64]",
        "STG.E desc[UR4][R60.64], R1",
        "IMAD.WIDE.U32 R42, R6, R7, RZ",
        "IMAD.WIDE.U32 R59, P1, R6, R7, R8",  # the result's second half is R60
        "IMAD.WIDE R8, R6, 0x4, R59",
        "IMAD.WIDE.U32.X R8, R6, R43, R10, P1",
        "QGMMA.64x8x32.F32.E4M3.E4M3 R60, gdesc[UR8], RZ, !UPT, gsb0",
        "QGMMA.64x8x32.F32.E4M3.E4M3 R80, R40, gdesc[UR8], R80, gsb0",
    ],
)
def test_a_register_of_a_product_in_flight(planted):
    lines = loop(QK, PV, WAIT_ONE, EXP, planted, WAIT_ALL)
    (found,) = machine_order.touched_in_flight(lines)
    assert planted in found


@pytest.mark.parametrize(
    "harmless",
    [
        *("LDS.128 R56, [R5]", "FMUL R44, R39, R1", "MOV R64, R59"),
        "IMAD.WIDE.U32 R12, R6, R39, R58, P1",  # factors are single registers
    ],
)
def test_a_neighbour_of_a_product_in_flight(harmless):
    assert machine_order.touched_in_flight(loop(QK, PV, WAIT_ONE, harmless, WAIT_ALL)) == []


def test_a_product_goes_on_with_its_accumulators():
    first = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT"
    second = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR12], R24, gsb0"
    assert machine_order.touched_in_flight(code(first, second, WAIT_ALL, EXP, "EXIT")) == []
    (found,) = machine_order.touched_in_flight(code(first, EXP[0], second, WAIT_ALL, "EXIT"))
    assert EXP[0] in found


def test_a_product_in_flight_over_the_branch_back():
    lines = code(WAIT_ONE, "FADD R30, R30, R1", QK, PV, "@P0 BRA -> 0", WAIT_ALL, "EXIT")
    assert machine_order.touched_in_flight(lines) == []  # the second time QK is done
    lines = code(WAIT_ONE, "FADD R43, R43, R1", QK, PV, "@P0 BRA -> 0", WAIT_ALL, "EXIT")
    (found,) = machine_order.touched_in_flight(lines)
    assert "FADD R43" in found


def test_a_path_that_leaves_out_the_wait():
    lines = code(PV, "@P0 BRA -> 3", WAIT_ALL, "FADD R40, R40, R1", "EXIT")
    (found,) = machine_order.touched_in_flight(lines)
    assert "FADD R40" in found


CLAIM = "ATOMG.E.ADD.STRONG.GPU PT, R8, desc[UR34][R2.64], R7"
LOAD = "UTMALDG.4D [UR8], [UR14]"


def test_loads_behind_a_claim():
    """A tile without keys claims at once; another one before its last load."""
    late = code(
        *("@P3 BRA -> 3", CLAIM, "BRA -> 8"),
        *(LOAD, LOAD, "@P0 BRA -> 4", CLAIM, LOAD, "SHFL.IDX PT, R8, R8, RZ, 0x1f"),
        *("@P1 BRA -> 0", "EXIT"),
    )
    assert machine_order.loads_behind_claims(late) == [0, 1]
    early = code(CLAIM, LOAD, LOAD, "@P0 BRA -> 2", LOAD, "@P1 BRA -> 0", "EXIT")
    assert machine_order.loads_behind_claims(early) == [3]

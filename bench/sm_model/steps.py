"""A loop of machine code as the steps that the model replays.

ptxas writes into every instruction for how many cycles its warp must not issue the next one, which
scoreboards the instruction waits for, and which ones it sets until its result is there or its
operands are read. `cuobjdump -sass` prints these bits with the encoding and does not explain them:
from bit 105 of an instruction on, four bits of stall, one of yield, three each of the scoreboard
for the result and for the operands (7 is none), and six of scoreboards to wait for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from sm_model.machine import Machine, Unit


class Kind(Enum):
    """What a step does beside taking a unit."""

    PLAIN = "plain"
    PRODUCT = "product"
    WAIT_PRODUCTS = "wait for products"
    TAKE_TURN = "take the turn"
    PASS_TURN = "pass the turn on"


@dataclass(frozen=True)
class Step:
    """One instruction of a warp.

    Attributes:
        taken: Cycles of its unit.
        stall: Cycles until the warp may issue the next step.
        waits: Scoreboards that must be clear before it is issued.
        sets: Scoreboards that are clear `latency` cycles after it has begun.
        closes: A product that is the last of its group.
        pending: WAIT_PRODUCTS: how many groups may still be under way.
        operand_bytes: Of a product, read from shared memory by the warpgroup.
        b_bytes: Those of them that are not of A.
        starved: Cycles, beside `taken`, that a product waits for its operands.
    """

    kind: Kind = Kind.PLAIN
    unit: Unit = Unit.NONE
    taken: float = 0
    stall: int = 1
    waits: frozenset[int] = frozenset()
    sets: frozenset[int] = frozenset()
    latency: int = 0
    closes: bool = False
    pending: int = 0
    operand_bytes: int = 0
    b_bytes: int = 0
    starved: float = 0


@dataclass(frozen=True)
class Control:
    """The control bits of one instruction."""

    stall: int
    waits: frozenset[int]
    sets: frozenset[int]

    @staticmethod
    def of(high: int) -> "Control":
        """Of the upper 64 bits of an instruction."""
        bits = high >> 41
        boards = {bits >> 5 & 7, bits >> 8 & 7} - {7}
        waits = {board for board in range(6) if bits >> 11 + board & 1}
        return Control(bits & 15, frozenset(waits), frozenset(boards))


_ADDRESS = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s")
_ENCODING = re.compile(r"/\* (0x[0-9a-f]{16}) \*/\s*$")


def controls(disassembly: str) -> dict[int, Control]:
    """By address, from cuobjdump's text: an instruction has two lines, and the upper half of its
    encoding is on the second one."""
    found, address = {}, None
    for line in disassembly.splitlines():
        encoding, named = _ENCODING.search(line), _ADDRESS.match(line)
        if named:
            address = int(named[1], 16)
        elif encoding and address is not None:
            found[address] = Control.of(int(encoding[1], 16))
            address = None
    return found


_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_PRODUCT = re.compile(r"([HQI]GMMA)\.64x(\d+)x(\d+)\.")
_DEPBAR = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_MEMORY = ("LDS", "LDSM", "STS", "STSM", "SHFL", "SYNCS", "S2R", "ATOMS", "LDG", "STG", "LDC")
_NO_UNIT = ("BRA", "NOP", "BAR", "WARPGROUP", "WARPSYNC", "DEPBAR", "BSSY", "BSYNC", "R2UR")


def step(text: str, control: Control, machine: Machine) -> Step:
    """One line of a disassembly."""
    text = _PREDICATE.sub("", text)
    common = Step(stall=control.stall, waits=control.waits, sets=control.sets)
    if product := _PRODUCT.search(text):
        return _product(text, product, common, machine)
    if wait := _DEPBAR.search(text):
        return replace(common, kind=Kind.WAIT_PRODUCTS, pending=int(wait[1], 16))
    unit = _unit(text.split()[0].split(".")[0])
    taken = machine.taken[unit] * (2 if text.startswith("IMAD") else 1)
    if unit is Unit.MEMORY and (width := re.match(r"\w+\S*\.(64|128)\b", text)):
        taken *= int(width[1]) // 32
    kind = Kind.PLAIN
    if text.startswith("BAR."):
        kind = Kind.PASS_TURN if text.startswith("BAR.ARV") else Kind.TAKE_TURN
    return replace(common, kind=kind, unit=unit, taken=taken, latency=machine.latencies[unit])


def _unit(mnemonic: str) -> Unit:
    if mnemonic in ("FFMA", "FMUL", "FADD", "IMAD"):
        return Unit.FMA
    if mnemonic == "MUFU":
        return Unit.MUFU
    if mnemonic in _MEMORY:
        return Unit.MEMORY
    return Unit.NONE if mnemonic in _NO_UNIT or mnemonic.startswith("U") else Unit.ALU


def _product(text: str, found: "re.Match[str]", common: Step, machine: Machine) -> Step:
    """The tensor core takes a k-step of 32 bytes. A is in shared memory if no register of it comes
    before B's descriptor."""
    columns, depth = int(found[2]), int(found[3])
    taken = 64 * columns * depth / machine.multiply_adds[found[1]]
    b_bytes = columns * 32
    a_in_registers = re.search(r"\bR\d+, R\d+, gdesc", text)
    operand_bytes = b_bytes + (0 if a_in_registers else 64 * 32)
    return replace(
        common,
        kind=Kind.PRODUCT,
        unit=Unit.TENSOR,
        taken=taken,
        closes="gsb0" in text,
        operand_bytes=operand_bytes,
        b_bytes=b_bytes,
        starved=max(0.0, operand_bytes / machine.shared_bytes - taken),
    )


def loop_steps(
    lines: Sequence[tuple[int, str]], by_address: Mapping[int, Control], machine: Machine
) -> tuple[Step, ...]:
    """A loop from its first instruction to the branch back. What it branches over on the way is
    taken to be executed, and waits that have to be repeated to succeed at once."""
    return tuple(step(text, by_address[address], machine) for address, text in lines)


def producers_bytes(loop: Sequence[Step], *, transposes: bool, widens: bool = False) -> int:
    """Bytes of shared memory that the producer warpgroup moves for a tile of keys.

    TMA writes K and V, of which a warpgroup's products read every byte once. Warps that transpose V
    read and write it once more; it is what products with A in registers read. Where K and V come
    in half of the bytes, these are written and read, too.
    """
    keys_and_values = sum(x.b_bytes for x in loop)
    values = sum(x.b_bytes for x in loop if x.operand_bytes == x.b_bytes)
    return keys_and_values + (2 * values if transposes else 0) + (keys_and_values if widens else 0)

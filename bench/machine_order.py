"""In which order the machine code does things: what ptxas decides, and PTX does not show.

ptxas moves waits and barriers inside a basic block as it likes, so a kernel whose PTX overlaps a
softmax with a product may do one after the other. This reads from the disassembly

- how much of a mainloop's softmax runs while the warpgroup does not hold the turn, and how much
  while its product P V is under way, and whether P V is added to O without the turn (`overlap`);
- whether a register of a product is touched between its issue and the wait that covers it
  (`touched_in_flight`);
- which loads stand behind the claim of the next tile (`loads_behind_claims`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

Line = tuple[int, str]

_TARGET = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*|UR\d+,\s*)?0x([0-9a-f]+)")
_ADDRESS = re.compile(r"\[[^\]]*\]")
_REGISTER = re.compile(r"(?<![\w])R(\d+)(\.64)?")
_PRODUCT = re.compile(r"[HQ]GMMA\.64x(\d+)x\d+\.F32\S*\s+R(\d+),\s*(?:R(\d+),)?")
_DEPBAR = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    address: int
    text: str

    @property
    def predicated(self) -> bool:
        return self.text.startswith("@")

    @cached_property
    def operation(self) -> str:
        """The mnemonic with its modifiers: MUFU.EX2."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def target(self) -> int | None:
        found = _TARGET.search(self.text)
        return int(found[1], 16) if found else None

    @cached_property
    def registers(self) -> frozenset[int]:
        """The general registers that it names, those that wide operands reach among them."""
        operands = re.sub(r"^(@!?U?P\w+\s+)?\S+", "", self.text)
        if ".WIDE" in self.operation:
            return _of_wide_sum(operands)
        wide = 4 if re.search(r"\.128|SM\.\S*\.4\b", self.operation) else 1
        wide = 2 if wide == 1 and re.search(r"\.64\b", self.operation) else wide
        addresses = " ".join(_ADDRESS.findall(operands))
        named = {(int(n), 2 if pair else 1) for n, pair in _REGISTER.findall(addresses)}
        data = _REGISTER.findall(_ADDRESS.sub("", operands))
        named |= {(int(n), max(wide, 2 if pair else 1)) for n, pair in data}
        return frozenset(first + i for first, count in named for i in range(count))


def _of_wide_sum(operands: str) -> frozenset[int]:
    """The registers of IMAD.WIDE: result and addend, the first and the last, are pairs."""
    words = [word.strip() for word in operands.split(",")]
    words = [word for word in words if not re.match(r"!?U?P(T|\d)", word)]
    found = set()
    for i, word in enumerate(words):
        for n, _ in _REGISTER.findall(word):
            found |= {int(n), int(n) + (i in (0, len(words) - 1))}
    return frozenset(found)


@dataclass(frozen=True)
class Product:
    """The registers of one wgmma: its accumulators, and A where it is in registers."""

    accumulators: frozenset[int]
    a: frozenset[int]

    @staticmethod
    def of(instruction: Instruction) -> "Product | None":
        found = _PRODUCT.search(instruction.text)
        if not found:
            return None
        first, count = int(found[2]), int(found[1]) // 2
        a = range(int(found[3]), int(found[3]) + 4) if found[3] else ()
        return Product(frozenset(range(first, first + count)), frozenset(a))


class Listing:
    """Instructions in the order of their addresses, and which can follow which."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.body = [Instruction(address, text) for address, text in lines]
        self._index = {x.address: i for i, x in enumerate(self.body)}

    def successors(self, at: int) -> Iterator[int]:
        here = self.body[at]
        if here.operation.startswith("BRA"):
            if here.target in self._index:
                yield self._index[here.target]
            if not here.predicated and here.operation == "BRA":
                return
        elif here.operation.startswith(("EXIT", "RET")) and not here.predicated:
            return
        if at + 1 < len(self.body):
            yield at + 1


# ------------------------------------------------------------------ overlap, in one mainloop


@dataclass(frozen=True)
class Overlap:
    """Shares of a loop's exponentials, 0 to 1; None where the loop has no such thing.

    Attributes:
        without_turn: Those between passing the turn on and waiting for it again.
        under_product: Those between the issue of the last product and the wait for all of them.
        added_without_turn: Not of the exponentials, but of the multiply-adds that read accumulators
            of the last product and write other registers: those without the turn.
    """

    exponentials: int
    without_turn: float | None
    under_product: float | None
    added_without_turn: float | None = None


def overlap(loop: Sequence[Line]) -> Overlap:
    """Of a loop from its first instruction to the branch back."""
    body = Listing(loop).body
    exponentials = {i for i, x in enumerate(body) if _is_exponential(x)}
    waits = [i for i, x in enumerate(body) if x.operation.startswith("BAR.SYNC")]
    passes = [i for i, x in enumerate(body) if x.operation.startswith("BAR.ARV")]
    closed = [i for i, x in enumerate(body) if "GMMA" in x.operation and "gsb0" in x.text]
    ends = [i for i, x in enumerate(body) if _pending(x) == 0]
    free = _between(body, passes[-1], waits[-1]) if waits and passes else None
    under = _between(body, closed[-1], _next(ends, closed[-1])) if closed and ends else None
    added = _sums(body, Product.of(body[closed[-1]])) if closed else set()
    return Overlap(
        len(exponentials),
        _share(exponentials, free),
        _share(exponentials, under),
        _share(added, free),
    )


def _share(places: set[int], among: set[int] | None) -> float | None:
    return None if among is None or not places else len(places & among) / len(places)


def _sums(body: Sequence[Instruction], product: Product | None) -> set[int]:
    """Where multiply-adds read accumulators of `product` and write other registers."""
    found = set()
    for i, x in enumerate(body):
        if product is None or not x.operation.startswith("FFMA"):
            continue
        target, *operands = (int(n) for n, _ in _REGISTER.findall(x.text))
        if target not in product.accumulators and product.accumulators & set(operands):
            found.add(i)
    return found


def _is_exponential(instruction: Instruction) -> bool:
    return instruction.operation == "MUFU.EX2"


def _pending(instruction: Instruction) -> int | None:
    """How many groups a wait leaves under way; None: it is no wait."""
    found = _DEPBAR.search(instruction.text)
    return int(found[1], 16) if found else None


def _next(positions: Sequence[int], start: int) -> int:
    """The first of `positions` behind `start`, round the loop if need be."""
    return min(positions, key=lambda at: (at <= start, at))


def _between(body: Sequence[Instruction], start: int, end: int) -> set[int]:
    """From one place of a loop to another, round the loop if need be."""
    return {*range(start, end)} if start <= end else {*range(start, len(body)), *range(end)}


# ------------------------------------------------------------- registers of products in flight

_Groups = tuple[tuple[Product, ...], ...]


def touched_in_flight(lines: Sequence[Line]) -> list[str]:
    """What touches a register of a product that may still run, one line each; none is right.

    Every path is followed. A product may go on with the accumulators of the one before it.
    """
    listing = Listing(lines)
    found: dict[int, str] = {}
    work: list[tuple[int, _Groups, tuple[Product, ...]]] = [(0, (), ())]
    seen = set(work)
    while work:
        at, groups, open_group = work.pop()
        here = listing.body[at]
        in_flight = [product for group in (*groups, open_group) for product in group]
        mine = Product.of(here)
        if any(_clash(here, mine, product) for product in in_flight):
            found[here.address] = f"{here.address:05x}: {here.text}"
        if mine:
            open_group = tuple(dict.fromkeys((*open_group, mine)))
            if "gsb0" in here.text:
                groups, open_group = (*groups, open_group), ()
        pending = _pending(here)
        if pending is not None:
            groups = groups[len(groups) - pending :] if pending else ()
        for successor in listing.successors(at):
            state = (successor, groups, open_group)
            if state not in seen:
                seen.add(state)
                work.append(state)
    return [found[address] for address in sorted(found)]


def _clash(instruction: Instruction, mine: Product | None, product: Product) -> bool:
    if mine is None:
        return bool(instruction.registers & (product.accumulators | product.a))
    continues = mine.accumulators == product.accumulators
    return bool(
        mine.a & product.accumulators
        or mine.accumulators & product.a
        or (mine.accumulators & product.accumulators and not continues)
    )


# --------------------------------------------------------------------------------- claims


def loads_behind_claims(lines: Sequence[Line]) -> list[int]:
    """For each atomic that claims a tile, how many TMA loads of the same tile can follow it.

    Paths are followed forwards only: what a branch back leads to belongs to the next tile, or to
    another round of a loop whose loads stand behind the claim anyway.
    """
    listing = Listing(lines)
    counts = []
    for start, instruction in enumerate(listing.body):
        if not instruction.operation.startswith("ATOMG.E.ADD"):
            continue
        work, seen = [start], {start}
        while work:
            at = work.pop()
            ahead = {successor for successor in listing.successors(at) if successor > at} - seen
            seen |= ahead
            work += ahead
        counts.append(sum(listing.body[at].operation.startswith("UTMALDG") for at in seen))
    return counts

"""What can be taken from a kernel's synchronization, one at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .rules import changes, number_of_barrier
from .statements import Program, Statement, parse

_NEIGHBOURS = 3  # synchronizing statements on either side that an id depends on
_GUARDED = (
    "mbarrier.arrive",
    "mbarrier.init",
    "mbarrier.expect_tx",
    "mbarrier.complete_tx",
    "cp.async.bulk",
    "red",
    "atom",
    "bar.arrive",
)


@dataclass(frozen=True)
class Mutation:
    """One change of one statement.

    The id has the kind, the opcode, a hash of the synchronizing opcodes around it and a number
    among those that are alike. It does not change with registers, addresses, line numbers or the
    arithmetic in between.
    """

    id: str
    kind: str
    line: int
    text: str
    start: int
    end: int
    replacement: str

    def apply(self, ptx: str) -> str:
        """The text with the change; every line keeps its number."""
        return self._put(ptx, self.replacement)

    def trap(self, ptx: str) -> str:
        """The text with a trap at this place: a run that passes never comes here."""
        return self._put(ptx, "trap;")

    def _put(self, ptx: str, text: str) -> str:
        lines = "\n" * ptx.count("\n", self.start, self.end)
        return ptx[: self.start] + text + lines + ptx[self.end :]


def mutations(ptx: str) -> list[Mutation]:
    """Every mutation of a PTX text, in the order of its lines."""
    program = parse(ptx)
    following = (*program.statements[1:], None)
    changed = [
        (s, list(_changes(program, s, behind)))
        for s, behind in zip(program.statements, following, strict=True)
    ]
    changed = [(s, found) for s, found in changed if found]
    opcodes = [s.opcode for s, _ in changed]
    seen: Counter[tuple[str, str]] = Counter()
    result = []
    for at, (statement, found) in enumerate(changed):
        around = opcodes[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS + 1]
        key = "|".join([statement.kernel, *around])
        place = hashlib.sha256(key.encode()).hexdigest()[:6]
        number = seen[statement.opcode, place]
        seen[statement.opcode, place] += 1
        for kind, replacement, end in found:
            result.append(
                Mutation(
                    f"{kind} {statement.opcode} {place}.{number}",
                    kind,
                    statement.line,
                    statement.text(),
                    statement.start,
                    end,
                    replacement,
                )
            )
    return result


def _changes(
    program: Program, statement: Statement, behind: Statement | None
) -> Iterator[tuple[str, str, int]]:
    """Kinds and replacements, and where what they replace ends."""
    for kind, replacement in changes(statement):
        # Alone at its barrier, it would only call it something else.
        if kind != "another barrier" or not _is_alone(program, statement):
            yield kind, replacement, statement.end
    arrives = statement.starts("barrier.cluster.arrive")
    if arrives and behind is not None and behind.starts("barrier.cluster.wait"):
        # Either alone is found wherever it is met.
        yield "deleted with its wait", "", behind.end
    if statement.starts("bra") and statement.guard:
        skipped = program.straight_line_behind(statement)
        if any(s.starts(*_GUARDED) for s in skipped):
            yield "everyone", "", statement.end
    elif statement.guard and statement.starts(*_GUARDED):
        yield "everyone", statement.text(guard=""), statement.end


def _is_alone(program: Program, barrier: Statement) -> bool:
    """Whether no other statement of the kernel may mean this barrier."""
    named = [s for s in program.statements if number_of_barrier(s) and s.kernel == barrier.kernel]
    number = number_of_barrier(barrier)
    others = [number_of_barrier(s) for s in named if s != barrier]
    return number.isdigit() and all(n.isdigit() and n != number for n in others)

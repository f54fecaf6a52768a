"""PTX text as statements that know where they stand. No grammar: enough to change one of them."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STATEMENT = re.compile(
    r"(?:^|(?<=[;{}:]))[ \t]*"
    r"(?P<whole>(?:@(?P<guard>!?[\w%$]+)[ \t]+)?"
    r"(?P<opcode>[a-z]\w*(?:\.\w+(?:::\w+)*)*)"
    r"(?P<operands>[ \t\n][^;]*|)[ \t]*;)",
    re.MULTILINE,
)
_LABEL = re.compile(r"^[ \t]*([\w$]+):", re.MULTILINE)
_KERNEL = re.compile(r"\.(?:entry|func)\b[^;{]*?([\w$]+)\s*\(")
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


@dataclass(frozen=True)
class Statement:
    """One instruction: `@guard opcode operands;`, at `start` to `end` of the text."""

    guard: str
    opcode: str
    operands: tuple[str, ...]
    start: int
    end: int
    line: int
    kernel: str

    @property
    def words(self) -> tuple[str, ...]:
        """The opcode by its dots."""
        return tuple(self.opcode.split("."))

    def starts(self, *prefixes: str) -> bool:
        """Whether the opcode is one of these, or one of these with modifiers behind it."""
        return any(self.opcode == p or self.opcode.startswith(p + ".") for p in prefixes)

    def text(
        self,
        *,
        opcode: str | None = None,
        operands: tuple[str, ...] | None = None,
        guard: str | None = None,
    ) -> str:
        """The statement on one line, changed where something is given."""
        guard = self.guard if guard is None else guard
        listed = ", ".join(self.operands if operands is None else operands)
        words = [f"@{guard}"] if guard else []
        words += [self.opcode if opcode is None else opcode, *([listed] if listed else [])]
        return " ".join(words) + ";"


@dataclass(frozen=True)
class Program:
    """The statements of a PTX text in their order, and where its labels are."""

    ptx: str
    statements: tuple[Statement, ...]
    labels: tuple[tuple[str, int], ...]

    def straight_line_behind(self, branch: Statement) -> tuple[Statement, ...]:
        """What a branch forward jumps over, if nothing in there but a wait's own loop branches."""
        target = self._next(branch.operands[0], branch.end)
        skipped = tuple(s for s in self.statements if branch.end <= s.start < target)
        inner = {name for name, at in self.labels if branch.end < at < target}
        if any(name.startswith("$") for name in inner):  # the compiler's; loops of asm have none
            return ()
        jumps = [s for s in skipped if s.starts("bra", "ret", "exit")]
        return skipped if all(s.operands[:1] and s.operands[0] in inner for s in jumps) else ()

    def _next(self, label: str, position: int) -> int:
        return min((at for name, at in self.labels if name == label and at > position), default=-1)


def parse(ptx: str) -> Program:
    """The statements of every kernel of a PTX text."""
    plain = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), ptx)
    lines = [m.start() for m in re.finditer("\n", plain)]
    kernels = [(m.start(), m[1]) for m in _KERNEL.finditer(plain)]
    begins = [start for start, _ in kernels]

    def kernel_at(position: int) -> str:
        at = bisect.bisect_right(begins, position) - 1
        return kernels[at][1] if at >= 0 else ""

    def found() -> Iterator[Statement]:
        for match in _STATEMENT.finditer(plain):
            start, end = match.span("whole")
            line = bisect.bisect_left(lines, start) + 1
            operands = tuple(m[0].strip() for m in _OPERAND.finditer(match["operands"].strip()))
            guard, opcode = match["guard"] or "", match["opcode"]
            yield Statement(guard, opcode, operands, start, end, line, kernel_at(start))

    labels = tuple((m[1], m.start()) for m in _LABEL.finditer(plain))
    return Program(ptx, tuple(found()), labels)

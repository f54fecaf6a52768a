"""What the compiler is asked for, and what it said."""

from dataclasses import dataclass
from pathlib import Path

from flash8.compiler.places import printable


@dataclass(frozen=True)
class Unit:
    """One compilation: a .cu file and its -D options, ("kHeadDim", "128") for -DkHeadDim=128."""

    source: Path
    defines: tuple[tuple[str, str], ...] = ()
    name: str = ""

    @property
    def label(self) -> str:
        """What progress lines and tables call it."""
        return printable(self.name or " ".join([self.source.name, *self.define_options()]))

    def define_options(self) -> list[str]:
        return [f"-D{name}={value}" if value else f"-D{name}" for name, value in self.defines]


@dataclass(frozen=True)
class BuildResult:
    """What a build read and said; the PTX and the cubin are in the folder."""

    headers: tuple[Path, ...]  # every file that was read, the source among them
    log: str


def enumerator(word: str) -> str:
    """The C++ enumerator of a choice: "causal" is kCausal. An unknown one does not compile."""
    return "k" + "".join(part.capitalize() for part in word.split("_"))

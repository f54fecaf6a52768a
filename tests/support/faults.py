"""Planted faults: what a kernel with another text must be found by."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A text of the device code that another takes the place of, and the variant that shows it."""

    name: str
    variant: Any
    edit: tuple[str, str, str]
    more: tuple[tuple[str, str, str], ...] = ()

    @property
    def edits(self) -> tuple[tuple[str, str, str], ...]:
        return (self.edit, *self.more)

"""Lists of survivors, each with the reason why no case can notice it.

kernel = "forward_bf16_d64_causal"

[[survivors]]
why = "The last wait of a producer keeps the CTA alive; nobody depends on it."
mutants = ["deleted mbarrier.try_wait.parity.shared::cta.b64 1a2b3c.0"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .engine import Result


@dataclass(frozen=True)
class Known:
    """Explanations by the id of a mutation."""

    why: dict[str, str] = field(default_factory=dict)


def load(path: Path) -> Known:
    """Reads a list.

    Raises:
        ValueError: An entry has no explanation, or a mutation stands twice.
    """
    why: dict[str, str] = {}
    for entry in tomllib.loads(path.read_text()).get("survivors", []):
        reason = " ".join(entry.get("why", "").split())
        for name in entry["mutants"]:
            if not reason:
                raise ValueError(f"{path.name}: {name!r} has no explanation")
            if name in why:
                raise ValueError(f"{path.name}: {name!r} is listed twice")
            why[name] = reason
    return Known(why)


def compare(results: Iterable[Result], known: Known) -> list[str]:
    """What is wrong, a line each: unexplained survivors, entries that are none, refused mutants."""
    wrong, left = [], dict(known.why)
    for result in results:
        name = result.mutation.id
        listed = left.pop(name, None) is not None
        if result.verdict == "survived" and not listed:
            wrong.append(f"unexplained: {result}")
        elif result.verdict == "killed" and listed:
            wrong.append(f"listed as a survivor, but {result}")
        elif result.verdict == "refused":
            wrong.append(f"does not load: {result}")
    return wrong + [f"listed, but there is no such mutation: {name}" for name in left]

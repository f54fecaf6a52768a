"""PTX text: a kernel around a body, and the lines that a finding names."""

from __future__ import annotations

import re

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"


def kernel(
    body: str, *, parameters: str = "", name: str = "k", directives: str = "", module: str = ""
) -> str:
    """PTX text of one kernel around `body`; `parameters` like ".param .u64 out, .param .u32 n"."""
    listed = ",\n  ".join(part.strip() for part in parameters.split(",") if part.strip())
    return (
        f"{HEADER}{module}\n.visible .entry {name}(\n  {listed}\n)\n{directives}\n{{\n{body}\n}}\n"
    )


def line_of(ptx: str, text: str, occurrence: int = 0) -> int:
    """The PTX line that contains `text`, counted from 1: what a finding should name."""
    lines = [i + 1 for i, line in enumerate(ptx.splitlines()) if re.search(re.escape(text), line)]
    return lines[occurrence]

"""The table of choices in the document says what the code does."""

import inspect
import re
from types import SimpleNamespace

import pytest

from flash8.backends.hopper import heuristics
from repository import DOCS, ROOT

#: What an example calls `has_uneven_tiles` with.
_NOTHING = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
_DENSE = {"window_left": -1, "window_right": -1, "attention_chunk": 0, **dict.fromkeys(_NOTHING)}
_CALLS = {
    "dense": SimpleNamespace(**_DENSE),
    "causal": SimpleNamespace(**{**_DENSE, "window_right": 0}),
    "packed": SimpleNamespace(**{**_DENSE, "cu_seqlens_q": [0, 3]}),
}
#: Of the backward; docs/backward.md has it.
_ELSEWHERE = {"head_splits"}


def rows():
    """The cells of the table, by row."""
    section = (DOCS / "forward.md").read_text().split("\n## Choices\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


EXAMPLES = [example for row in rows() for example in re.findall(r"`([^`]+)`", row[3])]


def public_functions():
    found = inspect.getmembers(heuristics, callable)
    return {name: f for name, f in found if f.__module__ == heuristics.__name__ and name[0] != "_"}


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_table(example):
    assert eval(example, {"__builtins__": {}}, {**public_functions(), **_CALLS}) is True


def test_every_choice_of_the_host_is_in_the_table():
    called = {re.sub(r"^not ", "", example).split("(")[0] for example in EXAMPLES}
    assert called == public_functions().keys() - _ELSEWHERE


def test_every_row_has_a_reason():
    assert len(rows()) == 11
    for row in rows():
        assert len(row) == 4
        assert row[1] and row[2]


def test_what_the_device_code_decides_has_that_name_there():
    """In the rows without an example."""
    sources = [*(ROOT / "hopper" / "forward").glob("*.cuh"), *(ROOT / "hopper").glob("att*/*.cuh")]
    text = "\n".join(path.read_text() for path in sources)
    named = [name for row in rows() if not row[3] for name in re.findall(r"`(\w+)`", row[1])]
    assert named == ["TileOrder", "kTakeTurns", "kOverlapPV"]
    assert all(re.search(rf"\b(struct|class|bool) {name}\b", text) for name in named)

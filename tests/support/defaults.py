"""Which of many cases the default suite runs; `make test-full` has the others, marked slow.

A kernel costs about nine seconds to compile and its cases cost little, so a default test takes a
variant that ships or that another default test compiles, and of its mutations a few.
"""

from collections.abc import Iterable
from typing import Any

import pytest


def by_default(cases: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Parameters for `cases`, of which those that are not in `kept` are slow."""
    cases, kept = list(cases), list(kept)
    assert all(case in cases for case in kept), "a case to keep that there is not"
    slow = pytest.mark.slow
    return [
        pytest.param(case, id=getattr(case, "name", str(case)), marks=() if case in kept else slow)
        for case in cases
    ]

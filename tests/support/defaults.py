"""Which of many cases the default suite runs; `make test-full` has the others, marked slow.

A kernel costs five to ten seconds to compile and its cases cost little, so a default test takes a
variant that another default test compiles, and of its mutations a few.
"""

from collections.abc import Iterable
from typing import Any

import pytest

from flash8.backends.hopper.variants import SHIPPED, ForwardVariant

#: Shipped forward kernels that no default grid runs: each would be compiled for its gates alone.
GATES_ONLY = (
    ForwardVariant("bf16", 64, 64),
    ForwardVariant("bf16", 64, 64, mask="causal"),
    ForwardVariant("bf16", 96, 96),
    ForwardVariant("fp16", 128, 128, mask="causal"),
    ForwardVariant("bf16", 128, 128, mask="local"),
    ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True, paged=True),
    ForwardVariant("fp16", 128, 128, mask="causal", paged=True),
    ForwardVariant("bf16", 128, 128, mask="local", paged=True),
    ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True, paged=True, gather=True),
    ForwardVariant("bf16", 64, 64, mask="causal", cache="e4m3"),
    ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True, cache="e4m3"),
    ForwardVariant("bf16", 128, 128, mask="local", cache="e4m3"),
    ForwardVariant("fp16", 192, 192, mask="local"),
    ForwardVariant("bf16", 256, 256, mask="local", softcap=True),
    ForwardVariant("e4m3", 64, 64, mask="causal", scales="head"),
    ForwardVariant("e4m3", 96, 96, scales="head"),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head"),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", v_colmajor=True),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", paged=True),
    ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", paged=True, gather=True),
    ForwardVariant("e4m3", 128, 128, scales="block"),
    ForwardVariant("e4m3", 192, 128, mask="causal", scales="head"),
    ForwardVariant("e4m3", 192, 192, mask="local", scales="block"),
    ForwardVariant("e4m3", 256, 256, scales="head"),
    ForwardVariant("e4m3", 256, 256, mask="causal", scales="head", v_colmajor=True),
)
#: The others, in the order of SHIPPED.
SHIPPED_BY_DEFAULT = tuple(variant for variant in SHIPPED if variant not in GATES_ONLY)


def by_default(cases: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """Parameters for `cases`, of which those that are not in `kept` are slow."""
    cases, kept = list(cases), list(kept)
    assert all(case in cases for case in kept), "a case to keep that there is not"
    slow = pytest.mark.slow
    return [
        pytest.param(case, id=getattr(case, "name", str(case)), marks=() if case in kept else slow)
        for case in cases
    ]

"""Takes synchronization from a kernel, piece by piece, and asks its tests whether they notice.

`mutations` lists what can be deleted or weakened in a PTX text, `judge` runs the kernel's own cases
on every mutant, `known` holds the survivors against a list with an explanation for each.
"""

from .engine import InvalidMutantError, Result, in_child, judge, survivors
from .known import Known, compare, load
from .mutations import Mutation, mutations

__all__ = [
    "InvalidMutantError",
    "Known",
    "Mutation",
    "Result",
    "compare",
    "in_child",
    "judge",
    "load",
    "mutations",
    "survivors",
]

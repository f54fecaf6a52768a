"""Results that are on disk as soon as they are known, and the time that a benchmark has.

`make gpu-check` ends a benchmark at its limit, of which FLASH8_STEP_SECONDS tells it: one that
stops a little earlier ends well.
"""

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from gpu_steps.journal import write_json

__all__ = ["while_there_is_time", "write_json"]

_SHARE = 0.9  # of the limit, for what is begun
_START = time.monotonic()
Item = TypeVar("Item")


def while_there_is_time(items: Iterable[Item]) -> Iterator[Item]:
    """`items`, until the time is up; then the rest is counted and left out."""
    seconds = os.environ.get("FLASH8_STEP_SECONDS")
    rest = iter(items)
    for item in rest:
        if seconds and time.monotonic() - _START > _SHARE * float(seconds):
            left_out = 1 + sum(1 for _ in rest)
            print(
                f"the time of {seconds} s is up: {left_out} measurements are left out", flush=True
            )
            return
        yield item

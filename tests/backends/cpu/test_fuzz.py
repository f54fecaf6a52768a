"""Random calls, most of them damaged: refuse with a useful message, or be right.

FLASH8_FUZZ_SECONDS and FLASH8_FUZZ_SEED choose how long and from where; every failure prints the
seed of its call.  `-m slow` runs longer.
"""

import os
import random
import time

import pytest

from fuzz.calls import attention_call, cache_call, damaged, judge

SECONDS = float(os.environ.get("FLASH8_FUZZ_SECONDS", "8"))
SEED = int(os.environ.get("FLASH8_FUZZ_SEED", "0"))

# ------------------------------------------------------------------------------- valid calls


# ------------------------------------------------------------------------------------ damage


# ----------------------------------------------------------------------------------- verdict


def fuzz(seconds: float, seed: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rng = random.Random(seed)
        name, arguments = rng.choice([attention_call, attention_call, cache_call])(rng)
        times = rng.choice([0, 1, 1, 1, 2, 3])
        for _ in range(times):
            victim = rng.choice(sorted(arguments))
            arguments[victim] = damaged(rng, arguments[victim])
        try:
            verdict = judge(name, arguments, undamaged=times == 0)
        except Exception as error:
            raise AssertionError(f"FLASH8_FUZZ_SEED={seed} {name}: {error!r}") from error
        counts[verdict] = counts.get(verdict, 0) + 1
        seed += 1
    return counts


def test_fuzz():
    counts = fuzz(SECONDS, SEED)
    assert counts.get("refused", 0) > 10, counts
    assert counts.get("right", 0) > 10, counts


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fuzz_for_longer():
    fuzz(max(SECONDS, 60.0), 10**6)

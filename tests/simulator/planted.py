"""Runs a kernel under seeds: the faulty one must be found, the right one never."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import sim as S


def program(body: str, parameters: str, module: str = "") -> tuple[str, dict[str, int]]:
    """PTX text of kernel `k`, and the line of every `//tag name` in its body."""
    ptx = S.kernel(body, parameters=parameters, module=module)
    parts = [line.partition("//tag ")[2].strip() for line in ptx.splitlines()]
    return ptx, {tag: i + 1 for i, tag in enumerate(parts) if tag}


def fill(text: str, **parts: str) -> str:
    """The text with `{name}` replaced; PTX's other braces stay."""
    for name, part in parts.items():
        text = text.replace("{" + name + "}", part)
    return text


def messages(sim: S.Simulator, run: Callable[[], None], seeds: int) -> list[str]:
    """What `run`, which launches, finds under the seeds."""
    found = []
    for seed in range(seeds):
        sim.configure(seed=seed)
        try:
            run()
        except S.SimulatorError as error:
            found.append(str(error))
    return found


def must_find(
    sim: S.Simulator,
    run: Callable[[], None],
    *,
    kinds: tuple[str, ...],
    lines: list[int],
    words: tuple[str, ...],
) -> None:
    """One of 20 seeds finds the fault; each finding names kernel, PTX line, warp and address."""
    found = messages(sim, run, 20)
    assert found, "no finding in 20 seeds"
    for message in found:
        kind = re.search(r"\[([\w-]+)\] kernel k[,:]", message)
        assert kind is not None and kind[1] in kinds, message
        assert re.search(r"\bwarp \d", message), message
        assert re.search(r"(memory|mbarrier) 0x[0-9a-f]+", message), message
        line = re.search(r"PTX line (\d+) \(", message)
        assert line is not None and int(line[1]) in lines, message
        for word in words:
            assert word in message, message


SEEDS = pytest.mark.parametrize("seeds", [12, pytest.param(200, marks=pytest.mark.slow)])

"""Runs a kernel under seeds: the faulty one must be found, the right one never."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import flash8_sim as S


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


def findings(sim: S.Simulator, run: Callable[[], None], seeds: int) -> list[S.SimulatorError]:
    """What `run`, which launches, finds under the seeds."""
    found = []
    for seed in range(seeds):
        sim.configure(seed=seed)
        try:
            run()
        except S.SimulatorError as error:
            found.append(error)
    return found


def messages(sim: S.Simulator, run: Callable[[], None], seeds: int) -> list[str]:
    return [str(error) for error in findings(sim, run, seeds)]


def must_find(
    sim: S.Simulator,
    run: Callable[[], None],
    *,
    kinds: tuple[str, ...],
    lines: list[int],
    words: tuple[str, ...],
) -> None:
    """One of 20 seeds finds the fault; each finding names kernel, PTX line, warp and address."""
    found = findings(sim, run, 20)
    assert found, "no finding in 20 seeds"
    for error in found:
        assert error.kind in kinds and error.kernel == "k", error
        assert error.line in lines and f"PTX line {error.line} (" in str(error), error
        assert f" warp {error.warp}" in str(error), error
        assert error.address is not None, error
        assert re.search(rf"(memory|mbarrier) {error.address:#x}\b", str(error)), error
        for word in words:
            assert word in str(error), error


SEEDS = pytest.mark.parametrize("seeds", [12, pytest.param(200, marks=pytest.mark.slow)])

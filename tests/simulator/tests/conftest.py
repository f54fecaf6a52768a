"""One simulated device for a session, with its default settings in every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import flash8_sim


@pytest.fixture(scope="session")
def simulator() -> flash8_sim.Simulator:
    return flash8_sim.Simulator()


@pytest.fixture
def sim(simulator: flash8_sim.Simulator) -> Iterator[flash8_sim.Simulator]:
    """The simulator with its default settings."""
    simulator.configure(**flash8_sim.DEFAULTS)
    yield simulator
    simulator.configure(**flash8_sim.DEFAULTS)

"""Builds the simulator once a session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sim as sim_module


@pytest.fixture(scope="session")
def simulator() -> sim_module.Simulator:
    return sim_module.Simulator(sim_module.build())


@pytest.fixture
def sim(simulator: sim_module.Simulator) -> Iterator[sim_module.Simulator]:
    """The simulator with its default settings."""
    simulator.configure(**sim_module.DEFAULTS)
    yield simulator
    simulator.configure(**sim_module.DEFAULTS)

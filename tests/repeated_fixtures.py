"""Fixtures of the tests of calls like one before (`flash8.backends.repeated`)."""

import functools
from collections.abc import Iterator

import pytest
import torch

from fake_driver.cubin import forward_cubin
from flash8 import _native, backends, ops
from flash8.backends import hopper, mode, repeated
from simulated_device import SimulatedDevice

READERS = ("DLPack", "attributes")


@pytest.fixture(params=READERS)
def forgetful(request, monkeypatch):
    """Nothing is remembered from or for other tests. Tensors are read in either of two ways."""
    api = torch.Tensor.__dlpack_c_exchange_api__ if request.param == "DLPack" else None
    recall = functools.cache(lambda: repeated.new_recall(api))
    monkeypatch.setattr(repeated, "_recall", recall)


@pytest.fixture
def on_fake_driver(monkeypatch, driver, forgetful):
    """CPU tensors take the Hopper backend on a driver that does nothing."""
    registry = _native.Registry(driver, forward_cubin)
    monkeypatch.setattr(backends, "kernels_wanted", lambda tensor: True)
    monkeypatch.setattr(mode, "kernels_mode", lambda: "on")
    monkeypatch.setattr(hopper, "_registry", lambda: registry)


@pytest.fixture
def on_simulated_device(monkeypatch, forgetful) -> Iterator[None]:
    """CPU tensors take the Hopper backend on the simulated device."""
    with SimulatedDevice().serving_cpu_tensors(monkeypatch, seed=5):
        yield


@pytest.fixture
def whole_ways(monkeypatch) -> list[int]:
    """A list that grows with every call that goes through the op."""
    seen: list[int] = []
    run_forward = ops.run_forward
    monkeypatch.setattr(ops, "run_forward", lambda *args: seen.append(1) or run_forward(*args))
    return seen

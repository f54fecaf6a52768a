"""Fixtures of the tests of calls like one before (`flash8.ops.plan_cache`)."""

import functools
from collections.abc import Iterator

import pytest
import torch

from fake_driver.cubin import forward_cubin
from flash8 import _native, backends
from flash8.backends.hopper import kernels, mode
from flash8.ops import attention as ops
from flash8.ops import plan_cache
from simulated_device import SimulatedDevice

READERS = ("DLPack", "attributes")


@pytest.fixture(params=READERS)
def forgetful(request, monkeypatch):
    """Nothing is remembered from or for other tests. Tensors are read in either of two ways."""
    api = torch.Tensor.__dlpack_c_exchange_api__ if request.param == "DLPack" else None
    recall = functools.cache(lambda: plan_cache.new_plan_cache(api))
    monkeypatch.setattr(plan_cache, "_plan_cache", recall)


@pytest.fixture
def on_fake_driver(monkeypatch, driver, forgetful):
    """CPU tensors take the Hopper backend on a driver that does nothing."""
    registry = _native.Registry(driver, forward_cubin)
    monkeypatch.setattr(backends, "kernels_wanted", lambda tensor: True)
    monkeypatch.setattr(mode, "kernels_mode", lambda: "on")
    monkeypatch.setattr(kernels, "registry", lambda: registry)


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

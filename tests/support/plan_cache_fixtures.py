"""Fixtures of the tests of the plan cache (`flash8.ops.plan_cache`)."""

import functools
from collections.abc import Iterator

import pytest
import torch

from fake_driver.cubin import any_cubin
from flash8 import _native, backends
from flash8.backends.hopper import kernels, mode
from flash8.ops import attention as ops
from flash8.ops import backward_plans, decode_plans, gemm_plans, plan_cache
from simulated_device import SimulatedDevice

READERS = ("DLPack", "attributes")


@pytest.fixture(params=READERS)
def own_cache(request, monkeypatch):
    """Plan caches of the test's own. Tensors are read in either of two ways."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if request.param == "attributes":
        api = None
    elif api is None:
        pytest.skip("this torch has no table of DLPack functions")
    cache = functools.cache(lambda: plan_cache.new_plan_cache(api))
    monkeypatch.setattr(plan_cache, "_plan_cache", cache)
    decoding = functools.cache(lambda: decode_plans.new_cache(api))
    monkeypatch.setattr(decode_plans, "cache", decoding)
    gradients = functools.cache(lambda: backward_plans.new_cache(api))
    monkeypatch.setattr(backward_plans, "cache", gradients)
    products = functools.cache(lambda: gemm_plans.new_cache(api))
    monkeypatch.setattr(gemm_plans, "cache", products)


@pytest.fixture
def on_fake_driver(monkeypatch, driver, own_cache):
    """CPU tensors take the Hopper backend on a driver that does nothing."""
    registry = _native.Registry(driver, any_cubin)
    monkeypatch.setattr(backends, "kernels_wanted", lambda tensor: True)
    monkeypatch.setattr(mode, "kernels_mode", lambda: "on")
    monkeypatch.setattr(kernels, "registry", lambda: registry)


@pytest.fixture
def on_simulated_device(monkeypatch, own_cache) -> Iterator[None]:
    """CPU tensors take the Hopper backend on the simulated device."""
    with SimulatedDevice().serving_cpu_tensors(monkeypatch, seed=5):
        yield


@pytest.fixture
def misses(monkeypatch) -> list[str]:
    """A list that grows with every call that the plan cache has no launch for: "launch" where the
    call was planned and launched, "op" where the torch op served it."""
    seen: list[str] = []
    run_forward = ops.run_forward

    def counted(launch):
        def launch_once(*args):
            done = launch(*args)
            seen.extend(["launch"] * (done is not None))
            return done

        return launch_once

    for plans in (plan_cache, decode_plans):
        monkeypatch.setattr(plans, "launch", counted(plans.launch))
    monkeypatch.setattr(ops, "run_forward", lambda *args: seen.append("op") or run_forward(*args))
    return seen

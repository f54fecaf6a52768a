"""Threads that call at once: one load for all, right launches, no deadlock."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fake_driver.cubin import fake_cubin, forward_cubin
from flash8 import _native, flash_attn_func
from flash8.backends.hopper import kernels
from flash8.ops import plan_cache
from plan_cache_cases import addresses, draw

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

THREADS = 8


def at_once(work):
    """work(thread) of all threads, which begin together."""
    barrier = threading.Barrier(THREADS)

    def begin(thread):
        barrier.wait()
        return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def test_first_calls_of_one_kernel(fake, on_fake_driver):
    tensors = [draw(thread) for thread in range(THREADS)]
    outs = at_once(lambda thread: flash_attn_func(*tensors[thread], causal=True))
    launched = {tuple(addresses(fake.parameter(i), "q", "o")) for i in range(THREADS)}
    assert launched == {
        (q.data_ptr(), out.data_ptr()) for (q, _, _), out in zip(tensors, outs, strict=True)
    }
    assert fake.count("cuLibraryLoadData") == 1


def test_first_calls_of_many_kernels(fake, on_fake_driver):
    kinds = [{"causal": c, "softcap": s} for c in (True, False) for s in (0.0, 5.0)]
    at_once(lambda thread: flash_attn_func(*draw(), **kinds[thread % 4]))
    assert fake.count("cuLibraryLoadData") == 4 and len(fake.launches) == THREADS


def test_first_calls_of_a_kernel_that_fails_at_first(fake, driver, on_fake_driver, monkeypatch):
    """Every thread asks again for itself until one succeeds, and nothing is kept of a failure."""
    failures = iter([MemoryError("no room")] * 3)

    def image(key, kind):
        for failure in failures:
            raise failure
        return forward_cubin(key)

    registry = _native.Registry(driver, image)
    monkeypatch.setattr(kernels, "registry", lambda: registry)

    def work(thread):
        try:
            return flash_attn_func(*draw(thread), causal=True)
        except MemoryError:
            return None

    outs = at_once(work)
    assert sum(out is None for out in outs) == 3 and len(fake.launches) == THREADS - 3
    assert fake.count("cuLibraryLoadData") == 1


def test_calls_while_others_forget_everything(fake, on_fake_driver):
    fake.record(False)
    tensors = [draw(thread) for thread in range(THREADS)]

    def work(thread):
        for round_ in range(150):
            flash_attn_func(*tensors[thread], causal=bool(round_ % 2))
            if round_ % 10 == thread:
                plan_cache._plan_cache().clear()

    at_once(work)
    assert len(plan_cache._plan_cache()) <= 2


def test_a_finalizer_that_calls_while_its_thread_loads(driver):
    """The thread holds the lock of the key already."""
    depth = []

    def image(key, kind):
        depth.append(1)
        if len(depth) == 1:
            assert registry.get(key).name == "forward"
        return fake_cubin()

    registry = _native.Registry(driver, image)
    first = registry.get("kernel")
    assert registry.get("kernel") is first and len(depth) == 2


@pytest.mark.parametrize("rounds", [20])
def test_devices_and_libraries_come_and_go(rounds, fake, driver):
    def work(thread):
        for _ in range(rounds):
            kernel = _native.Library(driver, fake_cubin()).kernel()
            kernel.launch((1, 1, 1), [bytes(kernel.info.params_bytes)])
            memory = _native.DeviceMemory(driver, 64)
            memory.write(bytes([thread]) * 64)
            assert memory.read() == bytes([thread]) * 64

    at_once(work)
    assert fake.alive == 0 and len(fake.launches) == THREADS * rounds


def test_gradients_of_threads_are_their_own(on_fake_driver):
    def work(thread):
        q, k, v = (x.requires_grad_() for x in draw(thread))
        out = flash_attn_func(q, k, v, causal=True)
        torch.autograd.grad(out.float().nan_to_num().sum(), (q, k, v))
        return out.grad_fn is not None

    assert all(at_once(work))

"""What calls keep must not lie in a pool that their caller allocates from: that of a CUDA graph, or
of torch.compile(mode="reduce-overhead"), which is checked for tensors that outlive a step."""

import gc
import threading
import weakref

import pytest
import torch

from flash8 import flash_attn_func, flash_attn_with_kvcache
from flash8.backends.hopper import streams
from plan_cache_cases import draw

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]


class Pool:
    """A thread's allocations by torch.empty and torch.zeros."""

    def __init__(self, monkeypatch):
        self._thread, self._made = threading.get_ident(), []
        for name in ("empty", "zeros"):
            monkeypatch.setattr(torch, name, self._recording(getattr(torch, name)))

    def _recording(self, function):
        def call(*args, **options):
            made = function(*args, **options)
            if threading.get_ident() == self._thread:
                self._made.append(weakref.ref(made))
            return made

        return call

    def live(self):
        """What has memory still."""
        gc.collect()
        kept = [made() for made in self._made]
        return [x for x in kept if x is not None and x.untyped_storage().nbytes() > 0]


@pytest.fixture
def pool(fake, on_fake_driver, monkeypatch):
    """As the first calls of a process see it."""
    for function in vars(streams).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    return Pool(monkeypatch)


def step(**options):
    """A training step that leaves nothing."""
    leaves = [x.requires_grad_() for x in draw()]
    out = flash_attn_func(*leaves, causal=True, **options)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def decode():
    q, k, v = draw()
    flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=torch.full((q.shape[0],), 40).int())


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("first", [step, lambda: step(deterministic=True), decode])
def test_first_calls_keep_nothing_of_their_callers_pool(first, captured, pool, fake):
    fake.capture(captured)
    for _ in range(2):  # a miss, then a hit
        first()
    assert fake.launches and pool.live() == []


def test_counters_of_a_stream_come_from_another_thread(pool):
    cpu = torch.device("cpu")
    counters = streams.get_tile_count(cpu, 48)
    tickets = streams.get_tickets(cpu, 48, 300)
    assert counters.tolist() == [0, 0] and tickets.shape == (300,) and not tickets.any()
    assert pool.live() == []
    assert streams.get_tile_count(cpu, 48) is counters
    assert streams.get_tickets(cpu, 48, 300) is tickets


def test_counters_of_a_capture_are_of_its_pool(pool):
    counters = streams.get_tile_count(torch.device("cpu"), 48, True)
    assert [x.data_ptr() for x in pool.live()] == [counters.data_ptr()]
    del counters
    assert pool.live() == []

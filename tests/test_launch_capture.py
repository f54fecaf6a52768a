"""Calls while a CUDA graph is captured, as far as a driver that does nothing can tell."""

import pytest

from flash8 import flash_attn_func
from flash8.backends import hopper
from repeated_cases import CALLS, addresses, draw, forget

pytest_plugins = ["driver_fixtures", "repeated_fixtures"]


def count(fake):
    return fake.count("cuLaunchKernelEx")


@pytest.mark.parametrize("way", ["like one before", "whole"])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_is_one_launch_and_nothing_illegal(name, way, fake, on_fake_driver):
    CALLS[name](*draw(0))
    if way == "whole":
        forget()
    before = count(fake)
    fake.capture(True)
    CALLS[name](*draw(1))
    assert count(fake) == before + 1


@pytest.mark.parametrize("way", ["like one before", "whole"])
def test_with_gradients_too(way, fake, on_fake_driver):
    tensors = [x.requires_grad_() for x in draw()]
    flash_attn_func(*tensors, causal=True)
    if way == "whole":
        forget()
    fake.capture(True)
    flash_attn_func(*tensors, causal=True)
    assert count(fake) == 2


@pytest.mark.parametrize("way", ["like one before", "whole"])
def test_a_captured_launch_has_a_counter_of_its_own(way, fake, monkeypatch, on_fake_driver):
    """Kept alive here, so that no two of them can have the same address one after the other."""
    counters = []
    new_counter = hopper.get_tile_count

    def get_tile_count(*args):
        counters.append(new_counter(*args))
        return counters[-1]

    monkeypatch.setattr(hopper, "get_tile_count", get_tile_count)
    for captured in (False, False, True, True, False):
        fake.capture(captured)
        flash_attn_func(*draw(), causal=True)
        if way == "whole":
            forget()
    launches = range(len(fake.launches))
    used = [addresses(fake.parameter(i), "scheduler.tile_count")[0] for i in launches]
    first, again, graph, other_graph, last = used
    assert first == again == last != 0
    assert len({first, graph, other_graph}) == 3
    assert {x.data_ptr() for x in counters} == set(used)
    assert all(not x.any() for x in counters)

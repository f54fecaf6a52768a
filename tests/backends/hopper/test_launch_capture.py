"""Calls while a CUDA graph is captured, as far as a driver that does nothing can tell."""

import pytest

from fake_driver.cubin import LAYOUT, fake_cubin
from flash8 import _native, flash_attn_func
from flash8.backends.hopper import streams
from plan_cache_cases import CALLS, addresses, clear, draw

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]


def count(fake):
    return fake.count("cuLaunchKernelEx")


@pytest.mark.parametrize("way", ["hit", "miss"])
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_call_is_one_launch_and_nothing_illegal(name, way, fake, on_fake_driver):
    CALLS[name](*draw(0))
    if way == "miss":
        clear()
    before = count(fake)
    fake.capture(True)
    CALLS[name](*draw(1))
    assert count(fake) == before + 1


@pytest.mark.parametrize("name", CALLS)
def test_the_first_call_of_all_may_be_captured(name, fake, on_fake_driver):
    """The kernel is loaded meanwhile, and nothing is copied from the device."""
    fake.capture(True)
    CALLS[name](*draw(0))
    assert count(fake) == 1
    assert fake.count("cuLibraryLoadData") == 1 and fake.count("cuMemcpyDtoH_v2") == 0
    CALLS[name](*draw(1))
    assert count(fake) == 2


def test_a_first_quantization_may_be_captured(fake, driver, monkeypatch):
    """As a launch: the call allocates through torch."""
    image = fake_cubin(kind=8, entry="mean", params_bytes=LAYOUT["QuantizeParams"]["size"])
    fake.capture(True)
    kernel = _native.Registry(driver, lambda key, kind: image).get("mean")
    call = _native.QuantizeParams()
    call.x = (0x10000, 8 * 2 * 64, 2 * 64, 64)
    call.batch, call.seqlen, call.heads, call.head_dim = 1, 8, 2, 64
    call.mean_partial = 0x20000
    _native.launch_quantize(kernel, 0, 0, call)
    assert count(fake) == 1


@pytest.mark.parametrize("way", ["hit", "miss"])
def test_with_gradients_too(way, fake, on_fake_driver):
    tensors = [x.requires_grad_() for x in draw()]
    flash_attn_func(*tensors, causal=True)
    if way == "miss":
        clear()
    fake.capture(True)
    flash_attn_func(*tensors, causal=True)
    assert count(fake) == 2


@pytest.mark.parametrize("way", ["hit", "miss"])
def test_a_captured_launch_has_a_counter_of_its_own(way, fake, monkeypatch, on_fake_driver):
    """Kept alive here, so that no two of them can have the same address one after the other."""
    counters = []
    new_counter = streams.get_tile_count

    def get_tile_count(*args):
        counters.append(new_counter(*args))
        return counters[-1]

    monkeypatch.setattr(streams, "get_tile_count", get_tile_count)
    for captured in (False, False, True, True, False):
        fake.capture(captured)
        flash_attn_func(*draw(), causal=True)
        if way == "miss":
            clear()
    launches = range(len(fake.launches))
    used = [addresses(fake.parameter(i), "scheduler.tile_count")[0] for i in launches]
    first, again, graph, other_graph, last = used
    assert first == again == last != 0
    assert len({first, graph, other_graph}) == 3
    assert {x.data_ptr() for x in counters} == set(used)
    assert all(not x.any() for x in counters)

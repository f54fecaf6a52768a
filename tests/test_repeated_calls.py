"""Calls like one before on the Hopper backend: what is remembered, and what never is."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fake_driver.cubin import LAYOUT, fake_cubin, tma_boxes
from flash8 import _native, backends, flash_attn_func, flash_attn_varlen_func, ops
from flash8.backends import hopper, repeated
from simulated_device import SimulatedDevice, missing_compiler

pytest_plugins = ["driver_fixtures"]

BOX = (4, (64, 128, 1, 1), _native.ElementType.BFLOAT16, _native.Swizzle.B128)


@pytest.fixture
def forgetful(monkeypatch):
    """Nothing is remembered from or for other tests."""
    monkeypatch.setattr(repeated, "_remembered", {})


@pytest.fixture
def on_fake_driver(monkeypatch, driver, forgetful):
    """CPU tensors take the Hopper backend on a driver that does nothing."""
    image = fake_cubin(cluster=(1, 1, 1), tma=tma_boxes(BOX, BOX, BOX))
    registry = _native.Registry(driver, lambda key, kind: image)
    monkeypatch.setattr(backends, "kernels_wanted", lambda tensor: True)
    monkeypatch.setattr(hopper, "_registry", lambda: registry)


@pytest.fixture
def whole_ways(monkeypatch):
    """A list that grows with every call that goes through the op."""
    seen = []
    run_forward = ops.run_forward
    monkeypatch.setattr(ops, "run_forward", lambda *args: seen.append(1) or run_forward(*args))
    return seen


def draw(seed=0, rows=40, heads=4, heads_kv=2, batch=2, width=128):
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads):
        return torch.randn(batch, rows, heads, width, generator=generator).bfloat16()

    return tensor(heads), tensor(heads_kv), tensor(heads_kv)


def without_addresses(parameters: bytes) -> bytes:
    """The parameters of a launch with the addresses of its tensors, and what holds them, zeroed."""
    cleared = bytearray(parameters)
    fields = LAYOUT["ForwardParams"]["fields"]
    for name in ("q", "k", "v", "o", "lse"):
        offset, _ = fields[name]
        cleared[offset : offset + 8] = bytes(8)
    for name in ("tma_q", "tma_k", "tma_v"):
        offset, _ = fields[name]
        cleared[offset + 16 : offset + 24] = bytes(8)  # as the fake driver packs a map
    return bytes(cleared)


ENDS = torch.tensor([0, 13, 80], dtype=torch.int32)
CALLS = {
    "causal": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
    "no mask": lambda q, k, v: flash_attn_func(q, k, v),
    "window, softcap, scale": lambda q, k, v: flash_attn_func(
        q, k, v, window_size=(7, 2), softcap=3.0, softmax_scale=0.2, sm_margin=3
    ),
    "packed": lambda q, k, v: flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), ENDS, ENDS, 67, 67
    ),
    "grouped heads in a tile": lambda q, k, v: flash_attn_func(q, k, v, pack_gqa=True),
    "strided": lambda q, k, v: flash_attn_func(q[:, ::2], k[:, 1:], v[:, 1:], causal=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_launch_is_that_of_the_whole_way(name, fake, on_fake_driver, whole_ways):
    first, second = draw(0), draw(1)
    CALLS[name](*first)
    CALLS[name](*second)
    assert len(whole_ways) == 1 and len(fake.launches) == 2
    repeated._remembered.clear()
    whole = CALLS[name](*second)
    launches, parameters = fake.launches, [fake.parameter(i) for i in range(3)]
    assert launches[1] == launches[2]
    assert without_addresses(parameters[1]) == without_addresses(parameters[2])
    again = CALLS[name](*second)
    assert again.shape == whole.shape and again.dtype == whole.dtype
    assert again.stride() == whole.stride() and not again.requires_grad
    for field, x in zip(("q", "o"), (second[0], again), strict=True):
        offset, _ = LAYOUT["ForwardParams"]["fields"][field]
        address = int.from_bytes(fake.parameter(3)[offset : offset + 8], "little")
        assert address == x.data_ptr()


def test_lse_is_returned_as_by_the_whole_way(on_fake_driver, whole_ways):
    tensors = draw()
    out, lse = flash_attn_func(*tensors, return_attn_probs=True)
    again, lse_again = flash_attn_func(*tensors, return_attn_probs=True)
    assert len(whole_ways) == 1
    for a, b in ((out, again), (lse, lse_again)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


CHANGES = {
    "rows": lambda q, k, v: ((q[:, :39], k, v), {}),
    "heads": lambda q, k, v: ((q[:, :, :2], k, v), {}),
    "strides": lambda q, k, v: ((q, k.transpose(1, 2).contiguous().transpose(1, 2), v), {}),
    "dtype": lambda q, k, v: (tuple(x.half() for x in (q, k, v)), {}),
    "scale": lambda q, k, v: ((q, k, v), {"softmax_scale": 0.3}),
    "mask": lambda q, k, v: ((q, k, v), {"causal": False}),
    "window": lambda q, k, v: ((q, k, v), {"window_size": (5, 0)}),
    "margin": lambda q, k, v: ((q, k, v), {"sm_margin": 1}),
    "sink": lambda q, k, v: ((q, k, v), {"s_aux": torch.zeros(4)}),
    "slopes": lambda q, k, v: ((q, k, v), {"alibi_slopes": torch.ones(4)}),
    "output": lambda q, k, v: ((q, k, v), {"out": torch.empty_like(q)}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_call_goes_the_whole_way(name, on_fake_driver, whole_ways):
    tensors = draw()
    flash_attn_func(*tensors, causal=True)
    changed, options = CHANGES[name](*tensors)
    flash_attn_func(*changed, **{"causal": True, **options})
    assert len(whole_ways) == 2


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
def test_an_unaligned_tensor_goes_the_whole_way(monkeypatch, on_fake_driver, whole_ways):
    """As bfloat16, 2 bytes further on: TMA could not read it, the portable code can."""
    q, k, v = draw()
    flash_attn_func(q, k, v)
    further = torch.empty(q.numel() + 1).bfloat16()[1:].view(q.shape).copy_(q)
    assert further.stride() == q.stride()
    flash_attn_func(further, k, v)
    assert len(whole_ways) == 2


BAD = {
    "causal": 1,
    "softmax_scale": True,
    "softcap": False,
    "window_size": (True, False),
    "attention_chunk": False,
    "num_splits": True,
    "deterministic": 0,
    "sm_margin": False,
    "return_attn_probs": 0,
    "k_descale": torch.ones(()),
    "dropout_p": False,
}


@pytest.mark.parametrize("name", BAD)
def test_what_equals_a_good_value_is_still_refused(name, on_fake_driver):
    """True == 1 == 1.0: types are part of what a call is known by."""
    tensors = draw()
    good = {
        "softmax_scale": 1.0,
        "window_size": (1, 0),
        "causal": True,
        "num_splits": 1,
    }
    good = {name: good[name]} if name in good else {}
    flash_attn_func(*tensors, **good)
    with pytest.raises((TypeError, ValueError), match=name):
        flash_attn_func(*tensors, **{name: BAD[name]})


@pytest.mark.parametrize("value", [[1.0], {}, torch.ones(1)])
def test_what_has_no_hash_is_refused_as_before(value, on_fake_driver):
    flash_attn_func(*draw())
    with pytest.raises(TypeError, match="softmax_scale"):
        flash_attn_func(*draw(), softmax_scale=value)


@contextmanager
def forward_mode():
    with torch.autograd.forward_ad.dual_level():
        yield


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watcher", [Watching, Overriding, forward_mode])
def test_who_watches_sees_the_op(watcher, on_fake_driver, whole_ways):
    tensors = draw()
    flash_attn_func(*tensors)
    with watcher():
        flash_attn_func(*tensors)
    assert len(whole_ways) == 2
    flash_attn_func(*tensors)
    assert len(whole_ways) == 2


def test_gradients_go_the_whole_way(on_fake_driver, whole_ways):
    q, k, v = draw()
    flash_attn_func(q, k, v)
    q.requires_grad_()
    assert flash_attn_func(q, k, v).requires_grad
    with torch.no_grad():
        assert not flash_attn_func(q, k, v).requires_grad
    assert len(whole_ways) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_are_refused_as_before(on_fake_driver):
    q, k, v = draw()
    flash_attn_func(q, k, v)
    for bad in (q.to_sparse(), torch.nested.nested_tensor([q[0], q[1]])):
        with pytest.raises(TypeError, match="q must be a strided"):
            flash_attn_func(bad, k, v)


def test_memory_of_calls_is_bounded(monkeypatch, on_fake_driver):
    monkeypatch.setattr(repeated, "_MOST_PLANS", 3)
    for rows in range(20, 30):
        flash_attn_func(*draw(rows=rows))
    assert 1 <= len(repeated._remembered) <= 3


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("name", ["causal", "packed", "strided"])
def test_results_are_those_of_the_whole_way(name, monkeypatch, forgetful, whole_ways):
    first, second = draw(0), draw(1)
    device = SimulatedDevice()
    with device.serving_cpu_tensors(monkeypatch, seed=5):
        CALLS[name](*first)
        got = CALLS[name](*second)
        assert len(whole_ways) == 1
        repeated._remembered.clear()
        want = CALLS[name](*second)
    assert len(whole_ways) == 2
    assert torch.equal(got, want) and math.isfinite(got.float().sum())

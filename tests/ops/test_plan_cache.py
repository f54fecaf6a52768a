"""The plan cache: which calls are hits, which are misses, and that both launch the same."""

import gc
import math
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from defaults import by_default
from flash8 import _native, flash_attn_func, flash_attn_varlen_func
from flash8.backends.hopper import forward as hopper
from flash8.call.options import Options
from flash8.ops import attention as ops
from flash8.ops import plan_cache
from flash8.tensors.philox import draw_seed
from plan_cache_cases import CALLS, ENDS, addresses, clear, draw, without_addresses
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]


@pytest.mark.parametrize("name", CALLS)
def test_a_hit_launches_what_a_miss_does(name, fake, on_fake_driver, misses):
    first, second = draw(0), draw(1)
    CALLS[name](*first)
    CALLS[name](*second)
    assert len(misses) == 1 and len(fake.launches) == 2
    clear()
    whole = CALLS[name](*second)
    launches, parameters = fake.launches, [fake.parameter(i) for i in range(3)]
    assert launches[1] == launches[2]
    assert without_addresses(parameters[1]) == without_addresses(parameters[2])
    again = CALLS[name](*second)
    assert again.shape == whole.shape and again.dtype == whole.dtype
    assert again.stride() == whole.stride() and not again.requires_grad
    assert addresses(fake.parameter(3), "o") == [again.data_ptr()]
    if "e4m3" not in name and "scaled" not in name:
        assert addresses(fake.parameter(3), "q") == [second[0].data_ptr()]


def test_a_hit_returns_lse_as_a_miss_does(on_fake_driver, misses):
    tensors = draw()
    out, lse = flash_attn_func(*tensors, return_attn_probs=True)
    again, lse_again = flash_attn_func(*tensors, return_attn_probs=True)
    assert len(misses) == 1
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
def test_another_call_is_a_miss(name, on_fake_driver, misses):
    tensors = draw()
    flash_attn_func(*tensors, causal=True)
    changed, options = CHANGES[name](*tensors)
    flash_attn_func(*changed, **{"causal": True, **options})
    assert len(misses) == 2


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
def test_an_unaligned_tensor_is_a_miss(monkeypatch, on_fake_driver, misses):
    """As bfloat16, 2 bytes further on: TMA could not read it, the portable code can."""
    q, k, v = draw()
    flash_attn_func(q, k, v)
    further = torch.empty(q.numel() + 1).bfloat16()[1:].view(q.shape).copy_(q)
    assert further.stride() == q.stride()
    flash_attn_func(further, k, v)
    assert len(misses) == 2


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
    """True == 1 == 1.0: types are part of a key."""
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
def test_who_watches_sees_the_op(watcher, on_fake_driver, misses):
    tensors = draw()
    flash_attn_func(*tensors)
    with watcher():
        flash_attn_func(*tensors)
    assert len(misses) == 2
    flash_attn_func(*tensors)
    assert len(misses) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_are_refused_as_before(on_fake_driver):
    q, k, v = draw()
    flash_attn_func(q, k, v)
    for bad in (q.to_sparse(), torch.nested.nested_tensor([q[0], q[1]])):
        with pytest.raises(TypeError, match="q must be a strided"):
            flash_attn_func(bad, k, v)


def test_the_cache_is_bounded(monkeypatch, on_fake_driver):
    monkeypatch.setattr(plan_cache.planned, "MOST_PLANS", 3)
    for rows in range(20, 30):
        flash_attn_func(*draw(rows=rows))
    assert 1 <= len(plan_cache._plan_cache()) <= 3


def test_an_output_that_shares_memory_is_refused_as_before(fake, on_fake_driver, misses):
    """And one beside q in the same storage is none of those, nor a miss."""
    both = torch.zeros(2, *draw()[0].shape).bfloat16()
    q, k, v = draw()
    flash_attn_func(q, k, v, out=torch.empty_like(q))
    flash_attn_func(both[0], k, v, out=torch.empty_like(q))
    flash_attn_func(both[0], k, v, out=both[1])
    assert misses == ["launch"] and len(fake.launches) == 3
    for out in (both[0], both.view(-1)[8 : 8 + q.numel()].view(q.shape)):
        with pytest.raises(ValueError, match="out must not share memory with q"):
            flash_attn_func(both[0], k, v, out=out)


def off_by_one(x):
    return torch.empty(x.numel() + 1).bfloat16()[1:].view(x.shape)


OUTPUTS = {
    "its address": off_by_one,
    "its row stride": lambda x: (
        torch.empty(*x.shape[:2], x.shape[2] * 128 + 4)
        .bfloat16()[..., : x.shape[2] * 128]
        .unflatten(-1, x.shape[2:])
    ),
}


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_not_aligned_is_served_by_the_portable_code(name, fake, on_fake_driver):
    q, k, v = draw()
    want = flash_attn_func(q.double(), k.double(), v.double())
    for _ in range(2):
        launches = len(fake.launches)
        out = OUTPUTS[name](q)
        flash_attn_func(q, k, v, out=out)
        assert len(fake.launches) == launches
        torch.testing.assert_close(out.double(), want, atol=0.02, rtol=0.02)
        flash_attn_func(q, k, v, out=torch.empty_like(q))
        assert len(fake.launches) == launches + 1


def test_an_output_with_an_odd_stride_of_one_element_is_launched(fake, on_fake_driver):
    q, k, v = (x[:1] for x in draw())
    out = (
        torch.empty(q.numel() + 7).bfloat16()[: q.numel()].as_strided(q.shape, (3, *q.stride()[1:]))
    )
    for _ in range(2):
        flash_attn_func(q, k, v, out=out)
    assert len(fake.launches) == 2


def test_options_that_want_gradients_are_refused_as_before(on_fake_driver):
    q, k, v = draw()
    slopes = torch.ones(4)
    flash_attn_func(q, k, v, alibi_slopes=slopes)
    with pytest.raises(ValueError, match="alibi_slopes is not differentiable"):
        flash_attn_func(q, k, v, alibi_slopes=slopes.clone().requires_grad_())
    flash_attn_func(q, k, v, out=torch.empty_like(q))
    with pytest.raises(ValueError, match="out= cannot be combined"):
        flash_attn_func(q.clone().requires_grad_(), k, v, out=torch.empty_like(q))


COPIES = {
    "lengths": lambda q, k, v: flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), *(ENDS.repeat_interleave(2)[::2],) * 2, 67, 67
    ),
    "slopes": lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=torch.ones(8)[::2]),
    "slopes in fp64": lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=torch.ones(4).double()),
    "means": lambda q, k, v: flash_attn_func(
        *(x.to(torch.float8_e4m3fn) for x in (q, k, v)), k_mean=torch.ones(2, 256)[:, ::2]
    ),
    "keys of one head": lambda q, k, v: flash_attn_func(q, k[:, :, :1].expand_as(k), v),
    "values of one sequence": lambda q, k, v: flash_attn_func(q, k, v[:1].expand_as(v)),
    "keys of one token": lambda q, k, v: flash_attn_func(q, k[:, :1].expand_as(k), v),
    "queries of one head": lambda q, k, v: flash_attn_func(q[:, :, :1].expand_as(q), k, v),
    "a window that slides": lambda q, k, v: flash_attn_func(
        q, k.as_strided(k.shape, (k.stride(0), 64, k.stride(1), 1)), v
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_is_copied_for_the_launch_is_a_miss(name, on_fake_driver, misses):
    for _ in range(3):
        COPIES[name](*draw())
    assert len(misses) == 3


UNKNOWN = {
    "a list for a window": lambda q, k, v: flash_attn_func(q, k, v, window_size=[7, 2]),
    "NumPy in a window": lambda q, k, v: flash_attn_func(q, k, v, window_size=(np.int64(13), -1)),
    "a number of NumPy": lambda q, k, v: flash_attn_func(q, k, v, softmax_scale=np.float64(0.2)),
}


WITHOUT_KEY = {
    **UNKNOWN,
    "a pending negation": lambda q, k, v: flash_attn_func(torch._neg_view(q), k, v),
    "a subclass": lambda q, k, v: flash_attn_func(q.as_subclass(Named), k, v),
    "no elements": lambda q, k, v: flash_attn_func(q[:, :0], k, v),
}


@pytest.mark.parametrize("name", WITHOUT_KEY)
def test_a_call_without_a_key_goes_through_the_op(name, on_fake_driver, misses):
    flash_attn_func(*draw())
    assert misses == ["launch"]
    for _ in range(2):
        WITHOUT_KEY[name](*draw())
    assert misses == ["launch", "op", "op"]


@pytest.mark.parametrize("name", {**COPIES, **UNKNOWN})
def test_a_call_is_planned_once(name, on_fake_driver, misses, monkeypatch):
    plans, plan = [], hopper.plan
    monkeypatch.setattr(hopper, "plan", lambda *args: plans.append(1) or plan(*args))
    for _ in range(3):
        (COPIES | UNKNOWN)[name](*draw())
    assert len(misses) == len(plans) == 3


def test_a_profiler_sees_the_name_of_the_op(on_fake_driver, misses):
    flash_attn_func(*draw())
    with torch.profiler.profile() as profile:
        flash_attn_func(*draw())
    assert len(misses) == 1
    assert "flash8::forward" in {event.name for event in profile.events()}


def test_a_pending_negation_is_a_miss(on_fake_driver, misses):
    q, k, v = draw()
    for _ in range(2):
        flash_attn_func(q, k, v)
    flash_attn_func(torch._neg_view(q), k, v)
    assert len(misses) == 2


def test_parameters_and_no_other_subclass_are_hits(on_fake_driver, misses):
    q, k, v = draw()
    sinks = torch.zeros(4)
    flash_attn_func(q, k, v, s_aux=sinks)
    with torch.no_grad():
        flash_attn_func(q, k, v, s_aux=torch.nn.Parameter(sinks))
    assert len(misses) == 1
    flash_attn_func(q, k, v, s_aux=sinks.as_subclass(Named))
    assert len(misses) == 2


class Named(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
def test_a_plan_is_kept_for_no_call_that_it_did_not_serve(fake, on_fake_driver):
    """Splits have no kernel; what lies at its output was filled by one before."""
    q, k, v = draw()
    out = torch.empty_like(q)
    ops.run_forward(q, k, v, None, None, out, Options())
    for _ in range(2):
        flash_attn_func(q, k, v, num_splits=2, out=out)
    assert len(fake.launches) == 1


def test_the_seed_of_dropout_is_an_argument(fake, on_fake_driver, misses):
    q, k, v = draw()
    seeds = [torch.tensor([n]) for n in range(3)]
    for seed in seeds:
        flash_attn_func(q, k, v, dropout_p=0.1, dropout_seed=seed)
    given = [addresses(fake.parameter(i), "dropout")[0] for i in range(3)]
    assert given == [seed.data_ptr() for seed in seeds]
    assert len(misses) == 1
    flash_attn_func(q, k, v, dropout_p=0.2, dropout_seed=seeds[0])
    flash_attn_func(q, k, v)
    assert len(misses) == 3


def test_a_seed_that_is_drawn_is_drawn_for_every_launch(fake, on_fake_driver, misses):
    q, k, v = draw()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    flash_attn_func(q, k, v, dropout_p=0.1)
    flash_attn_func(q, k, v, dropout_p=0.1)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(2):
        draw_seed(q.device)
    assert torch.equal(after, torch.get_rng_state())
    torch.set_rng_state(state)
    assert len(misses) == 1 and len(fake.launches) == 2


def test_a_launch_that_fails_leaves_nothing_behind(fake, on_fake_driver, misses):
    q, k, v = draw()
    flash_attn_func(q, k, v, causal=True)
    held = [sys.getrefcount(x) for x in (q, k, v)]
    fake.fail("cuLaunchKernelEx", 2)
    for _ in range(3):
        with pytest.raises(_native.DriverError, match="OUT_OF_MEMORY"):
            flash_attn_func(q, k, v, causal=True)
    fake.fail("cuLaunchKernelEx", 0)
    flash_attn_func(q, k, v, causal=True)
    assert len(misses) == 1 and fake.context_depth == 0
    assert held == [sys.getrefcount(x) for x in (q, k, v)]


def test_threads_may_call_at_once(fake, on_fake_driver, misses):
    def call(thread):
        q, k, v = draw(rows=40 + thread % 2)
        outs = [flash_attn_func(q, k, v, causal=True) for _ in range(200)]
        return {(q.data_ptr(), out.data_ptr()) for out in outs}

    for thread in range(2):
        flash_attn_func(*draw(rows=40 + thread), causal=True)
    with ThreadPoolExecutor(4) as pool:
        wanted = set().union(*pool.map(call, range(4)))
    launched = [fake.parameter(i) for i in range(2, len(fake.launches))]
    assert len(launched) == 800 and len(misses) == 2
    assert wanted <= {tuple(addresses(parameters, "q", "o")) for parameters in launched}


@pytest.mark.parametrize("grad", [False, True])
def test_calls_leak_nothing(grad, fake, on_fake_driver):
    fake.record(False)
    tensors = [x.requires_grad_(grad) for x in draw()]
    sinks = torch.zeros(4, requires_grad=grad)
    held = (*tensors, sinks)

    def calls(count):
        for _ in range(count):
            flash_attn_func(*tensors, causal=True, s_aux=sinks)
        gc.collect()
        return [sys.getrefcount(x) for x in held], resident_bytes()

    calls(2_000)
    references, before = calls(2_000)
    again, after = calls(30_000 if grad else 100_000)
    assert references == again
    assert after - before < 1 << 20


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


SERVED = ["causal", "packed", "strided", "sinks", "sinks in bf16", "used", "output", "scaled"]


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("name", by_default([*SERVED, "slopes"], SERVED))
def test_a_hit_gives_the_results_of_a_miss(name, on_simulated_device, misses):
    first, second = draw(0), draw(1)
    CALLS[name](*first)
    got = CALLS[name](*second)
    assert len(misses) == 1
    clear()
    want = CALLS[name](*second)
    assert len(misses) == 2
    assert torch.equal(got, want) and math.isfinite(got.float().sum())

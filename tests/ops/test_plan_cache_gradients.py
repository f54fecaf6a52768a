"""Gradients through the plan cache: a launch does not wait for autograd, which sees it all."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flash8 import flash_attn_func, flash_attn_varlen_func
from flash8.call.options import Options
from flash8.ops import backward_plans
from plan_cache_cases import ENDS, clear, draw
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


def leaves(seed=0, sinks_dtype=torch.float32):
    q, k, v = draw(seed, rows=12, batch=1)
    sinks = torch.linspace(-1.0, 2.0, 4).to(sinks_dtype)
    return [x.requires_grad_() for x in (q, k, v, sinks)]


def attend(q, k, v, sinks, **options):
    return flash_attn_func(q, k, v, causal=True, s_aux=sinks, **options)


def packed(q, k, v, sinks, **options):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    return flash_attn_varlen_func(q, k, v, ends, ends, 7, 7, causal=True, s_aux=sinks, **options)


def hit_and_miss(misses, make):
    """What `make` gives as a hit and as a miss, after a call with its key."""
    make()
    seen = len(misses)
    short = make()
    assert len(misses) == seen
    clear()
    whole = make()
    assert len(misses) > seen
    return short, whole


def assert_equal(short, whole):
    assert len(short) == len(whole)
    for a, b in zip(short, whole, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("call", [attend, packed])
@pytest.mark.parametrize("sinks_dtype", [torch.float32, torch.bfloat16])
def test_a_hit_has_the_gradients_of_a_miss(call, sinks_dtype, on_simulated_device, misses):
    def make():
        inputs = leaves(1, sinks_dtype)
        out, lse = call(*inputs, return_attn_probs=True)
        assert out.grad_fn is not None and lse.requires_grad
        (out.float().square().sum() + lse.sin().sum()).backward()
        return [out, lse, *(x.grad for x in inputs)]

    assert_equal(*hit_and_miss(misses, make))


@needs_compiler
def test_gradients_of_some_inputs_through_one_output(on_simulated_device, misses):
    def make():
        q, k, v, sinks = leaves(2)
        k = k.detach()
        out, lse = attend(q, k, v, sinks, return_attn_probs=True)
        by_lse = torch.autograd.grad(lse.sum(), [q, sinks], retain_graph=True)
        by_out = torch.autograd.grad(out.float().sum(), [q, v])
        return [*by_lse, *by_out]

    assert_equal(*hit_and_miss(misses, make))


@needs_compiler
def test_hooks_are_called(on_simulated_device, misses):
    def make():
        inputs, seen = leaves(3), []
        inputs[0].register_hook(lambda grad: 2 * grad)
        out = attend(*inputs)
        out.register_hook(seen.append)
        out.float().sum().backward()
        assert len(seen) == 1
        return [seen[0], *(x.grad for x in inputs)]

    assert_equal(*hit_and_miss(misses, make))


@needs_compiler
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_run_it_again(use_reentrant, on_simulated_device, misses):
    def make():
        inputs = leaves(4)
        out = checkpoint(attend, *inputs, use_reentrant=use_reentrant)
        out.float().square().sum().backward()
        return [out, *(x.grad for x in inputs)]

    assert_equal(*hit_and_miss(misses, make))


@needs_compiler
def test_saved_tensors_may_be_packed(on_simulated_device, misses):
    def make():
        inputs, packed = leaves(5), []
        pack = lambda x: packed.append(x) or len(packed) - 1  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
            out = attend(*inputs)
        saved = len(packed)
        out.float().sum().backward()
        return [torch.tensor(saved), *(x.grad for x in inputs)]

    assert_equal(*hit_and_miss(misses, make))


@pytest.fixture
def inputs(on_fake_driver, misses):
    """Of calls that are hits, on a driver that does nothing."""
    attend(*leaves())
    yield leaves()
    assert len(misses) == 1


def test_what_changes_before_the_backward_is_an_error(inputs):
    q, k, v, sinks = inputs
    out = attend(q, k * 1, (changed := v * 1), sinks)
    changed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = attend(*inputs)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_there_is_no_second_order(inputs):
    out = attend(*inputs)
    first = torch.autograd.grad(out.float().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        first.float().sum().backward()


def test_a_graph_runs_once_unless_it_is_kept(inputs):
    out = attend(*inputs)
    out.float().sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.float().sum().backward()


def test_nothing_is_recorded_without_gradients(inputs):
    with torch.no_grad():
        assert attend(*inputs).grad_fn is None
    with torch.inference_mode():
        assert attend(*inputs).is_inference()
    assert attend(*(x.detach() for x in inputs)).grad_fn is None


def test_a_plan_made_without_gradients_serves_with_them(on_fake_driver, misses):
    with torch.inference_mode():
        attend(*leaves())
    out, lse = attend(*leaves(), return_attn_probs=True)
    assert not out.is_inference() and not lse.is_inference()
    (out.float().sum() + lse.sum()).backward()
    assert len(misses) == 1


def test_raw_float8_has_no_backward(on_fake_driver, misses):
    for _ in range(2):
        q, k, v = (x.to(torch.float8_e4m3fn) for x in draw())
        out = flash_attn_func(q.requires_grad_(), k, v)
        with pytest.raises(ValueError, match=r"call flash8\.fp8_attention"):
            out.float().sum().backward()
    assert len(misses) == 1


def test_options_reach_the_backward(on_fake_driver, misses, monkeypatch):
    """As a miss hands them on, checked, with the tensors of this call."""
    seen, at = [], Options._fields.index("cu_seqlens_q")
    backward = torch.ops.flash8.backward
    monkeypatch.setattr(
        torch.ops.flash8, "backward", lambda *args: seen.append(args[9:]) or backward(*args)
    )
    q, k, v = (x.flatten(0, 1).requires_grad_() for x in draw())
    for _ in range(2):
        backward_plans.cache().clear()  # of which neither may be a hit
        ends = ENDS.clone()
        out = flash_attn_varlen_func(
            q, k, v, ends, ends, 67, 67, softmax_scale=1, causal=True, num_splits=0
        )
        out.float().sum().backward()
        assert seen[-1][at].data_ptr() == ends.data_ptr()
    assert len(misses) == 1
    without_tensors = [[x for x in options if not isinstance(x, torch.Tensor)] for options in seen]
    assert without_tensors[0] == without_tensors[1]
    assert [type(x) for x in without_tensors[0]] == [type(x) for x in without_tensors[1]]

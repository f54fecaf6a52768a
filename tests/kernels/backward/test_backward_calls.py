"""Gradients of the public functions, through autograd, on the kernels of the simulated device.

Outputs and workspace have guards. What is compared with what: FA3's rule against float64, as for
the CPU backend (`cases.check_backward`).
"""

import functools
import warnings
from contextlib import contextmanager

import pytest
import torch

import flash8
from cases import Case, as_leaves, build, check_backward, gradients, run_flash8, upstream
from defaults import by_default
from flash8 import fp8
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import mode
from forward_cases import device
from simulated_device import missing_compiler
from tolerances import rel_l2

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16 = torch.bfloat16, torch.float16
WIDE = Case((150, 150), (203, 203), heads=4, heads_kv=2, head_dim=128, head_dim_v=128, dtype=BF16)
CAUSAL = WIDE.with_(causal=True)
NARROW = WIDE.with_(seqlens_q=(170,), seqlens_k=(140,), heads=2, head_dim=64, head_dim_v=64)
PACKED = CAUSAL.with_(
    seqlens_q=(70, 0, 130, 1), seqlens_k=(90, 33, 130, 0), layout="packed", tail=5, poison=True
)
USED = {"unused_q": (3, 0, 129, 1), "unused_k": (90, 2, 0, 0)}
CASES = {
    "causal": CAUSAL.with_(sink=True),
    "causal, more queries than keys": CAUSAL.with_(seqlens_q=(203,), seqlens_k=(150,)),
    "packed": PACKED.with_(sink=True),
    "packed, used lengths": PACKED.with_(**USED, heads=4, heads_kv=1),
    "dense, used lengths": CAUSAL.with_(unused_q=(150, 7), unused_k=(3, 203), poison=True),
    "one row": CAUSAL.with_(seqlens_q=(1,), seqlens_k=(1,), heads=1, heads_kv=1),
    "head_dim 80 and 72": CAUSAL.with_(
        head_dim=80, head_dim_v=72, seqlens_q=(70,), seqlens_k=(90,)
    ),
    "another scale": CAUSAL.with_(softmax_scale=0.03, spread=3.0),
    "192 and 128 channels": CAUSAL.with_(head_dim=192),
    "256 channels": CAUSAL.with_(head_dim=256, head_dim_v=256, seqlens_q=(70,), seqlens_k=(90,)),
    "full": WIDE,
    "fp16, window": NARROW.with_(dtype=FP16, window_size=(37, 21), heads_kv=1),
    "fp16, chunks": NARROW.with_(dtype=FP16, attention_chunk=64, sink=True, heads_kv=1),
    "softcap": NARROW.with_(dtype=FP16, softcap=3.0),
    "ALiBi": NARROW.with_(alibi="h", sink=True),
    "everything": NARROW.with_(
        alibi="h", softcap=3.0, sink=True, window_size=(37, 21), unused_k=(9,)
    ),
}
DEFAULT = [
    *("causal", "causal, more queries than keys", "packed", "packed, used lengths"),
    *("dense, used lengths", "one row", "another scale"),
]


@contextmanager
def served(monkeypatch, *, seed: int = 0, times: int = 1):
    """Inside, kernels serve; so many backwards have to be launched."""
    seen = []
    with device().serving_cpu_tensors(monkeypatch, seed=seed), monkeypatch.context() as patch:
        launch = hopper.launch
        patch.setattr(hopper, "launch", lambda *args: seen.append(1) or launch(*args))
        yield
    assert len(seen) == times


@pytest.mark.parametrize("name", by_default(CASES, DEFAULT))
def test_gradients(name, monkeypatch):
    problem = build(CASES[name])
    d_out, d_lse = upstream(problem)
    with served(monkeypatch, seed=3):
        found = gradients(as_leaves(problem), run_flash8, d_out, d_lse)
    check_backward(problem, found=found)


def test_one_output_of_two(monkeypatch):
    problem = build(CAUSAL)
    d_out, d_lse = upstream(problem)
    with served(monkeypatch, times=2):
        found = gradients(as_leaves(problem), run_flash8, d_out, None)
        leaves = as_leaves(problem)
        lse = run_flash8(leaves)[1]
        dq, dk = torch.autograd.grad(lse, [leaves.q, leaves.k], d_lse)
    check_backward(problem, with_lse=False, found=found)
    both = {"q": dq, "k": dk, "v": torch.zeros_like(problem.v)}
    zero = torch.zeros_like(d_out)
    want = gradients(as_leaves(problem), run_flash8, zero, d_lse)
    for name, x in both.items():
        assert rel_l2(x, want[name].double()) < 6e-3 or not want[name].any()


def attend(q, k, v, **options):
    return flash8.flash_attn_func(q, k, v, causal=True, **options)


def grads(call, tensors, weight=None):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out) if weight is None else weight)


def same(found, want):
    """Of equal values: dQ is added up in any order, the rest in one."""
    for x, y in zip(found[1:], want[1:], strict=True):
        assert torch.equal(x, y)
    assert rel_l2(found[0], want[0].double()) < 1e-3


@functools.cache
def drawn():
    g = torch.Generator().manual_seed(7)
    shapes = ((2, 70, 4, 128), (2, 90, 2, 128), (2, 90, 2, 128), (2, 70, 4, 128))
    return [torch.randn(shape, generator=g).to(BF16) for shape in shapes]


def test_what_tma_cannot_read_is_copied(monkeypatch):
    """Expanded gradients of O, channels that lie apart, addresses between units."""
    q, k, v, dout = drawn()
    with served(monkeypatch, times=4):
        want = grads(attend, (q, k, v))
        out = attend(*(leaves := [x.clone().requires_grad_() for x in (q, k, v)]))
        out.sum().backward()  # whose gradient is expanded
        same([x.grad for x in leaves], want)
        want = grads(attend, (q, k, v), dout)
        spread = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
        same(grads(attend, (q, k, v), spread), want)


def test_expanded_heads_collect_their_gradients(monkeypatch):
    q, k, v, dout = drawn()
    k, v = k[:, :, :1], v[:, :, :1]

    def expanded(q, k, v):
        return attend(q, k.expand(-1, -1, 4, -1), v.expand(-1, -1, 4, -1))

    with served(monkeypatch, times=2):
        found = grads(expanded, (q, k, v), dout)
        grouped = grads(attend, (q, k, v), dout)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]
    for x, y in zip(found, grouped, strict=True):
        assert rel_l2(x, y.double()) < 6e-3  # a sum over heads, rounded four times and not once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_of_any_type(dtype, monkeypatch):
    q, k, v, dout = drawn()
    sinks = torch.tensor([0.5, -1.0, 3.0, 9.0])
    call = functools.partial(flash8.flash_attn_func, causal=True)
    want = grads(lambda *x: call(*x[:3], s_aux=x[3]), (q, k, v, sinks), dout)
    with served(monkeypatch):
        found = grads(lambda *x: call(*x[:3], s_aux=x[3]), (q, k, v, sinks.to(dtype)), dout)
    assert found[3].dtype == dtype
    assert rel_l2(found[3], want[3].double()) < 2e-2


@pytest.mark.slow
def test_deterministic_calls_have_equal_bits(monkeypatch):
    q, k, v, dout = drawn()
    k, v = (x.repeat(1, 5, 1, 1) for x in (k, v))
    call = functools.partial(attend, deterministic=True)
    found = []
    for seed in range(3):
        with served(monkeypatch, seed=seed):
            found.append(grads(call, (q, k, v), dout))
        assert hopper.choose(
            q, k, v, flash8.call.options.Options(window_right=0, deterministic=True)
        ).deterministic
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


@pytest.mark.slow
def test_a_16_bit_backward_of_an_fp8_forward(monkeypatch):
    q, k, v, dout = drawn()

    def call(*x):
        return fp8.fp8_attention(*x, fp8.CurrentScaling(), causal=True)

    with warnings.catch_warnings(action="ignore"):
        want = grads(call, (q, k, v), dout)
        with served(monkeypatch):
            found = grads(call, (q, k, v), dout)
    for x, y in zip(found, want, strict=True):
        assert rel_l2(x, y.double()) < 3e-2  # O and LSE of another order of sums in FP8


@pytest.mark.parametrize("empty", ["queries", "keys", "batch"])
def test_nothing_to_attend_from_or_to(empty, monkeypatch):
    rows_q, rows_k = (0 if empty == "queries" else 40), (0 if empty == "keys" else 50)
    batch = 0 if empty == "batch" else 2
    q, dout = (torch.randn(batch, rows_q, 2, 128).to(BF16) for _ in range(2))
    k, v = (torch.randn(batch, rows_k, 1, 128).to(BF16) for _ in range(2))
    sinks = torch.ones(2)
    with served(monkeypatch):
        found = grads(lambda *x: attend(*x[:3], s_aux=x[3]), (q, k, v, sinks), dout)
    for x, like in zip(found, (q, k, v, sinks), strict=True):
        assert x.shape == like.shape and not x.any()


#: The smallest step of a store.
STEPS = {"dq": 16, "dk": 16, "dv": 16, "dsinks": 4, "row_stats": 128, "dsinks_partial": 128}
#: Of the workspace, whose parts lie behind each other, and which the kernels read again.
ENDS = {("row_stats", 1), ("dsinks_partial", -1)}
BESIDE = [(name, side) for name in STEPS for side in (-1, 1) if (name, side) not in ENDS]


@pytest.mark.parametrize(("name", "side"), BESIDE)
def test_a_store_beside_an_output_is_found(name, side, monkeypatch):
    launch = hopper.launch

    def moved(planned, stream):
        given = getattr(planned.call, name)
        at = (given if isinstance(given, int) else given[0]) + side * STEPS[name]
        setattr(planned.call, name, at if isinstance(given, int) else (at, *given[1:]))
        launch(planned, stream)

    q, k, v, dout = (x[:1, :20] for x in drawn())
    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(hopper, "launch", moved)
        with pytest.raises(AssertionError, match="beside"):
            grads(lambda *x: attend(*x[:3], s_aux=x[3]), (q, k, v, torch.ones(4)), dout)


# -------------------------------------------------------------- what the portable code serves


REFUSED = {
    "head_dim is 264": CAUSAL.with_(head_dim=264),
    "head_dim_v is 132": CAUSAL.with_(head_dim_v=132),
    "no backward kernel for torch.float32 q": CAUSAL.with_(dtype=torch.float32),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_kernel_is_served_anyway(reason, monkeypatch):
    case = REFUSED[reason]
    problem = build(case.with_(seqlens_q=(20,), seqlens_k=(30,)))
    d_out, d_lse = upstream(problem)
    with (
        served(monkeypatch, times=0),
        warnings.catch_warnings(action="ignore"),
    ):
        found = gradients(as_leaves(problem), run_flash8, d_out, d_lse)
        nothing = flash8.call.options.Options()
        assert reason in str(hopper.refusal(problem.q, problem.k, problem.v, None, nothing))
    check_backward(problem, found=found)


@pytest.mark.parametrize(
    "name", ["page_table", "leftpad_k", "kv_batch_idx", "k_descale", "v_mean", "v_channel_descale"]
)
def test_options_that_no_backward_kernel_has(name):
    q, k, v, _ = drawn()
    given = flash8.call.options.Options(**{name: torch.zeros(1)})
    assert f"{name} has no backward kernel yet" in str(hopper.refusal(q, k, v, None, given))
    assert "qv has no" in str(hopper.refusal(q, k, v, q, flash8.call.options.Options()))


def test_a_required_kernel_that_there_is_not_is_an_error(monkeypatch):
    leaves = [torch.randn(1, 20, 1, 264).to(BF16).requires_grad_() for _ in range(3)]
    out = attend(*leaves)
    with device().serving_cpu_tensors(monkeypatch):
        monkeypatch.setattr(mode, "kernels_mode", lambda: "require")
        with pytest.raises(mode.KernelRequiredError, match="backward kernels take multiples of 8"):
            out.sum().backward()

"""A store beside an output is found out by its guards, in every harness that launches kernels."""

import functools

import pytest
import torch

import flash8
from cases import int32
from flash8 import _native, fp8, gemm
from flash8.backends.hopper import append as appender
from flash8.backends.hopper.quantize_variants import SHIPPED_QUANTIZERS
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import trust
from flash8.call.request import Appended, Queries
from flash8.tensors.float8 import E4M3
from flash8.tensors.rotary import Rope
from forward_cases import device, draw, kernel, launch
from forward_launch import Call, Schedule
from fp8_forward_cases import changed_kernel
from quantizer_device import device as quantizer_device
from quantizer_device import kernels
from simulated_device import missing_compiler

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel"),
]

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal")
#: The smallest step of a store: LSE goes by elements, O and data by 16 bytes.
STEPS = {
    "o": 16,
    "lse": 4,
    "out_scale": 4,
    "out": 16,
    "descale": 4,
    "mean": 16,
    "mean_partial": 4,
    "amax": 4,
    "lengths": 4,
}
BOTH_SIDES = pytest.mark.parametrize("side", [-1, 1], ids=["before", "behind"])
#: Whoever is first to find it: the comparison, or the simulated device where it knows the bounds.
FOUND = pytest.raises((AssertionError, _native.DriverError), match=r"beside|ILLEGAL_ADDRESS")


def moved(monkeypatch, entry: str, name: str, side: int) -> None:
    """Kernels get an output's address one step beside where it is."""
    original = getattr(_native, entry)

    def launch(kernel, device, stream, params, *rest, **options):
        *outer, field = name.split(".")
        holder = functools.reduce(getattr, outer, params)
        given = getattr(holder, field)
        refers = given if isinstance(given, int) else given[0]
        if refers:
            at = refers + side * STEPS[field]
            setattr(holder, field, at if isinstance(given, int) else (at, *given[1:]))
        original(kernel, device, stream, params, *rest, **options)
        setattr(holder, field, given)

    monkeypatch.setattr(_native, entry, launch)


def forward_call(batch: int = 2, heads: int = 2) -> Call:
    q, k, v = draw(CAUSAL, 40, 70, heads, 1, batch=batch)
    return Call(q, k, v, 128**-0.5, causal=True)


@BOTH_SIDES
@pytest.mark.parametrize("name", ["o", "lse"])
def test_forward_in_memory_of_the_device(monkeypatch, name, side):
    launch(CAUSAL, forward_call())
    moved(monkeypatch, "launch_forward", name, side)
    with pytest.raises(AssertionError, match="beside"):
        launch(CAUSAL, forward_call())


@BOTH_SIDES
@pytest.mark.parametrize("name", ["o", "lse"])
def test_forward_on_cpu_tensors(monkeypatch, name, side):
    call = forward_call()
    moved(monkeypatch, "launch_forward", name, side)
    beside = pytest.raises(AssertionError, match="beside")
    with device().serving_cpu_tensors(monkeypatch), beside:
        flash8.flash_attn_func(call.q, call.k, call.v, causal=True)


def test_forward_between_rows_of_out(monkeypatch):
    """Where `out` is every other head of a tensor, the heads between are not its own."""
    call = forward_call()
    out = torch.zeros(2, 40, 4, 128, dtype=torch.bfloat16)
    moved(monkeypatch, "launch_forward", "o", 1)
    beside = pytest.raises(AssertionError, match="beside")
    with device().serving_cpu_tensors(monkeypatch), beside:
        flash8.flash_attn_func(call.q, call.k, call.v, causal=True, out=out[:, :, ::2])


@BOTH_SIDES
@pytest.mark.parametrize("name", ["o", "out_scale"])
def test_forward_into_e4m3(monkeypatch, name, side):
    call = forward_call()
    moved(monkeypatch, "launch_forward", name, side)
    beside = pytest.raises(AssertionError, match="beside")
    with device().serving_cpu_tensors(monkeypatch), beside:
        gemm.quantize_attention(call.q, call.k, call.v, causal=True, pack_gqa=False)


QUANTIZED = {
    "out": ("block", {}),
    "descale": ("block", {}),
    "amax": ("head", {}),
    "mean": ("block", {"smooth_k": True}),
    "mean_partial": ("block", {"smooth_k": True}),
}


@BOTH_SIDES
@pytest.mark.parametrize("strict", [False, True], ids=["cpu tensors", "known memory"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizer(monkeypatch, name, strict, side):
    granularity, options = QUANTIZED[name]
    x = torch.randn(2, 40, 2, 64).bfloat16()
    moved(monkeypatch, "launch_quantize", name, side)
    serving = quantizer_device().serving_cpu_tensors(monkeypatch)
    with FOUND, kernels(monkeypatch, x) if strict else serving:
        fp8.quantize(x, granularity, **options)


@BOTH_SIDES
@pytest.mark.parametrize("strict", [False, True], ids=["cpu tensors", "known memory"])
@pytest.mark.parametrize("name", ["k.out", "q.out", "lengths"])
def test_append(monkeypatch, name, strict, side):
    cache = torch.zeros(2, 20, 2, 64).to(E4M3)
    x, starts = torch.randn(2, 20, 2, 64).bfloat16(), int32((0, 0))
    tables = torch.ones(20, 16)
    queries = Queries(x.clone(), Rope(tables, tables, starts))
    moved(monkeypatch, "launch_append", name, side)
    serving = quantizer_device().serving_cpu_tensors(monkeypatch)
    known = (x, queries.x, tables, cache, starts)
    with FOUND, kernels(monkeypatch, *known) if strict else serving:
        appender.append(Appended(cache, x, starts), queries=queries)


@pytest.fixture
def known(monkeypatch):
    """Addresses that the device knows. Left there they would be another tensor's by the next call,
    and a store there would pass."""
    found = set()
    simulated = type(quantizer_device())
    monkeypatch.setattr(simulated, "register", lambda _, x: found.add(x.data_ptr()))
    monkeypatch.setattr(simulated, "unregister", lambda _, x: found.discard(x.data_ptr()))
    return found


def test_a_quantizer_that_is_verified_leaves_no_memory_known(monkeypatch, known):
    with device().serving_cpu_tensors(monkeypatch):
        assert trust.find_fault(SHIPPED_QUANTIZERS[0], torch.device("cpu")) is None
        assert known
    assert not known


@pytest.mark.parametrize("name", ["launch_forward", "launch_quantize"])
def test_a_refused_launch_leaves_no_memory_known(monkeypatch, known, name):
    def refuse(*_, **__):
        assert known
        raise _native.DriverError("refused")

    monkeypatch.setattr(_native, name, refuse)
    call, x = forward_call(), torch.randn(2, 40, 2, 64).bfloat16()
    with device().serving_cpu_tensors(monkeypatch):
        attend = functools.partial(flash8.flash_attn_func, call.q, call.k, call.v)
        run = attend if name == "launch_forward" else functools.partial(fp8.quantize, x, "block")
        with pytest.raises(_native.DriverError, match="refused"):
            run()
    assert not known


KERNELS = {
    "a row more": (
        "forward/epilogue.cuh",
        "bool const inside = rows[r].query < info.rows_q;",
        "bool const inside = rows[r].query <= info.rows_q;",
    ),
    "LSE from the row before": (
        "forward/epilogue.cuh",
        "params.lse.head_stride + target]",
        "params.lse.head_stride + target - 1]",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", KERNELS)
def test_a_kernel_that_writes_beside(tmp_path, fault):
    """By one row: that of another head would be a race."""
    changed = changed_kernel(tmp_path, CAUSAL, KERNELS[fault])
    call = forward_call(1, 1)
    kernel(CAUSAL)(call, Schedule())
    with pytest.raises(AssertionError, match="beside"):
        changed(call, Schedule())

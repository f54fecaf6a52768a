"""Microseconds of CPU time per call, from the public function to the launch, against a driver that
does nothing.

What is left is flash8's own cost: argument conversion, checks, outputs, tensor maps, the context,
the launch structure. On a GPU the driver's own time comes on top. Every call is a hit of the plan
cache except the first of its kind. Calls with gradients are timed with and without the node for
autograd, which is built after the launch. Beside them the same of torch's SDPA for one query and
one key on a CPU, kernel included.

A backward is timed from where autograd enters the node until its three launches are made, and as
torch.autograd.grad runs it, beside a node that does nothing. Writes bench/results/launch.json.

usage: PYTHONPATH=tests/support python bench/bench_launch.py    (the driver is that of the tests)
"""

import json
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import environment
from fake_driver import control
from fake_driver.cubin import any_cubin
from flash8 import (
    _native,
    backends,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    fp8,
    gemm,
)
from flash8.backends.hopper import kernels, mode
from flash8.ops import autograd, backward_plans, decode_plans, gemm_plans, plan_cache

RESULTS = Path(__file__).resolve().parent / "results"
REPEAT, NUMBER = 40, 1_000
WIDTH = 128
Calls = dict[str, Callable[[], object]]


def microseconds(call: Callable[[], object]) -> float:
    """CPU time of the best of several runs: the others were disturbed."""
    call()
    times = timeit.repeat(call, repeat=REPEAT, number=NUMBER, timer=time.process_time)
    return min(times) / NUMBER * 1e6


@contextmanager
def kernels_on_a_fake_driver() -> Iterator[None]:
    """CPU tensors take the Hopper backend, as CUDA tensors do, and nothing runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = control.build(Path(folder))
        fake = control.FakeDriver(path)
        fake.reset()
        fake.record(False)
        registry = _native.Registry(_native.Driver(str(path)), any_cubin)
        with (
            replaced(backends, "kernels_wanted", wanted_as_on_a_gpu),
            replaced(mode, "kernels_mode", lambda: "on"),
            replaced(mode, "_served", {-1: True}),  # the number of the CPU
            replaced(kernels, "registry", lambda: registry),
        ):
            yield


def wanted_as_on_a_gpu(tensor: torch.Tensor) -> bool:
    """`backends.kernels_wanted` of a CUDA tensor, at the same cost."""
    return not tensor.is_cuda and mode.has_kernels(tensor.get_device())


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


class NoNode:
    """In the place of `flash8.ops.autograd.Launched`: what comes before it is what is timed."""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return arguments[4]


class Idle(torch.autograd.Function):
    """Saves what a node of attention saves, and has its gradients already."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, out: Any, gradients: Any) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *out)
        ctx.gradients = gradients
        return out[0].clone()

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        _ = ctx.saved_tensors
        return (*ctx.gradients, None, None)


def draw() -> list[torch.Tensor]:
    return [torch.randn(2, 64, heads, WIDTH).bfloat16() for heads in (8, 2, 2)]


def calls_in_16_bits() -> Calls:
    q, k, v = draw()
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    ends = torch.tensor([0, 64, 128], dtype=torch.int32)
    used = torch.tensor([40, 64], dtype=torch.int32)
    per_head, out = torch.ones(8), torch.empty_like(q)
    rounded = per_head.bfloat16()

    def first_of_its_kind() -> object:
        plan_cache._plan_cache().clear()
        return flash_attn_func(q, k, v, causal=True)

    return {
        "dense": lambda: flash_attn_func(q, k, v, causal=True),
        "dense, LSE returned": lambda: flash_attn_func(
            q, k, v, causal=True, return_attn_probs=True
        ),
        "dense, out=": lambda: flash_attn_func(q, k, v, causal=True, out=out),
        "dense, s_aux": lambda: flash_attn_func(q, k, v, causal=True, s_aux=per_head),
        "dense, s_aux in bf16": lambda: flash_attn_func(q, k, v, causal=True, s_aux=rounded),
        "dense, alibi_slopes": lambda: flash_attn_func(q, k, v, causal=True, alibi_slopes=per_head),
        "dense, seqused": lambda: flash_attn_varlen_func(
            q, k, v, None, None, None, None, used, used, causal=True
        ),
        "varlen": lambda: flash_attn_varlen_func(*packed, ends, ends, 64, 64, causal=True),
        "varlen, seqused, s_aux": lambda: flash_attn_varlen_func(
            *packed, ends, ends, 64, 64, used, used, causal=True, s_aux=per_head
        ),
        "dense, first of its kind": first_of_its_kind,
    }


def calls_in_8_bits() -> Calls:
    bf16 = draw()
    q, k, v = (x.to(torch.float8_e4m3fn) for x in bf16)
    factors = {
        "tensor": [torch.ones(())] * 3,
        "head": [torch.ones(2, 2)] * 3,
        "block": [torch.ones(2, 8, 1), torch.ones(2, 2, 1), torch.ones(2, 2, 1)],
    }
    mean = torch.zeros(2, WIDTH)

    def call(granularity: str, **means: torch.Tensor) -> Callable[[], object]:
        descales = factors[granularity]
        return lambda: flash_attn_func(q, k, v, None, True, None, *descales, **means)

    rotated = [fp8.quantize(x, hadamard=1) for x in bf16[:2]]
    scaled = [*rotated, fp8.quantize(bf16[2])]
    v_colmajor = [*rotated, fp8.quantize(bf16[2], v_colmajor=True)]
    return {
        **{f"e4m3, descales by {name}": call(name) for name in factors},
        "e4m3, descales by head, k_mean, v_mean": call("head", k_mean=mean, v_mean=mean),
        "e4m3, ScaledTensors": lambda: flash_attn_func(*scaled, causal=True),
        "e4m3, ScaledTensors, v_colmajor": lambda: flash_attn_func(*v_colmajor, causal=True),
    }


def calls_over_a_cache() -> Calls:
    q = torch.randn(2, 1, 8, WIDTH).bfloat16()
    k, v = (torch.randn(9, 16, 2, WIDTH).bfloat16() for _ in "kv")
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    lengths = torch.tensor([40, 64], dtype=torch.int32)
    e4m3 = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    descales = {f"{x}_descale": torch.ones(2, 2) for x in "kv"}
    dense = k[:2], v[:2]
    new = [torch.randn(2, 1, 2, WIDTH).bfloat16() for _ in "kv"]
    many = torch.randn(2, 64, 8, WIDTH).bfloat16()
    ends, many_ends = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (1, 64))
    cos, sin = (torch.randn(72, WIDTH // 2).bfloat16() for _ in "cs")
    paged = {"page_table": table, "cache_seqlens": lengths, "causal": True}

    def first_of_its_kind() -> object:
        decode_plans.cache().clear()
        return flash_attn_with_kvcache(q, k, v, **paged)

    return {
        "cache, dense": lambda: flash_attn_with_kvcache(
            q, *dense, cache_seqlens=lengths, causal=True
        ),
        "cache, paged": lambda: flash_attn_with_kvcache(
            q, k, v, page_table=table, cache_seqlens=lengths, causal=True
        ),
        "cache, paged, LSE returned": lambda: flash_attn_with_kvcache(
            q,
            k,
            v,
            page_table=table,
            cache_seqlens=lengths,
            causal=True,
            return_softmax_lse=True,
        ),
        "cache, paged, new keys": lambda: flash_attn_with_kvcache(
            q, k, v, *new, page_table=table, cache_seqlens=lengths, causal=True
        ),
        "cache, paged, new keys, rotary": lambda: flash_attn_with_kvcache(
            *(q, k, v, *new, None, cos, sin),
            page_table=table,
            cache_seqlens=lengths,
            causal=True,
        ),
        "varlen over pages": lambda: flash_attn_varlen_func(
            *(q.flatten(0, 1), k, v, ends, None, 1, 64),
            seqused_k=lengths,
            page_table=table,
            causal=True,
        ),
        "varlen over pages, prefill": lambda: flash_attn_varlen_func(
            *(many.flatten(0, 1), k, v, many_ends, None, 64, 64),
            seqused_k=lengths,
            page_table=table,
            causal=True,
        ),
        "cache, paged, e4m3": lambda: flash_attn_with_kvcache(q, *e4m3, **descales, **paged),
        "cache, paged, first of its kind": first_of_its_kind,
    }


def calls_of_products() -> Calls:
    a, b = (torch.randn(n, 512).to(torch.float8_e4m3fn) for n in (64, 256))
    b, one, bias = b.t(), torch.ones(1, 1), torch.ones(256).bfloat16()
    blocks = torch.ones(64, 4), torch.ones(4, 2)
    out = torch.empty(64, 256, dtype=torch.bfloat16)

    def first_of_its_kind() -> object:
        gemm_plans.cache().clear()
        return gemm.scaled_mm(a, b, one, one)

    experts = b.t().expand(4, 256, 512).contiguous().mT
    of_experts = torch.ones(64), torch.ones(4, 256)
    blocks_of_experts = blocks[0], torch.ones(4, 4, 2)
    ends = torch.tensor([16, 20, 20, 64], dtype=torch.int32)
    counts = torch.tensor([4, 0, 16, 16], dtype=torch.int32)
    along_k = torch.ones(4 * 64), torch.ones(4 * 256)
    apart, out_apart = a.view(4, 16, 512), out.view(4, 16, 256)

    return {
        "grouped_scaled_mm, scales by row": lambda: gemm.grouped_scaled_mm(
            a, experts, *of_experts, ends
        ),
        "grouped_scaled_mm, scales by blocks": lambda: gemm.grouped_scaled_mm(
            a, experts, *blocks_of_experts, ends
        ),
        "grouped_scaled_mm, apart, out=": lambda: gemm.grouped_scaled_mm(
            apart, experts, one, one, masked_m=counts, out=out_apart
        ),
        "grouped_scaled_mm, along K": lambda: gemm.grouped_scaled_mm(a, b, *along_k, ends),
        "scaled_mm, scales by tensor": lambda: gemm.scaled_mm(a, b, one, one),
        "scaled_mm, scales by blocks, bias": lambda: gemm.scaled_mm(a, b, *blocks, bias=bias),
        "scaled_mm, out=": lambda: gemm.scaled_mm(a, b, one, one, out=out),
        "scaled_mm, e4m3": lambda: gemm.scaled_mm(
            a, b, one, one, scale_result=one, out_dtype=torch.float8_e4m3fn
        ),
        "scaled_mm, torch's names": lambda: gemm.scaled_mm(
            input=a, mat2=b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        ),
        "scaled_mm, first of its kind": first_of_its_kind,
    }


def calls_with_gradients() -> Calls:
    q, k, v = (x.requires_grad_() for x in draw())
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, 64, 128], dtype=torch.int32)
    sinks = torch.nn.Parameter(torch.ones(8))
    return {
        "dense": lambda: flash_attn_func(q, k, v, causal=True),
        "dense, s_aux": lambda: flash_attn_func(q, k, v, causal=True, s_aux=sinks),
        "varlen": lambda: flash_attn_varlen_func(*packed, ends, ends, 64, 64, causal=True),
    }


def backwards() -> Calls:
    """Of nodes that stay, so that one forward serves all calls."""
    leaves = [x.requires_grad_() for x in draw()]
    packed = [x.detach().flatten(0, 1).requires_grad_() for x in leaves]
    ends = torch.tensor([0, 64, 128], dtype=torch.int32)
    out = flash_attn_func(*leaves, causal=True)
    out_packed = flash_attn_varlen_func(*packed, ends, ends, 64, 64, causal=True)
    in_order = flash_attn_func(*leaves, causal=True, deterministic=True)
    dout, dout_packed = torch.randn_like(out), torch.randn_like(out_packed)
    gradients = [torch.empty_like(x) for x in leaves]
    with torch.no_grad():
        outputs = flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    idle = Idle.apply(*leaves, outputs, gradients)
    workspace = torch.empty(1, dtype=torch.uint8).expand(1 << 20)

    def of_node(node: Any, given: torch.Tensor) -> Callable[[], object]:
        def launched() -> object:
            with torch.no_grad():
                return autograd.gradients(node, given, None)

        return launched

    def whole(found: torch.Tensor, given: torch.Tensor, of: Any) -> Callable[[], object]:
        return lambda: torch.autograd.grad(found, of, given, retain_graph=True)

    def first_of_its_kind() -> object:
        backward_plans.cache().clear()
        return of_node(out.grad_fn, dout)()

    return {
        "dense, backward, until the launches": of_node(out.grad_fn, dout),
        "dense, deterministic, backward, until the launches": of_node(in_order.grad_fn, dout),
        "varlen, backward, until the launches": of_node(out_packed.grad_fn, dout_packed),
        "dense, backward, first of its kind": first_of_its_kind,
        "dense, torch.autograd.grad": whole(out, dout, leaves),
        "torch.autograd.grad of a node that does nothing": whole(idle, dout, leaves),
        "torch.empty_like of three gradients and a workspace": lambda: [
            torch.empty_like(x) for x in (*gradients, workspace)
        ],
    }


def measure() -> dict[str, float]:
    one = torch.randn(1, 1, 1, 64).bfloat16()
    with torch.no_grad():
        with replaced(backends, "kernels_wanted", lambda tensor: False):
            fp8_calls = calls_in_8_bits()
        calls = {**calls_in_16_bits(), **fp8_calls, **calls_over_a_cache()}
        calls |= calls_of_products()
        rows = {name: microseconds(call) for name, call in calls.items()}
        attributes_only = plan_cache.new_plan_cache(None)
        with replaced(plan_cache, "_plan_cache", lambda: attributes_only):
            call = calls["dense"]
            rows["dense, without torch's DLPack table"] = microseconds(call)
    for name, call in calls_with_gradients().items():
        with replaced(plan_cache, "Launched", NoNode):
            rows[f"{name}, gradients, until the launch"] = microseconds(call)
        rows[f"{name}, gradients, with the node"] = microseconds(call)
    rows |= {name: microseconds(call) for name, call in backwards().items()}
    with torch.no_grad():
        rows["torch SDPA, one query, one key"] = microseconds(
            lambda: F.scaled_dot_product_attention(one, one, one)
        )
    return {name: round(value, 2) for name, value in rows.items()}


def main() -> None:
    torch.set_num_threads(1)
    with kernels_on_a_fake_driver():
        rows = measure()
    for name, value in rows.items():
        print(f"{name:52} {value:6.2f} us")
    results = {"environment": environment.describe(), "microseconds": rows}
    (RESULTS / "launch.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

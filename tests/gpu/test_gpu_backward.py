"""Gradients on a GPU beside float64, their bits over many runs, a training step in a CUDA graph.

Needs a GPU: `pytest -m gpu`.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import flash8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

RUNS = 30
WIDTHS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def dense(rows: int, head_dim: int, head_dim_v: int) -> list[Tensor]:
    """q, k, v and the gradient of O, of four heads over two."""
    return draw(
        *((1, rows, heads, width) for heads, width in ((4, head_dim), (2, head_dim))),
        *((1, rows, heads, head_dim_v) for heads in (2, 4)),
    )


def gradients(call, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return list(torch.autograd.grad(call(*leaves), leaves, dout))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), WIDTHS)
def test_gradients_are_those_in_float64(head_dim: int, head_dim_v: int, causal: bool) -> None:
    tensors = dense(333, head_dim, head_dim_v)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash8.flash_attn_func(q, k, v, causal=causal)

    expected = gradients(call, *(x.double() for x in tensors))
    found = gradients(call, *(x.cuda() for x in tensors))
    for name, have, want in zip("qkv", found, expected, strict=True):
        assert relative_error(have, want) < 1e-2, f"d{name}"


def test_packed_gradients_are_those_in_float64() -> None:
    lengths = [5, 0, 200, 1, 64]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tensors = [x[0] for x in dense(sum(lengths), 128, 128)]

    def call_with(ends: Tensor):
        return lambda q, k, v: flash8.flash_attn_varlen_func(
            q, k, v, ends, ends, 200, 200, causal=True
        )

    expected = gradients(call_with(ends), *(x.double() for x in tensors))
    found = gradients(call_with(ends.cuda()), *(x.cuda() for x in tensors))
    for name, have, want in zip("qkv", found, expected, strict=True):
        assert relative_error(have, want) < 1e-2, f"d{name}"


@pytest.mark.parametrize(("head_dim", "head_dim_v"), WIDTHS)
def test_ordered_gradients_have_one_bit_pattern(head_dim: int, head_dim_v: int) -> None:
    """Beside other work, so that CTAs are scheduled in other ways."""
    q, k, v, dout = (x.cuda() for x in dense(600, head_dim, head_dim_v))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash8.flash_attn_func(q, k, v, causal=True, deterministic=True)

    first = gradients(call, q, k, v, dout)
    for run in range(1, RUNS):
        other = torch.randn(64 * run, 64, device="cuda")
        other @ other.T
        again = gradients(call, q, k, v, dout)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True)), f"run {run}"


CODE = """
import torch
from flash8 import flash_attn_func
leaves = [torch.randn(2, 300, h, 128, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2)]
dout = torch.randn_like(leaves[0])
def step():
    out = flash_attn_func(*leaves, causal=True, deterministic=True)
    return torch.autograd.grad(out, leaves, dout)
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
for x in (*leaves, dout):
    x.data.copy_(torch.randn_like(x))
graph.replay()
assert all(torch.equal(x, y) for x, y in zip(captured, step()))
print("captured")
"""


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="kernels are for compute capability 9.0",
)
def test_a_training_step_may_be_captured() -> None:
    command = [sys.executable, "-P", "-c", CODE]
    environment = {**os.environ, "FLASH8_KERNELS": "on"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["captured"], done.stderr

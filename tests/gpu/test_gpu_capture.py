"""The first call of a process, captured into a CUDA graph. Needs a Hopper GPU: `pytest -m gpu`."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="kernels are for compute capability 9.0",
    ),
]

CODE = """
import torch
from flash8 import flash_attn_func
q, k, v = (torch.randn(2, 300, h, 128, device="cuda").bfloat16() for h in (4, 2, 2))
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flash_attn_func(q, k, v, causal=True)
graph.replay()
first = out.clone()
for x in (q, k, v):
    x.copy_(torch.randn_like(x))
graph.replay()
assert not torch.equal(first, out)
assert torch.equal(out, flash_attn_func(q, k, v, causal=True))
print("captured")
"""


def test_the_first_call_of_all_may_be_captured() -> None:
    command = [sys.executable, "-P", "-c", CODE]
    environment = {**os.environ, "FLASH8_KERNELS": "on"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["captured"], done.stderr


def test_tensor_maps_of_expanded_and_single_dimensions_are_encoded() -> None:
    from flash8 import flash_attn_func

    q, k, v = (torch.randn(2, 200, h, 64, device="cuda").half() for h in (4, 4, 4))
    want = flash_attn_func(q, k[:, :, :1].expand_as(k).contiguous(), v)
    assert torch.equal(want, flash_attn_func(q, k[:, :, :1].expand_as(k), v))
    for rows in (slice(0, 1), slice(0, 200)):
        one = [x[:1, rows, :1] for x in (q, k, v)]
        odd = [x.as_strided(x.shape, (3, x.stride(1), 5, 1)) for x in one]
        assert torch.equal(flash_attn_func(*odd), flash_attn_func(*one))

"""How far NaN in a query reaches, as docs/semantics.md says: in the kernels to what it shares a
tile with, hidden or not; on CPU tensors to the pairs that the mask lets through."""

from dataclasses import replace

import pytest
import torch

import flash8
from backward_cases import Gradients, draw, launch, saved
from flash8.backends.hopper.backward_variants import BackwardVariant
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal")  # tiles of 64 queries and 128 keys
PROBLEM = draw(CAUSAL, 200, 190, 1, 1, batch=1)  # the first ten queries see no key
KEYS = slice(0, 128)  # of the only block that is computed for the first 64 queries
MASKED = 3
#: Of the query with NaN: whether it sees a key, and which other rows of gradients it reaches.
REACH = {
    ("dout", MASKED): {"dk": KEYS, "dv": KEYS},
    ("q", MASKED): {"dk": KEYS},
    ("dout", 20): {"dk": KEYS, "dv": KEYS},
}


def with_nan(tensor, row):
    tensor = tensor.clone()
    tensor[0, row, 0, 5] = float("nan")
    return tensor


def on_kernels(name, row) -> Gradients:
    given = saved(PROBLEM)
    if name == "dout":
        return launch(CAUSAL, replace(given, dout=with_nan(given.dout, row)))
    return launch(CAUSAL, replace(given, call=replace(given.call, q=with_nan(given.call.q, row))))


def on_cpu(name, row) -> Gradients:
    tensors = {**{x: getattr(PROBLEM.call, x) for x in "qkv"}, "dout": PROBLEM.dout}
    tensors[name] = with_nan(tensors[name], row)
    leaves = [tensors[x].requires_grad_() for x in "qkv"]
    out = flash8.flash_attn_func(*leaves, causal=True)
    return Gradients(*torch.autograd.grad(out, leaves, tensors["dout"]))


def spoiled(gradient) -> set[int]:
    return set(gradient[0, :, 0].isnan().any(-1).nonzero().flatten().tolist())


@pytest.mark.parametrize(("name", "row"), REACH)
def test_how_far_nan_reaches(name, row):
    found, portable = on_kernels(name, row), on_cpu(name, row)
    sees = range(row - 10 + 1)  # keys
    for gradient in ("dk", "dv"):
        rows = REACH[name, row].get(gradient)
        assert spoiled(getattr(found, gradient)) == set(range(190)[rows] if rows else ())
        assert spoiled(getattr(portable, gradient)) == set(sees)
    # A query without keys has no gradient, unless the kernels find NaN in its dO.
    assert spoiled(found.dq) == ({row} if name == "dout" else set())
    assert spoiled(portable.dq) == ({row} if sees else set())

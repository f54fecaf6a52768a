"""The leg of kernels on the simulated device: sequences, rows and descales that only it sees.

On a GPU no host looks at these tensors, so a kernel has to do with anything: no access outside, no
hang, no wrong row of another sequence, and nothing that the next launch could find.
"""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import compare, device, draw, int32, masks, packed
from forward_launch import Call, ForwardKernel, Schedule
from fp8_forward_cases import dense_call, descales
from fuzz.harness import bits
from simulated_device import missing_compiler

CAUSAL = ForwardVariant("bf16", 64, 64, mask="causal")
LOCAL = ForwardVariant("bf16", 64, 64, mask="local")
BLOCKS = ForwardVariant("e4m3", 64, 64, mask="causal", scales="block")

HOSTILE = [-(2**31), 2**31 - 1, -1, 0, 1, 2**30, -(2**30), 2**24, 127, 128, 129, -128, 1000, 10**9]
NUMBERS = [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45]


_PROBLEMS = 6


def missing() -> str | None:
    """Why there is no such leg here, or None."""
    return missing_compiler()


def prepare() -> None:
    """Builds the simulator, compiles the kernels, and makes the correct calls."""
    for which in range(_PROBLEMS):
        problem(which)


@dataclass(frozen=True)
class Problem:
    """A correct call, by the kernel of a variant, and the bits it gives."""

    kernel: ForwardKernel
    call: Call
    right: tuple[Any, Any]

    def launch(self, call: Call, rng: random.Random) -> tuple[Tensor, Tensor]:
        device().configure(seed=rng.randrange(1000))
        schedule = Schedule(rng.choice([1, 2, 3]), rng.random() < 0.8, rng.choice([1, 2]))
        try:
            return self.kernel(call, schedule)
        except RuntimeError as error:
            raise AssertionError(f"{error}\n{device().last_error()}") from error


def _packed_call(variant: ForwardVariant) -> Call:
    offsets = packed([5, 0, 130, 1])
    q, k, v = draw(variant, 140, 140, 2, 1)  # the last rows are nobody's
    indices = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets.clone()}
    indices |= {"seqused_q": int32([5, 0, 99, 0]), "seqused_k": int32([3, 0, 77, 1])}
    given: dict[str, Any] = {"indices": indices, "max_seqlen_q": 130, "max_seqlen_k": 130}
    if variant.scales == "block":
        blocks = 140 // 128 + 4
        given["descales"] = descales(variant, 4, 2, 1, blocks, blocks, packed=True)
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant), **given)


def _dense_call(variant: ForwardVariant) -> Call:
    indices = {"seqused_q": int32([70, 1]), "seqused_k": int32([90, 12])}
    indices |= {"leftpad_k": int32([3, 12]), "kv_batch_idx": int32([1, 0])}
    if variant.scales == "block":
        del indices["kv_batch_idx"], indices["leftpad_k"]
        return dense_call(variant, 2, 70, 90, 2, 1, indices=indices)
    q, k, v = draw(variant, 70, 90, 2, 1, batch=2)
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant), indices=indices)


@functools.cache
def problem(which: int) -> Problem:
    """The kernel is the variant's one; it is compiled once."""
    make: Callable[[ForwardVariant], Call]
    variant, make = [
        (CAUSAL, _packed_call),
        (LOCAL, _packed_call),
        (BLOCKS, _packed_call),
        (CAUSAL, _dense_call),
        (LOCAL, _dense_call),
        (BLOCKS, _dense_call),
    ][which]
    kernel = _kernel(variant)
    call = make(variant)
    device().configure(seed=0)
    o, lse = kernel(call, Schedule())
    compare(call, o, lse)
    return Problem(kernel, call, (bits(o), bits(lse)))


@functools.cache
def _kernel(variant: ForwardVariant) -> ForwardKernel:
    return ForwardKernel(device().driver, device().ptx(variant))


def call(seed: int) -> str:
    """A hostile launch, and the correct one after it."""
    rng = random.Random(f"device {seed}")
    chosen = problem(rng.randrange(_PROBLEMS))
    hostile, spoilt = spoil(rng, chosen.call)
    try:
        o, _ = chosen.launch(hostile, rng)
        expect_others_right(chosen, o, spoilt)
        o, lse = chosen.launch(chosen.call, rng)
        assert (bits(o), bits(lse)) == chosen.right, "the next call does not give the right bits"
    except AssertionError as error:
        shown = {name: x.tolist() for name, x in hostile.indices.items()}
        raise AssertionError(f"{error}; before it {chosen.kernel.info.entry} {shown}") from error
    return "hostile launched"


def spoil(rng: random.Random, call: Call) -> tuple[Call, dict[str, set[int]]]:
    """The call with other numbers in some of its tensors, and which, by the tensor's name."""
    indices = {name: x.clone() for name, x in call.indices.items()}
    scales = {name: x.clone() for name, x in call.descales.items()}
    spoilt: dict[str, set[int]] = {}
    names = sorted(indices) + sorted(scales)
    for name in rng.sample(names, min(len(names), rng.choice([1, 1, 2, 4]))):
        x = indices[name] if name in indices else scales[name]
        flat = x.view(-1)
        if name in indices and rng.random() < 0.2:  # falling, or all the same
            x.copy_(x.flip(0) if rng.random() < 0.5 else x[0].expand_as(x))
            spoilt[name] = set(range(x.numel()))
            continue
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(flat.numel())
            if name in indices:
                flat[at] = rng.choice(HOSTILE) if rng.random() < 0.7 else rng.randint(-300, 300)
            else:
                flat[at] = rng.choice(NUMBERS)
            spoilt.setdefault(name, set()).add(at)
    return replace(call, indices=indices, descales=scales), spoilt


def expect_others_right(chosen: Problem, o: Tensor, spoilt: dict[str, set[int]]) -> None:
    """Where only used lengths, paddings or rows of some sequences are spoilt, the others' rows of
    O are what they were."""
    if not spoilt.keys() <= {"seqused_q", "seqused_k", "leftpad_k", "kv_batch_idx"}:
        return
    good = torch.frombuffer(bytearray(chosen.right[0][2]), dtype=o.dtype).view(o.shape)
    touched = set().union(*spoilt.values())
    ends = chosen.call.indices.get("cu_seqlens_q")
    batch = o.shape[0] if ends is None else ends.numel() - 1
    for b in set(range(batch)) - touched:
        rows = b if ends is None else slice(int(ends[b]), int(ends[b + 1]))
        assert bits(o[rows]) == bits(good[rows]), f"rows of sequence {b}, which is not spoilt"

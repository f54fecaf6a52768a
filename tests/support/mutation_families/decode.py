"""Variants of the decode kernel."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decode_cases import Cache, compare, draw, poisoned
from decode_launch import Call, DecodeKernel
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.schedule_variants import SCHEDULE
from forward_cases import device
from schedule_launch import ScheduleKernel

from .runs import Run, by_seed, image_of, launching, loading, text_of


@dataclass(frozen=True)
class Problem:
    """Calls that are launched one after the other, by how many CTAs, and the seeds."""

    calls: tuple[Call, ...]
    ctas: int
    seeds: Iterable[int]


@functools.cache
def schedule_kernel() -> ScheduleKernel:
    return ScheduleKernel(device().driver, device().ptx(SCHEDULE))


@functools.cache
def problems(variant: DecodeVariant) -> tuple[Problem, ...]:
    """Sequences that are short, empty and of several CTAs; one of so many tiles that the rings go
    round; CTAs without work; scheduler metadata that holds, and that does not; two launches, of
    which the second takes the tickets of the first."""

    def call(*lengths: int, **options: object) -> Call:
        heads = {8: 2, 16: 7, 32: 14}[variant.rows]
        cache = Cache(3 if variant.load == "gather" else 24)
        return draw(variant, lengths, seqlen_q=2, heads=heads, cache=cache, causal=True, **options)

    ragged = call(300, 0, 1, 63, 65, 257)
    again = call(64, 500, seed=1)
    right = replace(ragged, scheduler_metadata=schedule_kernel()(variant, ragged))
    stale = replace(again, scheduler_metadata=schedule_kernel()(variant, call(70, 400)))
    most = 5000 if variant.head_dim_v <= 256 else 1500
    return (
        Problem((ragged,), 5, range(4)),
        Problem((right, again), 3, range(4)),
        Problem((stale, ragged), 9, range(4)),
        Problem((call(most, window=(most - 40, 0)),), 1, range(2)),
    )


def load(ptx: str) -> DecodeKernel:
    with loading(device()):
        return DecodeKernel(device().driver, image_of(ptx))


def launch(
    kernel: DecodeKernel, problem: Problem, seed: int
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """O and LSE of each call, and how many bytes the last one has loaded into shared memory."""
    with launching(device(), seed):
        found = kernel(*map(poisoned, problem.calls), ctas=problem.ctas)
    loaded = device().report()["statistics"]["bytes"]
    return found, sum(n for name, n in loaded.items() if name in ("tensor load", "cp.async"))


@dataclass(frozen=True)
class Decode:
    """A variant of the decode kernel."""

    name: str
    variant: DecodeVariant

    def ptx(self) -> str:
        return text_of(device().ptx(self.variant))

    def cases(self) -> Run:
        kernel = load(self.ptx())
        given = problems(self.variant)
        wanted = [launch(kernel, problem, 0) for problem in given]
        for problem, (found, _) in zip(given, wanted, strict=True):
            for call, (o, lse) in zip(problem.calls, found, strict=True):
                compare(call, o, lse)
        turns = by_seed(given, (problem.seeds for problem in given), wanted)

        def run(ptx: str) -> None:
            mutant = load(ptx)
            for seed, problem, (right, bytes_) in turns:
                found, loaded = launch(mutant, problem, seed)
                for (o, lse), (want, want_lse) in zip(found, right, strict=True):
                    assert torch.equal(o, want), f"seed {seed}: O differs"
                    assert torch.equal(lse, want_lse), f"seed {seed}: LSE differs"
                assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded, not {bytes_}"

        return run

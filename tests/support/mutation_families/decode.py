"""Variants of the decode kernel."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decode_append_cases import AppendingKernel, Step, prepared, with_new_keys
from decode_cases import Cache, compare, draw, poisoned
from decode_launch import Call, DecodeKernel
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.schedule_variants import SCHEDULE
from forward_cases import device, packed
from schedule_launch import ScheduleKernel

from .runs import Run, by_seed, image_of, launching, loaded_bytes, loading, text_of


@dataclass(frozen=True)
class Problem:
    """Calls that are launched one after the other, by how many CTAs, and the seeds. `check` holds
    what the unchanged kernel makes of them to its reference."""

    given: tuple[Call, ...]
    ctas: int
    seeds: Iterable[int]
    check: Callable[[list[Tensor]], None]


def attending(calls: tuple[Call, ...], ctas: int, seeds: Iterable[int]) -> Problem:
    def check(found: list[Tensor]) -> None:
        for call, o, lse in zip(calls, found[::2], found[1::2], strict=True):
            compare(call, o, lse)

    return Problem(tuple(map(poisoned, calls)), ctas, seeds, check)


def appending(step: Step, ctas: int, seeds: Iterable[int]) -> Problem:
    given, after = prepared(step)

    def check(found: list[Tensor]) -> None:
        o, lse, *caches = found
        compare(step.done(), o, lse)
        for cache, want in zip(caches, (after.k, after.v), strict=True):
            assert torch.equal(bits(cache), bits(want)), "a cache differs"

    return Problem((given,), ctas, seeds, check)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)  # NaN is equal to itself


@functools.cache
def schedule_kernel() -> ScheduleKernel:
    return ScheduleKernel(device().driver, device().ptx(SCHEDULE))


def draw_call(variant: DecodeVariant, *lengths: int, room: int = 0, **options: object) -> Call:
    heads = {8: 2, 16: 7, 32: 14}[variant.rows]
    cache = Cache(3 if variant.load == "gather" else 24, room)
    return draw(variant, lengths, seqlen_q=2, heads=heads, cache=cache, causal=True, **options)


def longest(variant: DecodeVariant) -> int:
    """Keys of so many tiles that the rings of one CTA go round, more than twice."""
    if variant.head_dim_v > 256:
        return 600
    bytes_ = variant.head_dim_v * (1 if variant.cache == "e4m3" else 2)
    return 5000 if bytes_ <= 128 else 2500


@functools.cache
def problems(variant: DecodeVariant) -> tuple[Problem, ...]:
    """Sequences that are short, empty and of several CTAs; one of so many tiles that the rings go
    round; CTAs without work; scheduler metadata that holds, and that does not; two launches, of
    which the second takes the tickets of the first; splits, of which CTAs have one or several."""
    if variant.append:
        return appending_problems(variant)
    call = functools.partial(draw_call, variant)
    ragged = call(300, 0, 1, 63, 65, 257)
    again = call(64, 500, seed=1)
    right = replace(ragged, scheduler_metadata=schedule_kernel()(variant, ragged))
    stale = replace(again, scheduler_metadata=schedule_kernel()(variant, call(70, 400)))
    most = longest(variant)
    return (
        attending((ragged,), 5, range(4)),
        attending((right, again), 3, range(4)),
        attending((stale, ragged), 9, range(4)),
        attending((call(most, window=(most - 40, 0)),), 1, range(2)),
        attending((call(700, 0, 65, split_keys=128),), 4, range(2)),
    )


def appending_problems(variant: DecodeVariant) -> tuple[Problem, ...]:
    """New keys in tiles of several CTAs, at the start of a sequence, and in more than one tile; of
    rows that are normalised and rotated; so many tiles that the rings go round, where slots with
    new keys are filled again, also one of which every key is seen; new keys that no query sees,
    and none; scheduler metadata that holds, and that does not."""

    def step(lengths: tuple[int, ...], new: int | tuple[int, ...], **options: object) -> Step:
        call = draw_call(variant, *lengths, room=max(lengths) + 8)
        return with_new_keys(call, new, **options)  # type: ignore[arg-type]

    again = step((62, 0, 500), (8, 3, 1))
    right = schedule_kernel()(variant, again, new=packed((8, 3, 1)))
    unseen = step((40, 9, 0, 130, 64), (0, 0, 2, 5, 0))
    stale = schedule_kernel()(variant, unseen, new=70)
    most = longest(variant)
    return (
        appending(step((300, 0, 1, 62, 65, 257), 2, rotary_dim=32, normalises=True), 5, range(4)),
        appending(replace(again, scheduler_metadata=right), 3, range(4)),
        appending(replace(unseen, scheduler_metadata=stale), 9, range(4)),
        appending(step((most, 62, most // 2), 2), 1, range(2)),
    )


def load(variant: DecodeVariant, ptx: str) -> DecodeKernel:
    kind = AppendingKernel if variant.append else DecodeKernel
    with loading(device()):
        return kind(device().driver, image_of(ptx))


def launch(kernel: DecodeKernel, problem: Problem, seed: int) -> tuple[list[Tensor], int]:
    """O and LSE of each call, the caches that the kernel appends to, and how many bytes the last
    call has loaded into shared memory."""
    with launching(device(), seed):
        if isinstance(kernel, AppendingKernel):
            (step,) = problem.given
            assert isinstance(step, Step)
            found = [*kernel.step(step, problem.ctas)]
        else:
            pairs = kernel(*problem.given, ctas=problem.ctas)
            found = [x for pair in pairs for x in pair]
    return found, loaded_bytes(device())


@dataclass(frozen=True)
class Decode:
    """A variant of the decode kernel."""

    name: str
    variant: DecodeVariant

    def ptx(self) -> str:
        return text_of(device().ptx(self.variant))

    def cases(self) -> Run:
        kernel = load(self.variant, self.ptx())
        given = problems(self.variant)
        wanted = [launch(kernel, problem, 0) for problem in given]
        for problem, (found, _) in zip(given, wanted, strict=True):
            problem.check(found)
        turns = by_seed(given, (problem.seeds for problem in given), wanted)

        def run(ptx: str) -> None:
            mutant = load(self.variant, ptx)
            for seed, problem, (right, bytes_) in turns:
                found, loaded = launch(mutant, problem, seed)
                for i, (x, want) in enumerate(zip(found, right, strict=True)):
                    assert torch.equal(bits(x), bits(want)), f"seed {seed}: output {i} differs"
                assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded, not {bytes_}"

        return run

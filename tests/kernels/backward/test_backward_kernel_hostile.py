"""Index tensors that only the device sees, with every kind of nonsense in them: nothing outside is
touched, nothing hangs, every row of every gradient is written, and the next call is right."""

import functools
from dataclasses import replace

import pytest
import torch

from backward_cases import Gradients, Problem, Saved, compare, draw, launch, saved
from defaults import by_default
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import int32, packed
from hostile_indices import LENGTHS, OFFSETS, VALUES
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal")
ORDERED = replace(CAUSAL, deterministic=True)  # whose CTAs wait for each other
VARIANTS = by_default([CAUSAL, ORDERED], [CAUSAL, ORDERED])
TOTAL = sum(LENGTHS)


def packed_problem(variant: BackwardVariant, **indices: torch.Tensor) -> Problem:
    offsets = packed(LENGTHS)
    given = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, **indices}
    longest = {"max_seqlen_q": 130, "max_seqlen_k": 130}
    sinks = torch.tensor([0.5, -1.0])
    return draw(variant, TOTAL, TOTAL, 2, 1, indices=given, s_aux=sinks, **longest)


def with_indices(given: Saved, **indices: torch.Tensor) -> Saved:
    """What the kernels are given, with other indices than it was made for."""
    return replace(given, call=replace(given.call, indices={**given.call.indices, **indices}))


def counted(offsets: list[int]) -> torch.Tensor:
    """What offsets count as: the largest so far, within the tensor."""
    return torch.tensor(offsets).clamp(0, TOTAL).cummax(0).values.int()


def written(found: Gradients) -> None:
    for name in ("dq", "dk", "dv"):
        assert not getattr(found, name).isnan().any(), f"a row of {name} was not written"


@functools.cache
def right(variant: BackwardVariant) -> tuple[Saved, Gradients]:
    """A correct call, and what it gives before any other."""
    given = saved(packed_problem(variant))
    return given, launch(variant, given)


def check_next(variant: BackwardVariant) -> None:
    given, want = right(variant)
    found = launch(variant, given)
    assert torch.equal(found.dk, want.dk) and torch.equal(found.dv, want.dv)
    torch.testing.assert_close(found.dq, want.dq, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets_of_queries(variant, offsets):
    right(variant)
    problem = packed_problem(variant, cu_seqlens_q=counted(offsets))
    given = with_indices(saved(problem), cu_seqlens_q=int32(offsets))
    found = launch(variant, given, seed=1)
    written(found)
    compare(problem, found)
    check_next(variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets_of_keys(variant, offsets):
    given, _ = right(variant)
    written(launch(variant, with_indices(given, cu_seqlens_k=int32(offsets)), seed=1))
    check_next(variant)


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("name", ["seqused_q", "seqused_k"])
def test_used_lengths(name, values):
    used = torch.minimum(int32(values).clamp(min=0), int32(LENGTHS))
    problem = packed_problem(CAUSAL, **{name: used})
    found = launch(CAUSAL, with_indices(saved(problem), **{name: int32(values)}))
    compare(problem, found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_sequences_than_lanes(variant):
    """Offsets of queries that go up and down over several groups of 32 sequences."""
    generator = torch.Generator().manual_seed(3)
    offsets = torch.randint(-300, 600, (76,), generator=generator).tolist()
    problem = packed_problem(variant, cu_seqlens_q=counted(offsets), cu_seqlens_k=counted(offsets))
    given = with_indices(saved(problem), cu_seqlens_q=int32(offsets))
    compare(problem, launch(variant, given))

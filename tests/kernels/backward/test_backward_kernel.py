"""The backward kernels on the simulated device: shapes, sequences, masks and numbers.

A finding of the simulator fails the launch; backward_cases.py says what else a case must fulfil.
Each case runs under three seeds, those of the order of dQ under thirty. By default a third of them.

| what | variants | cases |
|---|---|---|
| dense: one row, kBlock - 1 and + 1, primes, MHA and 3 heads a KV head, no key | all | 102 |
| packed, with used lengths, empty sequences and rows that belong to none; dLSE | all | 17 |
| MQA and GQA with primes, sinks and dLSE; used lengths of a dense call; packed GQA at the edges
  of blocks | all | 85 |
| dLSE; sinks, also packed | default | 13 |
| scores near -100 and a ragged block of keys | default | 6 |
| chunks, windows of one key, keys that nobody sees, narrow heads, many heads | some | 5 |
| K with a bias, and K - mean(K) in its place | causal, window, 192/128 | 7 |
| the order of dQ, its absence, a turn passed on too early | 128 | 3 |

All: head_dim 64, 96, 128, 192, 192/128, 256 and 128/64, both types, no mask, causal and windows,
softcap, ALiBi, dQ staged, reduced and in order. Everything that nobody may read is NaN.
"""

from dataclasses import dataclass, replace

import pytest
import torch

import tolerances
from backward_cases import (
    Problem,
    Saved,
    check,
    compare,
    device,
    draw,
    expected,
    images,
    launch,
    same_bits,
    saved,
    with_low_logits,
)
from backward_launch import BackwardKernels
from defaults import by_default
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import int32, packed
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal")
ORDERED = BackwardVariant("bf16", 128, 128, deterministic=True)
LOCAL = BackwardVariant("fp16", 64, 64, mask="local")
NARROW = BackwardVariant("bf16", 96, 96, mask="causal")
MLA = BackwardVariant("bf16", 192, 128, mask="causal")
WIDE = BackwardVariant("bf16", 256, 256, mask="local", deterministic=True)
DEFAULT = (CAUSAL, ORDERED, LOCAL)
SLOW = (
    WIDE,
    NARROW,
    MLA,
    BackwardVariant("bf16", 128, 128),
    BackwardVariant("fp16", 128, 128, mask="causal", dq="reduced"),
    BackwardVariant("bf16", 128, 128, mask="local", softcap=True, alibi=True),
    BackwardVariant("bf16", 128, 128, mask="causal", softcap=True),
    BackwardVariant("bf16", 64, 64, mask="causal", deterministic=True),
    BackwardVariant("bf16", 64, 64, alibi=True),
    BackwardVariant("fp16", 96, 96, mask="local", deterministic=True),
    BackwardVariant("bf16", 128, 64, mask="causal"),
    BackwardVariant("fp16", 192, 192, dq="reduced"),
    BackwardVariant("bf16", 256, 256, mask="causal", dq="reduced"),
    BackwardVariant("fp16", 256, 256, softcap=True, alibi=True),
)
VARIANTS = [pytest.param(v, id=v.name) for v in DEFAULT] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in SLOW
]
#: (batch, seqlen_q, seqlen_k, heads, heads_kv): one row, both sides of a tile, primes, no key.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 127, 129, 1, 1),
    (2, 193, 131, 2, 2),
    (1, 65, 257, 3, 1),
    (1, 200, 50, 1, 1),
    (2, 3, 0, 1, 1),
]


def options(variant: BackwardVariant, heads: int) -> dict:
    """What gives a variant's compiled choices something to do."""
    return {"alibi_slopes": torch.linspace(0.02, 0.3, heads)} if variant.alibi else {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(variant, shape):
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    given = options(variant, heads)
    check(variant, draw(variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch, **given))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_with_used_lengths(variant):
    """Some sequences have no query, no key or neither, and rows at both ends belong to none."""
    indices = {
        "cu_seqlens_q": packed([5, 0, 130, 1, 64]) + 3,
        "cu_seqlens_k": packed([7, 40, 141, 1, 64]) + 2,
        "seqused_q": int32([5, 0, 99, 1, 64]),
        "seqused_k": int32([3, 11, 137, 0, 64]),
    }
    lengths = {"max_seqlen_q": 130, "max_seqlen_k": 141}
    given = options(variant, 2)
    check(
        variant, draw(variant, 211, 260, 2, 1, indices=indices, **lengths, with_dlse=True, **given)
    )


#: Of both sides: lengths at the edges of a block, and used lengths; with heads and features.
LAYOUTS = {
    "mqa": {"rows": (67, 131), "heads": (4, 1), "batch": 1},
    "gqa": {"rows": (61, 127), "heads": (4, 2), "batch": 2, "s_aux": torch.linspace(-1, 3, 4)},
    "seqused": {
        "rows": (65, 129),
        "heads": (2, 1),
        "batch": 3,
        "indices": {"seqused_q": int32([65, 1, 0]), "seqused_k": int32([128, 127, 129])},
    },
    "packed_edges": {
        "rows": (256, 321),
        "heads": (2, 2),
        "indices": {
            "cu_seqlens_q": packed([63, 1, 65, 127]),
            "cu_seqlens_k": packed([129, 127, 1, 64]),
        },
        "max_seqlen_q": 127,
        "max_seqlen_k": 129,
        "s_aux": torch.tensor([0.5, 2.0]),
    },
    "packed_gqa": {
        "rows": (192, 132),
        "heads": (4, 2),
        "indices": {
            "cu_seqlens_q": packed([61, 0, 131]),
            "cu_seqlens_k": packed([127, 5, 0]),
            "seqused_k": int32([126, 5, 0]),
        },
        "max_seqlen_q": 131,
        "max_seqlen_k": 127,
    },
}


@dataclass(frozen=True)
class Cell:
    """A place in the grid of variants and layouts."""

    variant: BackwardVariant
    layout: str

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.layout}"


GRID = [Cell(variant, layout) for variant in (*DEFAULT, *SLOW) for layout in LAYOUTS]
EVERY_DAY = [c for c in GRID if c.variant in DEFAULT and c.layout in ("seqused", "packed_gqa")]


@pytest.mark.parametrize("cell", by_default(GRID, EVERY_DAY))
def test_grid(cell):
    given = dict(LAYOUTS[cell.layout])
    rows, heads = given.pop("rows"), given.pop("heads")
    given |= options(cell.variant, heads[0])
    check(cell.variant, draw(cell.variant, *rows, *heads, with_dlse=True, seed=1, **given))


@pytest.mark.parametrize("variant", by_default((*DEFAULT, WIDE), DEFAULT))
def test_gradient_of_lse(variant):
    check(variant, draw(variant, 140, 150, 2, 1, batch=1, with_dlse=True))


@pytest.mark.parametrize("variant", by_default((*DEFAULT, WIDE), DEFAULT))
def test_sinks(variant):
    sinks = torch.tensor([0.5, 9.0])
    check(variant, draw(variant, 140, 130, 2, 1, batch=2, s_aux=sinks, with_dlse=True))


def test_the_bound_on_gradients_of_sinks():
    """What is a twentieth off, or without dLSE, is found."""
    sinks = torch.tensor([0.5, 9.0])
    problem = draw(CAUSAL, 140, 130, 2, 1, batch=2, s_aux=sinks, with_dlse=True)
    exact = expected(problem)
    compare(problem, exact)
    for dsinks in (1.05 * exact.dsinks, expected(replace(problem, dlse=None)).dsinks):
        with pytest.raises(AssertionError, match="dsinks"):
            compare(problem, replace(exact, dsinks=dsinks))


def test_sinks_of_packed_sequences():
    """Between sequences there are blocks of the workspace that nobody writes."""
    offsets = packed([5, 0, 130, 1, 64])
    indices = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    lengths = {"max_seqlen_q": 130, "max_seqlen_k": 130}
    sinks = torch.tensor([0.5, 3.0])
    check(CAUSAL, draw(CAUSAL, 200, 200, 2, 1, indices=indices, **lengths, s_aux=sinks))


@pytest.mark.parametrize("given", [{"attention_chunk": 64}, {"window": (0, 0)}], ids=str)
def test_other_windows(given):
    given = {"window": (-1, -1), **given}
    check(LOCAL, draw(LOCAL, 150, 260, 1, 1, batch=1, **given))


@pytest.mark.parametrize("variant", by_default((*DEFAULT, WIDE), (ORDERED, LOCAL)))
def test_low_logits_with_a_ragged_block_of_keys(variant):
    """exp(0 - LSE) is infinite: keys that are not there have to be hidden, zeros are not enough."""
    check(variant, with_low_logits(draw(variant, 70, 150, 1, 1, batch=1, window=(-1, -1))))


def test_keys_that_no_query_sees():
    """Left of every window K and V may hold anything."""
    problem = draw(LOCAL, 40, 150, 1, 1, batch=1)
    first = 150 - 40 - 37
    given = saved(problem)
    for x in (given.call.k, given.call.v):
        x[:, :first] = torch.nan
    got = launch(LOCAL, given, seed=1)
    assert not got.dq.isnan().any()
    assert not got.dk[:, :first].any() and not got.dv[:, :first].any()


@pytest.mark.parametrize("variant", by_default([NARROW, CAUSAL], [CAUSAL]))
def test_heads_narrower_than_the_tiles(variant):
    problem = draw(variant, 70, 90, 1, 1, batch=1)
    call = problem.call
    q, k, v = (x[..., :80].contiguous() for x in (call.q, call.k, call.v))
    narrow = Problem(replace(call, q=q, k=k, v=v), problem.dout[..., :80].contiguous())
    check(variant, narrow)


def biased(variant: BackwardVariant, **options) -> Problem:
    """Keys whose channels have means far from zero."""
    problem = draw(variant, 140, 300, 2, 1, batch=2, **options)
    bias = torch.linspace(-8, 8, variant.head_dim)
    k = (problem.call.k.float() + bias).to(problem.call.k.dtype)
    return replace(problem, call=replace(problem.call, k=k))


@pytest.mark.parametrize("variant", by_default([CAUSAL, LOCAL, MLA], [CAUSAL, LOCAL]))
@pytest.mark.parametrize("given", [{}, {"with_dlse": True, "s_aux": torch.tensor([0.5, 3.0])}])
def test_keys_with_a_bias(variant, given):
    """dQ = dS (K - mean) + rowsum(dS) mean is as precise as without the bias, dS K is not."""
    problem = biased(variant, **given)
    exact = expected(problem).dq
    rough = launch(variant, saved(problem), seed=1).dq
    mean = problem.call.k.float().mean(dim=1)
    got = check(variant, replace(problem, k_mean=mean), seeds=(1, 2))
    # What dLSE and the sink add to dQ is exact either way, and large.
    gain = 3.0 if not given else 1.3
    assert tolerances.rel_l2(got.dq, exact) < tolerances.rel_l2(rough, exact) / gain


def test_a_mean_with_packed_sequences():
    offsets = packed([5, 0, 130, 1, 64])
    indices = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    lengths = {"max_seqlen_q": 130, "max_seqlen_k": 130}
    problem = draw(CAUSAL, 200, 200, 2, 1, indices=indices, **lengths, with_dlse=True)
    k = problem.call.k.float()
    # An empty sequence has no mean, and what is given for it is not read.
    pairs = zip(offsets, offsets[1:], strict=False)
    mean = torch.stack([k[begin:end].mean(dim=0) for begin, end in pairs])
    check(CAUSAL, replace(problem, k_mean=mean), seeds=(0, 1))


def test_more_heads_than_a_section():
    check(CAUSAL, draw(CAUSAL, 65, 129, 6, 3, batch=1))


def test_one_bit_pattern_under_thirty_seeds():
    problem = draw(ORDERED, 130, 700, 1, 1, batch=1)
    check(ORDERED, problem, seeds=range(30))


def test_a_turn_passed_on_too_early():
    """When shared memory has been read a sum may still be on its way, and the next one overtakes
    it. So a build that waits for the read fails the test above."""
    before, kernel, after = images(ORDERED)
    complete, read = b"cp.async.bulk.wait_group 0;", b"cp.async.bulk.wait_group.read 0;"
    assert kernel.count(complete) == 1
    early = BackwardKernels(device().driver, before, kernel.replace(complete, read), after)
    given = saved(draw(ORDERED, 64, 700, 1, 1, batch=1))
    found = {
        build: {_sums(given, seed, built) for seed in range(30)}
        for build, built in (("as it is", None), ("early", early))
    }
    assert len(found["as it is"]) == 1
    assert len(found["early"]) > 1


def _sums(given: Saved, seed: int, built: BackwardKernels | None) -> bytes:
    sums = launch(ORDERED, given, seed=seed, built=built).dq_sums
    return sums.view(torch.int32).numpy().tobytes()


def test_without_an_order_the_bits_of_dq_differ():
    """So the test above can fail."""
    problem = draw(CAUSAL, 130, 700, 1, 1, batch=1)
    given = saved(problem)
    sums = [launch(CAUSAL, given, seed=seed).dq_sums for seed in range(4)]
    assert not all(same_bits(sums[0], other) for other in sums[1:])

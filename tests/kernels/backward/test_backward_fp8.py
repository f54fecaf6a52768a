"""The 16-bit backward of an FP8 forward on the simulated device, against float64 gradients of the
dequantized inputs. backward_cases.py says what a case must fulfil.

O and LSE are exact here, so that only the backward's own error counts; test_backward_fp8_calls.py
has those of an FP8 forward.
"""

from dataclasses import replace

import pytest
import torch

import tolerances
from backward_cases import check, expected, launch, same_bits, saved
from backward_fp8_cases import draw, widened
from defaults import by_default
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import int32, packed
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


def variant(head_dim: int, head_dim_v: int, dtype="bf16", **choices) -> BackwardVariant:
    return BackwardVariant(dtype, head_dim, head_dim_v, **choices, fp8=True)


CAUSAL = variant(128, 128, mask="causal")
ORDERED = variant(128, 128, deterministic=True)
LOCAL = variant(64, 64, "fp16", mask="local")
MLA = variant(192, 128, mask="causal")
DEFAULT = (CAUSAL,)
SLOW = (
    LOCAL,
    MLA,
    ORDERED,
    variant(128, 128, "fp16", mask="local"),
    variant(128, 128, "fp16", mask="causal", dq="reduced"),
    variant(128, 128, mask="local", softcap=True, alibi=True),
    variant(128, 64, mask="causal"),
    variant(96, 96, mask="causal"),
    variant(96, 96, "fp16", mask="local", deterministic=True),
    variant(64, 64, mask="causal", deterministic=True),
    variant(64, 64, alibi=True),
    variant(64, 64, "fp16", softcap=True),
    variant(192, 128, mask="local", deterministic=True),
    variant(192, 192, "fp16", dq="reduced"),
    variant(192, 192, mask="causal", deterministic=True),
)
VARIANTS = [pytest.param(v, id=v.name) for v in DEFAULT] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in SLOW
]
#: (batch, seqlen_q, seqlen_k, heads, heads_kv, descales): one row, both sides of a tile, primes, no
#: key.
SHAPES = [
    (1, 1, 1, 1, 1, "tensor"),
    (1, 127, 129, 1, 1, "block"),
    (2, 193, 131, 2, 2, "head"),
    (1, 65, 257, 3, 1, "block"),
    (1, 200, 50, 1, 1, "tensor"),
    (2, 3, 0, 1, 1, "head"),
]
EMPTY_BETWEEN = {
    "cu_seqlens_q": packed([5, 0, 130, 1, 64]) + 3,
    "cu_seqlens_k": packed([7, 40, 141, 1, 64]) + 2,
    "seqused_q": int32([5, 0, 99, 1, 64]),
    "seqused_k": int32([3, 11, 137, 0, 64]),
}


def options(variant: BackwardVariant, heads: int) -> dict:
    """What gives a variant's compiled choices something to do."""
    return {"alibi_slopes": torch.linspace(0.02, 0.3, heads)} if variant.alibi else {}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(variant, shape):
    batch, seqlen_q, seqlen_k, heads, heads_kv, scales = shape
    given = options(variant, heads)
    problem = draw(
        variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch, scales=scales, **given
    )
    check(variant, problem)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scales", ["head", "block"])
def test_packed_with_used_lengths(variant, scales):
    """Some sequences have no query, no key or neither, and rows at both ends belong to none."""
    given = {"max_seqlen_q": 130, "max_seqlen_k": 141, **options(variant, 2)}
    problem = draw(
        variant,
        *(211, 260, 2, 1),
        scales=scales,
        indices=EMPTY_BETWEEN,
        with_dlse=True,
        **given,
    )
    check(variant, problem)


@pytest.mark.parametrize("variant", by_default((CAUSAL, LOCAL, MLA), DEFAULT))
@pytest.mark.parametrize("means", [False, True])
def test_sinks_and_gradients_of_lse(variant, means):
    """What the means of K and V are to D, to LSE and to rowsum(dS)."""
    sinks = torch.tensor([0.5, 9.0])
    given = {"s_aux": sinks, "with_dlse": True, "means": means, "bias": 8.0}
    check(variant, draw(variant, 140, 130, 2, 1, batch=2, **given))


@pytest.mark.slow
def test_windows_and_chunks():
    for given in ({"attention_chunk": 64}, {"window": (0, 0)}):
        problem = draw(LOCAL, 150, 260, 1, 1, batch=1, **{"window": (-1, -1), **given})
        check(LOCAL, problem, seeds=(0, 1))


@pytest.mark.slow
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


@pytest.mark.slow
def test_low_logits_with_a_ragged_block_of_keys():
    """exp(0 - LSE) is infinite: keys that are not there have to be hidden, zeros are not enough."""
    problem = draw(LOCAL, 70, 150, 1, 1, batch=1, window=(-1, -1), means=False)
    q, k = (x.float() for x in (problem.call.q, problem.call.k))
    q[..., 0], k[..., 0] = 448.0, -448.0
    call = replace(problem.call, q=q.to(torch.float8_e4m3fn), k=k.to(torch.float8_e4m3fn))
    problem = replace(problem, call=call, wide=widened(call))
    got, want = launch(LOCAL, saved(problem), seed=1), expected(problem)
    # The tensor core adds up all products of a score in units of the largest one.
    for name in ("dq", "dk", "dv"):
        assert tolerances.rel_l2(getattr(got, name), getattr(want, name)) < 1e-2


def test_heads_narrower_than_the_tiles():
    problem = draw(CAUSAL, 70, 90, 1, 1, batch=1, means=False)
    call, wide = (
        replace(c, q=c.q[..., :80].contiguous(), k=c.k[..., :80].contiguous())
        for c in (problem.call, problem.wide)
    )
    check(CAUSAL, replace(problem, call=call, wide=wide))


def test_a_descale_that_is_none_gives_nan():
    """As in the forward, and only in what it scales."""
    for name in ("q_descale", "k_descale", "v_descale"):
        problem = draw(CAUSAL, 40, 70, 2, 2, batch=1)
        given = saved(problem)
        descale = given.call.descales[name].clone()
        descale[0, 1] = 0.0
        call = replace(given.call, descales={**given.call.descales, name: descale})
        got = launch(CAUSAL, replace(given, call=call))
        assert got.dq[0, :, 1].isnan().all() and got.dk[0, :, 1].isnan().any()
        assert not got.dq[0, :, 0].isnan().any() and not got.dk[0, :, 0].isnan().any()


def test_query_heads_that_ctas_share():
    problem = draw(CAUSAL, 65, 257, 3, 1, batch=1, scales="block")
    check(CAUSAL, replace(problem, head_splits=2), seeds=(0, 1))


@pytest.mark.slow
def test_one_bit_pattern_under_thirty_seeds():
    problem = draw(ORDERED, 130, 700, 1, 1, batch=1, scales="block")
    check(ORDERED, problem, seeds=range(30))


@pytest.mark.slow
def test_without_an_order_the_bits_of_dq_differ():
    problem = draw(CAUSAL, 130, 700, 1, 1, batch=1, scales="block")
    given = saved(problem)
    sums = [launch(CAUSAL, given, seed=seed).dq_sums for seed in range(4)]
    assert not all(same_bits(sums[0], other) for other in sums[1:])


def test_more_heads_than_a_section():
    check(CAUSAL, draw(CAUSAL, 65, 129, 6, 3, batch=1), seeds=(0, 1))


def test_extreme_descales():
    """Those of Q and K in one factor: it is their product that scores are made with."""
    problem = draw(CAUSAL, 70, 90, 1, 1, batch=1, means=False)
    scales = {name: x.clone() for name, x in problem.call.descales.items()}
    scales["q_descale"] *= 2.0**-40
    scales["k_descale"] *= 2.0**40
    call = replace(problem.call, descales=scales)
    check(CAUSAL, replace(problem, call=call, wide=widened(call)), seeds=(0,))

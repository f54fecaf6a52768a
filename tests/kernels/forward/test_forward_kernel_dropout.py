"""Dropout in the forward kernel: the published mask bit for bit, and O and LSE behind it."""

from dataclasses import replace

import pytest
import torch

import flash8
import tolerances
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.variants import ForwardVariant
from flash8.compiler import compile_unit
from forward_cases import check, compare, device, draw, int32, launch, masks, packed
from forward_launch import Call, Schedule
from fp8_forward_cases import changed_kernel, dense_call
from fp8_forward_cases import packed_call as fp8_packed_call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = ForwardVariant("bf16", 128, 128, mask="causal", dropout=True)
FOLDED = ForwardVariant("bf16", 128, 128, mask="causal", pack_gqa=True, dropout=True)
LOCAL = ForwardVariant("fp16", 64, 64, mask="local", softcap=True, alibi=True, dropout=True)
FP8 = ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", dropout=True)
DEFAULT = (CAUSAL, FOLDED, LOCAL)
SLOW = (
    ForwardVariant("bf16", 64, 64, dropout=True),
    ForwardVariant("bf16", 96, 96, mask="causal", dropout=True),
    ForwardVariant("fp16", 128, 128, dropout=True),
    ForwardVariant("bf16", 128, 128, cluster=True, dropout=True),
    ForwardVariant("bf16", 192, 128, mask="causal", dropout=True),
    ForwardVariant("fp16", 192, 192, mask="local", dropout=True),
    ForwardVariant("bf16", 256, 256, mask="causal", dropout=True),
    ForwardVariant("bf16", 256, 256, mask="local", dropout=True),
)
VARIANTS = by_default((*DEFAULT, *SLOW), [CAUSAL])
#: (batch, seqlen_q, seqlen_k, heads, heads_kv): one row, both sides of a tile, primes, no key.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 127, 129, 2, 1),
    (2, 193, 131, 4, 2),
    (1, 61, 353, 2, 2),
    (2, 3, 0, 1, 1),
]
PROBABILITIES = [1 / 65536, 0.1, 0.5, 0.999]
#: All 64 bits count.
SEED = 0x0123456789ABCDEF


def options(variant: ForwardVariant, heads: int) -> dict:
    """What gives a variant's compiled choices something to do."""
    slopes = {"alibi_slopes": torch.linspace(0.02, 0.3, heads)} if variant.alibi else {}
    return {**masks(variant), **slopes, "dropout_p": 0.2, "dropout_seed": SEED}


def dense(variant: ForwardVariant, shape: tuple[int, ...], **given) -> Call:
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    q, k, v = draw(variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch)
    return Call(q, k, v, variant.head_dim**-0.5, **{**options(variant, heads), **given})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(variant, shape):
    if variant.cluster and shape[2] == 0:
        shape = (2, 300, 17, 1, 1)
    check(variant, dense(variant, shape), seeds=(0, 1))


@pytest.mark.parametrize("variant", by_default((*DEFAULT, *SLOW[:3]), [CAUSAL]))
def test_packed_with_used_lengths(variant):
    """Rows and columns count from the start of a sequence, used or not, and the batch counts."""
    indices = {
        "cu_seqlens_q": packed([5, 0, 130, 1, 64]),
        "cu_seqlens_k": packed([7, 40, 141, 1, 64]),
        "seqused_q": int32([5, 0, 99, 1, 64]),
        "seqused_k": int32([3, 11, 137, 0, 64]),
    }
    q, k, v = draw(variant, 200, 253, 4, 2)
    lengths = {"max_seqlen_q": 130, "max_seqlen_k": 141}
    call = Call(q, k, v, 0.125, **options(variant, 4), indices=indices, **lengths)
    check(variant, call, Schedule(num_ctas=3), seeds=(0, 1))


@pytest.mark.parametrize("p", PROBABILITIES)
def test_probabilities(p):
    check(CAUSAL, dense(CAUSAL, (1, 130, 150, 2, 1), dropout_p=p), seeds=(1,))


def test_sinks():
    """A sink is a logit that nobody drops."""
    sinks = torch.tensor([0.5, 3.0])
    check(CAUSAL, dense(CAUSAL, (1, 70, 130, 2, 1), s_aux=sinks), seeds=(1,))


def kept_by(variant: ForwardVariant, call: Call) -> torch.Tensor:
    """The keys that reach O, (batch, heads, seqlen_q, seqlen_k): an identity for V shows them."""
    width, keys = call.v.shape[-1], call.k.shape[1]
    found = []
    for first in range(0, keys, width):
        v = torch.zeros_like(call.v)
        some = min(width, keys - first)
        v[:, first : first + some, :, :some] = torch.eye(some, dtype=v.dtype)[:, None]
        o, _ = launch(variant, replace(call, v=v), seed=2)
        found.append(o[..., :some].transpose(1, 2) != 0)
    return torch.cat(found, dim=-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mask_is_the_published_one(variant):
    shape = (2, 70, 259, 4, 2)
    call = dense(variant, shape, dropout_p=0.3, softcap=9.0 if variant.softcap else 0.0)
    found = kept_by(variant, replace(call, q=call.q / 8))
    seen = kept_by(variant, replace(call, q=call.q / 8, dropout_p=1e-9))
    mask = flash8.dropout_mask(SEED, 2, 4, 70, 259, 0.3)
    assert torch.equal(found, mask & seen)
    visible = seen.sum()
    dropped = 1.0 - found.sum() / visible
    assert abs(dropped - 0.3) < 5 * (0.21 / visible) ** 0.5


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_mask_of_a_probability(p):
    call = dense(CAUSAL, (1, 130, 150, 2, 1), causal=False, window=(-1, 0), dropout_p=p)
    found = kept_by(CAUSAL, replace(call, q=call.q / 8))
    seen = kept_by(CAUSAL, replace(call, q=call.q / 8, dropout_p=1e-9))
    assert torch.equal(found, flash8.dropout_mask(SEED, 1, 2, 130, 150, p) & seen)


@pytest.mark.parametrize("variant", by_default(DEFAULT, [CAUSAL]))
def test_no_spills(variant):
    assert not compile_unit(variant.unit()).report.problems()


@pytest.mark.parametrize("seed", [0, -1, 1 << 40, -(2**63)])
def test_all_bits_of_the_seed_count(seed):
    call = dense(CAUSAL, (1, 33, 65, 1, 1), dropout_seed=seed)
    o, lse = check(CAUSAL, call, seeds=(0,))
    other = replace(call, dropout_seed=seed ^ (1 << 40))
    assert not torch.equal(launch(CAUSAL, other)[0], o)
    assert torch.equal(launch(CAUSAL, other)[1], lse)


@pytest.mark.parametrize("p", [1.0 - 2**-18, 2**-18])
def test_all_or_nothing(p):
    """p * 65536 is rounded: every probability is dropped, or none."""
    call = dense(CAUSAL, (1, 40, 50, 1, 1), dropout_p=p)
    o, lse = launch(CAUSAL, call)
    if p > 0.5:
        assert not o.any()
    else:
        compare(replace(call, dropout_p=0.0), o, lse)


@pytest.mark.parametrize(
    "bad",
    [{"dropout_seed": SEED ^ 1}, {"dropout_seed": SEED ^ (1 << 40)}, {"dropout_p": 0.21}],
    ids=str,
)
def test_the_bounds_catch(bad):
    call = dense(CAUSAL, (1, 70, 90, 2, 1))
    o, lse = launch(CAUSAL, replace(call, **bad))
    with pytest.raises(AssertionError):
        compare(call, o, lse)


# --------------------------------------------------------------------------------------------- FP8


@pytest.mark.slow
def test_fp8():
    """P is dropped before it is rounded; LSE keeps what V's descale and dropout scale O by."""
    given = {"dropout_p": 0.2, "dropout_seed": SEED}
    for call in (
        dense_call(FP8, 2, 193, 331, 4, 2, **given),
        fp8_packed_call(FP8, **given),
    ):
        check(FP8, call, seeds=(0, 1))


@pytest.mark.slow
def test_the_mask_of_fp8_is_the_published_one():
    call = dense_call(FP8, 1, 70, 259, 2, 1, dropout_p=0.3, dropout_seed=SEED)
    found = kept_by(FP8, replace(call, q=torch.zeros_like(call.q)))
    seen = kept_by(FP8, replace(call, q=torch.zeros_like(call.q), dropout_p=1e-9))
    assert torch.equal(found, flash8.dropout_mask(SEED, 1, 2, 70, 259, 0.3) & seen)


# ------------------------------------------------------------------------------------------ faults

DROPOUT, CONSUMER, LOOP = (
    "attention/dropout.cuh",
    "forward/consumer.cuh",
    "forward/mainloop.cuh",
)

FAULTS = (
    Fault("row", CAUSAL, (DROPOUT, "row_ = row.query;", "row_ = first_row;")),
    Fault("row_of_a_folded_head", FOLDED, (DROPOUT, "row_ = row.query;", "row_ = first_row;")),
    Fault("head", CAUSAL, (DROPOUT, "+ row.head;", "+ 0 * row.head;")),
    Fault("head_of_a_folded_row", FOLDED, (DROPOUT, "+ row.head;", "+ tile.head;")),
    Fault("batch", CAUSAL, (DROPOUT, "tile.batch * params.heads_q", "0")),
    Fault("column", CAUSAL, (DROPOUT, "+ lane() % 2;", ";")),
    Fault("block", CAUSAL, (DROPOUT, "first = n_block *", "first = 0 * n_block *")),
    Fault("lanes", CAUSAL, (DROPOUT, "transpose_quad(words, lane());", "")),
    Fault("rounds", CAUSAL, (DROPOUT, "kRounds = 7", "kRounds = 10")),
    Fault("seed", CAUSAL, (DROPOUT, "seed >> 32", "seed >> 31")),
    Fault("scale", CAUSAL, (CONSUMER, "scales.v_scale = params_.dropout.keep_scale;", "")),
    Fault(
        "row_sum",
        CAUSAL,
        (LOOP, "alpha);\n        dropout_.apply(s, last);", "alpha);"),
        (
            (
                LOOP,
                "        softmax.template step<true",
                "dropout_.apply(s, last);\nsoftmax.template step<true",
            ),
            (DROPOUT, "rows(r, column) : 0.0f", "rows(r, column) : -INFINITY"),
        ),
    ),
)


@pytest.mark.parametrize("fault", by_default(FAULTS, []))
def test_a_fault_is_found(fault, tmp_path):
    changed = changed_kernel(tmp_path, fault.variant, *fault.edits)
    call = dense(fault.variant, (2, 70, 150, 4, 2))
    with pytest.raises((AssertionError, RuntimeError)):
        compare(call, *changed(call, Schedule()))


# ----------------------------------------------------------------------------- the public functions


def test_the_public_function_drops(monkeypatch):
    q, k, v = draw(CAUSAL, 150, 150, 2, 2, batch=2)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(
            q, k, v, causal=True, dropout_p=0.1, dropout_seed=SEED, return_attn_probs=True
        )
    assert device().report()["kernel"] == "flash8_forward"
    scale = 128**-0.5
    compare(Call(q, k, v, scale, causal=True, dropout_p=0.1, dropout_seed=SEED), o, lse)


def test_a_seed_is_drawn_where_there_is_none(monkeypatch):
    """By torch's generator, as without a kernel: manual_seed holds."""
    q, k, v = draw(CAUSAL, 40, 50, 2, 2, batch=1)

    def run() -> torch.Tensor:
        return flash8.flash_attn_func(q, k, v, causal=True, dropout_p=0.3)

    torch.manual_seed(5)
    want = run()
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        torch.manual_seed(5)
        first, second = run(), run()
    assert tolerances.rel_l2(first, want.double()) < 1e-2
    assert not torch.equal(first, second)

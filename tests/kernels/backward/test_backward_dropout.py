"""Dropout in the backward kernel: the forward's mask bit for bit, and gradients behind it."""

import warnings
from dataclasses import replace

import pytest
import torch

import flash8
from backward_cases import Problem, check, compare, draw, launch, saved
from cases import Case, as_leaves, build, check_backward, gradients, run_flash8, upstream
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.compiler import compile_unit
from forward_cases import device, int32, packed
from fp8_forward_cases import changed_sources
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal", dropout=True)
NARROW = BackwardVariant("fp16", 64, 64, mask="local", softcap=True, dropout=True)
SPLIT = BackwardVariant("bf16", 192, 128, mask="causal", dropout=True)
DEFAULT = (CAUSAL, NARROW, SPLIT)
SLOW = (
    BackwardVariant("bf16", 128, 128, dropout=True, deterministic=True),
    BackwardVariant("fp16", 64, 64, mask="causal", dropout=True),
    BackwardVariant("bf16", 64, 64, alibi=True, dropout=True, dq="reduced"),
    BackwardVariant("bf16", 96, 96, mask="causal", dropout=True),
    BackwardVariant("bf16", 128, 128, mask="local", softcap=True, alibi=True, dropout=True),
    BackwardVariant("fp16", 192, 192, softcap=True, dropout=True),
    BackwardVariant("bf16", 256, 256, mask="causal", dropout=True),
    BackwardVariant("bf16", 256, 256, mask="local", dropout=True, deterministic=True),
)
VARIANTS = by_default((*DEFAULT, *SLOW), [CAUSAL])
#: (batch, seqlen_q, seqlen_k, heads, heads_kv): one row, both sides of a tile, primes, no key.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 193, 131, 4, 2),
    (1, 65, 257, 3, 1),
    (2, 3, 0, 1, 1),
]
PROBABILITIES = [1 / 65536, 0.1, 0.5, 0.999]
SEED = 0x0123456789ABCDEF


def options(variant: BackwardVariant, heads: int) -> dict:
    """What gives a variant's compiled choices something to do."""
    slopes = {"alibi_slopes": torch.linspace(0.02, 0.3, heads)} if variant.alibi else {}
    return {**slopes, "dropout_p": 0.2, "dropout_seed": SEED}


def dense(variant: BackwardVariant, shape: tuple[int, ...], **given) -> Problem:
    batch, seqlen_q, seqlen_k, heads, heads_kv = shape
    given = {**options(variant, heads), **given}
    return draw(variant, seqlen_q, seqlen_k, heads, heads_kv, batch=batch, **given)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(variant, shape):
    check(variant, dense(variant, shape), seeds=(0, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_with_used_lengths(variant):
    """Rows and columns count from the start of a sequence, used or not, and the batch counts."""
    indices = {
        "cu_seqlens_q": packed([5, 0, 130, 1, 64]) + 3,
        "cu_seqlens_k": packed([7, 40, 141, 1, 64]) + 2,
        "seqused_q": int32([5, 0, 99, 1, 64]),
        "seqused_k": int32([3, 11, 137, 0, 64]),
    }
    lengths = {"max_seqlen_q": 130, "max_seqlen_k": 141}
    given = {**options(variant, 2), **lengths, "indices": indices}
    check(variant, draw(variant, 211, 260, 2, 1, with_dlse=True, **given), seeds=(0, 1))


@pytest.mark.parametrize("p", PROBABILITIES)
def test_probabilities(p):
    check(CAUSAL, dense(CAUSAL, (1, 130, 150, 2, 1), dropout_p=p), seeds=(1,))


def test_everything_may_be_dropped():
    problem = dense(CAUSAL, (1, 70, 90, 1, 1), dropout_p=1.0 - 2**-18)
    got = launch(CAUSAL, saved(problem))
    assert not (got.dq.any() or got.dk.any() or got.dv.any())


@pytest.mark.parametrize("variant", by_default(DEFAULT, [CAUSAL]))
@pytest.mark.parametrize("splits", [2, 3])
def test_heads_that_ctas_share(variant, splits):
    """A split has query heads of its own, and the splits' sums of dV lack the scale."""
    problem = dense(variant, (2, 70, 150, 3, 1))
    check(variant, replace(problem, head_splits=splits), seeds=(0, 1))


@pytest.mark.parametrize("variant", by_default(DEFAULT, [CAUSAL]))
def test_sinks_and_the_gradient_of_lse(variant):
    sinks = torch.tensor([0.5, 3.0])
    problem = dense(variant, (2, 140, 130, 2, 1), s_aux=sinks, with_dlse=True)
    check(variant, problem, seeds=(1,))


def test_keys_with_a_bias():
    """What K - mean(K) takes off dQ comes back whole: rowsum(dS) does not change."""
    problem = dense(CAUSAL, (2, 140, 300, 2, 1))
    k = (problem.call.k.float() + torch.linspace(-8, 8, 128)).to(problem.call.k.dtype)
    mean = k.float().mean(dim=1)
    biased = replace(problem, call=replace(problem.call, k=k), k_mean=mean)
    check(CAUSAL, biased, seeds=(1,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mask_is_the_published_one(variant):
    """With q = 0 and an identity for dO, dV^T is P behind dropout, and shows what is kept."""
    queries, keys = 64, 150
    problem = dense(variant, (2, 150, keys, 2, 2), dropout_p=0.3)
    call = replace(problem.call, q=torch.zeros_like(problem.call.q))
    found = []
    for first in (0, queries):
        dout = torch.zeros_like(problem.dout)
        dout[:, first : first + queries, :, :queries] = torch.eye(queries, dtype=dout.dtype)[
            :, None
        ]
        dv = launch(variant, saved(Problem(call, dout)), seed=2).dv
        seen = launch(variant, saved(Problem(replace(call, dropout_p=1e-9), dout)), seed=2).dv
        mask = flash8.dropout_mask(SEED, 2, 2, 150, keys, 0.3)[:, :, first : first + queries]
        visible = (seen[..., :queries] != 0).permute(0, 2, 3, 1)
        assert torch.equal((dv[..., :queries] != 0).permute(0, 2, 3, 1), mask & visible)
        found.append(mask[visible])
    kept = torch.cat(found).double()
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5


@pytest.mark.parametrize("variant", by_default([CAUSAL, SPLIT], [CAUSAL]))
def test_no_spills(variant):
    assert not compile_unit(variant.unit()).report.problems()


@pytest.mark.slow
def test_deterministic_gradients_have_one_bit_pattern():
    ordered = SLOW[0]
    check(ordered, dense(ordered, (1, 130, 700, 1, 1)), seeds=range(10))


@pytest.mark.parametrize(
    "bad",
    [{"dropout_seed": SEED ^ 1}, {"dropout_seed": SEED ^ (1 << 40)}, {"dropout_p": 0.22}],
    ids=str,
)
def test_the_bounds_catch(bad):
    problem = dense(CAUSAL, (1, 70, 90, 2, 1))
    given = saved(problem)
    got = launch(CAUSAL, replace(given, call=replace(given.call, **bad)))
    with pytest.raises(AssertionError):
        compare(problem, got)


# ------------------------------------------------------------------------------------------ faults

KEPT, LOOP, WIDE = "backward/kept.cuh", "backward/mainloop.cuh", "backward/mainloop_split.cuh"
EPILOGUE, PROBABILITIES_H = "backward/epilogue.cuh", "backward/probabilities.cuh"

FAULTS = (
    Fault("row", CAUSAL, (KEPT, "first_query + query", "query")),
    Fault("row_of_a_pair", CAUSAL, (KEPT, "+ byte % 2;", ";")),
    Fault("half_of_the_keys", CAUSAL, (KEPT, "kKeysPerDraw + g / 4", "kKeysPerDraw")),
    Fault("block_of_keys", CAUSAL, (KEPT, "read_again(shared.tile.n_block) *", "0 *")),
    Fault("head", CAUSAL, (KEPT, "tile.first_head + g;", "tile.first_head;")),
    Fault("next_head", CAUSAL, (LOOP, "kept_.next_head(params_, tile, head);", "")),
    Fault("batch", CAUSAL, (KEPT, "tile.batch * params.heads_q", "0")),
    Fault("key_of_a_lane", CAUSAL, (KEPT, "given >> g &", "given >> 0 &")),
    Fault("lane", CAUSAL, (KEPT, "4 * from + lane % 4", "4 * from")),
    Fault("dp_kept", CAUSAL, (KEPT, "keep(dp, at) * params", "dp * params")),
    Fault("dp_scale", CAUSAL, (KEPT, "keep(dp, at) * params.dropout.keep_scale", "keep(dp, at)")),
    Fault("dv_scale", CAUSAL, (EPILOGUE, "Config::kDropout ? params", "false ? params")),
    Fault("p_kept", CAUSAL, (LOOP, "kept_.keep(s(2 * i), 2 * i)", "s(2 * i)")),
    Fault(
        "wide_p_kept", SPLIT, (WIDE, "write(shared_.p, s, kept_);", "write(shared_.p, s, All{});")
    ),
    Fault("wide_row", SPLIT, (KEPT, "first_query + query", "query")),
    Fault(
        "capped_p_kept",
        NARROW,
        (PROBABILITIES_H, "kept.keep(probability[0], at)", "probability[0]"),
    ),
    Fault("second_word", NARROW, (KEPT, "(2 * word + byte / 2)", "(byte / 2)")),
)


@pytest.mark.parametrize("fault", by_default(FAULTS, []))
def test_a_fault_is_found(fault, tmp_path):
    root = changed_sources(tmp_path, fault.edit)
    problem = dense(fault.variant, (2, 150, 190, 4, 2))
    with pytest.raises((AssertionError, RuntimeError)):
        check(fault.variant, problem, seeds=(1,), root=root)


# ----------------------------------------------------------------------------- the public functions

CASE = Case(
    (150, 150),
    (203, 203),
    heads=4,
    heads_kv=4,
    head_dim=128,
    head_dim_v=128,
    dtype=torch.bfloat16,
    causal=True,
    dropout_p=0.1,
)
CASES = {
    "dense": CASE,
    "grouped heads": CASE.with_(heads_kv=2, sink=True),
    "packed": CASE.with_(
        seqlens_q=(70, 0, 130, 1), seqlens_k=(90, 33, 130, 0), layout="packed", tail=5, poison=True
    ),
    "192 and 128 channels": CASE.with_(head_dim=192),
}


@pytest.mark.parametrize("name", by_default(CASES, ["dense"]))
def test_gradients_of_the_public_functions(name, monkeypatch):
    problem = build(CASES[name])
    d_out, d_lse = upstream(problem)
    with device().serving_cpu_tensors(monkeypatch, seed=3), warnings.catch_warnings():
        warnings.simplefilter("error")  # of a call that no kernel serves
        found = gradients(as_leaves(problem), run_flash8, d_out, d_lse)
        assert device().report()["kernel"] == "flash8_backward_postprocess"
    check_backward(problem, found=found)


def test_forward_and_backward_draw_once(monkeypatch):
    """Without a seed the forward draws one, and the backward has the same."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 90, 2, 128, generator=g).bfloat16() for _ in range(3))

    def run() -> list[torch.Tensor]:
        torch.manual_seed(11)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        flash8.flash_attn_func(*leaves, causal=True, dropout_p=0.3).sum().backward()
        return [x.grad for x in leaves]

    want = run()
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        found = run()
    for x, y in zip(found, want, strict=True):
        assert (x.double() - y.double()).norm() < 1e-2 * y.double().norm()

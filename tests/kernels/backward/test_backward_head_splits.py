"""Query heads of a KV head shared out to several CTAs: dK and dV are sums of what each has made."""

from dataclasses import dataclass, replace

import pytest
import torch

import flash8
import tolerances
from backward_cases import Problem, check, draw, launch, same_bits, saved
from defaults import by_default
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import heuristics
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import device, int32, packed
from fp8_forward_cases import changed_sources
from simulated_device import missing_compiler

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal")
ORDERED = BackwardVariant("bf16", 128, 128, deterministic=True)
LOCAL = BackwardVariant("fp16", 64, 64, mask="local")
NARROW = BackwardVariant("bf16", 96, 96, mask="causal")
MLA = BackwardVariant("bf16", 192, 128, mask="causal")
WIDE = BackwardVariant("bf16", 256, 256, mask="local", deterministic=True)
REDUCED = BackwardVariant("fp16", 128, 128, mask="causal", dq="reduced")
BIASED = BackwardVariant("bf16", 64, 64, alibi=True)


@dataclass(frozen=True)
class Case:
    """So many query heads and KV heads, and CTAs that share a KV head's."""

    variant: BackwardVariant
    heads: int
    heads_kv: int
    splits: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.heads}-{self.heads_kv}-{self.splits}"

    def draw(self, rows_q: int, rows_k: int, **options) -> Problem:
        """With something to do for a variant's compiled choices."""
        if self.variant.alibi:
            options["alibi_slopes"] = torch.linspace(0.02, 0.3, self.heads)
        problem = draw(self.variant, rows_q, rows_k, self.heads, self.heads_kv, **options)
        return replace(problem, head_splits=self.splits)


#: Splits that have as many heads each, and others.
CASES = [
    Case(CAUSAL, 4, 1, 2),
    Case(ORDERED, 4, 1, 3),
    Case(LOCAL, 8, 2, 4),
    Case(MLA, 3, 1, 2),
    Case(WIDE, 4, 2, 2),
    Case(CAUSAL, 8, 1, 3),
    Case(ORDERED, 8, 1, 8),
    Case(NARROW, 6, 2, 3),
    Case(LOCAL, 5, 1, 3),
    Case(REDUCED, 6, 1, 4),
    Case(BIASED, 6, 2, 2),
]
KEPT = CASES[:2]


@needs_compiler
@pytest.mark.parametrize("case", by_default(CASES, KEPT))
def test_dense(case):
    """Ragged blocks of queries and of keys, the last block of keys with a few keys only."""
    check(case.variant, case.draw(75, 2 * 64 + 70, batch=2, with_dlse=True), seeds=(0, 1))


@needs_compiler
@pytest.mark.parametrize("case", by_default(CASES, KEPT))
def test_packed_with_used_lengths(case):
    """Some sequences have no query, no key or neither, and rows at both ends belong to none."""
    indices = {
        "cu_seqlens_q": packed([5, 0, 70, 1, 64]) + 3,
        "cu_seqlens_k": packed([7, 40, 141, 1, 64]) + 2,
        "seqused_q": int32([5, 0, 66, 1, 64]),
        "seqused_k": int32([3, 11, 137, 0, 64]),
    }
    lengths = {"max_seqlen_q": 70, "max_seqlen_k": 141}
    check(case.variant, case.draw(150, 260, indices=indices, **lengths), seeds=(0, 1))


@needs_compiler
def test_sinks_and_a_mean_of_keys():
    sinks = torch.tensor([0.5, 3.0, -1.0, 2.0])
    problem = draw(CAUSAL, 70, 140, 4, 1, batch=2, s_aux=sinks, with_dlse=True)
    mean = problem.call.k.float().mean(dim=1)
    check(CAUSAL, replace(problem, k_mean=mean, head_splits=3), seeds=(0, 1))


@needs_compiler
def test_without_keys_or_queries():
    for rows_q, rows_k in ((3, 0), (0, 3)):
        problem = replace(draw(CAUSAL, rows_q, rows_k, 4, 1, batch=2), head_splits=2)
        check(CAUSAL, problem, seeds=(0,))


@needs_compiler
def test_dq_has_the_bits_that_it_has_without_splits():
    problem = draw(ORDERED, 70, 300, 4, 1, batch=1)
    whole, *others = (
        launch(ORDERED, saved(replace(problem, head_splits=n)), seed=n) for n in (1, 2, 3)
    )
    assert whole.dkv_sums is None
    for other in others:
        assert same_bits(other.dq_sums, whole.dq_sums) and torch.equal(other.dq, whole.dq)
        for name in ("dk", "dv"):
            assert tolerances.rel_l2(getattr(other, name), getattr(whole, name).double()) < 3e-3


@needs_compiler
def test_splits_are_added_up_in_their_order():
    """Bit for bit what fp32 makes of the sums in the workspace, the first split first."""
    found = ordered_problem()
    wanted = added_up(found.dkv_sums, range(3))
    assert torch.equal(found.dk[0, :, 0], (wanted * 128**-0.5).bfloat16()[:130])
    other = added_up(found.dkv_sums, (2, 1, 0))
    assert not torch.equal(found.dk[0, :, 0], (other * 128**-0.5).bfloat16()[:130])


def ordered_problem(root=None):
    problem = draw(ORDERED, 70, 130, 4, 1, batch=1)
    return launch(ORDERED, saved(replace(problem, head_splits=3)), seed=1, root=root)


def added_up(sums, order):
    """dK by key, without its scale, of partial sums in the order of the accumulators."""
    splits = sums.view(2, 3, 2 * 128 * 128)[:, :, : 128 * 128]  # blocks of keys, splits
    total = torch.zeros_like(splits[:, 0])
    for split in order:
        total = total + splits[:, split]
    # Warpgroup, eights of channels, warp, row of eight, lane of a quad, one of two rows, of a pair.
    parts = total.view(2, 2, 16, 4, 8, 4, 2, 2)
    return parts.permute(0, 1, 3, 6, 4, 2, 5, 7).reshape(256, 128)


# ------------------------------------------------------------------------------- planted faults


SUM, TILE = "backward/head_splits.cuh", "backward/key_tile.cuh"
FAULTS = {
    "a split is left out": (SUM, "int split = 0; split <", "int split = 1; split <"),
    "one place for all": (SUM, "params.head_splits + split)", "params.head_splits)"),
    "blocks overlap": (SUM, "first + tile.n_block;", "first;"),
    "scaled as dV": (SUM, "params_.scores.softmax_scale,", "1.0f,"),
    "rows of the next sequence": (SUM, "row < tile_.rows_k", "true"),
    "one head twice": (TILE, "heads / splits - first;", "heads / splits - first + 1;"),
    "heads of another split": (TILE, "heads + first;", "heads + tile.split;"),
    "the wrong KV head": (TILE, "found.head / splits;", "found.head % params.heads_kv;"),
}


@needs_compiler
@pytest.mark.parametrize("name", by_default(FAULTS, ["a split is left out"]))
def test_fault_is_found(name, tmp_path):
    root = changed_sources(tmp_path, FAULTS[name])
    problem = draw(CAUSAL, 70, 200, 10, 2, batch=1)  # halves of five heads
    with pytest.raises((AssertionError, RuntimeError)):
        check(CAUSAL, replace(problem, head_splits=2), seeds=(0, 1), root=root)


@pytest.mark.slow
@needs_compiler
def test_another_order_is_found(tmp_path):
    """Of the sums; it gives the same numbers but for their last bits."""
    backwards = "float2 const* given = pairs + (params_.head_splits - 1) * (Tiles::kDkvFloats / 2);"
    root = changed_sources(
        tmp_path,
        (SUM, "float2 const* given = pairs;", backwards),
        (SUM, "given += Tiles::kDkvFloats / 2;", "given -= Tiles::kDkvFloats / 2;"),
    )
    found = ordered_problem(root)
    wanted = added_up(found.dkv_sums, range(3))
    assert not torch.equal(found.dk[0, :, 0], (wanted * 128**-0.5).bfloat16()[:130])


# ------------------------------------------------------------------------------- public functions


def trained(monkeypatch, splits: int, *, beside: int = 0):
    """Gradients of a call whose query heads are split."""
    g = torch.Generator().manual_seed(7)
    q, k, v, dout = (
        torch.randn(2, 70, heads, 128, generator=g).bfloat16() for heads in (8, 2, 2, 8)
    )
    launch_kernels = hopper.launch

    def moved(planned, stream):
        assert planned.call.head_splits == splits
        if beside:
            planned.call.dkv_partial += beside
        launch_kernels(planned, stream)

    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(heuristics, "head_splits", lambda *_: splits)
        patch.setattr(hopper, "launch", moved)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = flash8.flash_attn_func(*leaves, causal=True)
        return torch.autograd.grad(out, leaves, dout)


@needs_compiler
def test_public_functions_get_the_same_gradients(monkeypatch):
    whole = trained(monkeypatch, 1)
    for found, wanted in zip(trained(monkeypatch, 3), whole, strict=True):
        assert tolerances.rel_l2(found, wanted.double()) < 3e-3


@needs_compiler
def test_a_store_behind_the_sums_is_found(monkeypatch):
    with pytest.raises(AssertionError, match="beside"):
        trained(monkeypatch, 2, beside=128)


@pytest.mark.parametrize(
    ("tiles", "group", "seqlen_q", "splits"),
    [
        (132, 8, 8192, 1),  # as many tiles as multiprocessors
        (64, 1, 8192, 1),  # nothing to share out
        (64, 8, 8192, 2),  # 128 CTAs with half the heads
        (16, 8, 8192, 8),
        (16, 6, 8192, 6),
        (40, 7, 8192, 3),  # 3 heads at most; with 4 splits there would be two waves
        (16, 8, 100, 2),  # short sequences: the sums take longer than the heads
        (2, 2, 100, 1),
        (0, 8, 100, 1),
    ],
)
def test_when_heads_are_split(tiles, group, seqlen_q, splits):
    assert heuristics.head_splits(tiles, group, seqlen_q, 132) == splits

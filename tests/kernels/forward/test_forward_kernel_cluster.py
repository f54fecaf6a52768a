"""Two CTAs that load K and V together and send every share to both."""

from dataclasses import replace

import pytest
import torch

import flash8
from defaults import by_default
from flash8.backends.hopper import heuristics, kernels
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import check, compare, device, draw, int32, launch, packed
from forward_launch import Call, Schedule
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

PAIR = ForwardVariant("bf16", 128, 128, cluster=True)
WIDE_PAIR = ForwardVariant("fp16", 256, 256, cluster=True)


def scale(variant: ForwardVariant) -> float:
    return variant.head_dim**-0.5


@pytest.mark.parametrize("variant", by_default([PAIR, WIDE_PAIR], [PAIR]))
@pytest.mark.parametrize("seqlen_q", [1, 128, 129, 256, 300])
@pytest.mark.parametrize("seqlen_k", [1, 80, 353])
def test_dense(variant, seqlen_q, seqlen_k):
    """One, two and three blocks of rows: with an odd number, one CTA has keys but no rows."""
    q, k, v = draw(variant, seqlen_q, seqlen_k, 2, 1, batch=1)
    check(variant, Call(q, k, v, scale(variant)), Schedule(num_ctas=4))


@pytest.mark.parametrize("num_ctas", [1, 2, 5, 132])
def test_clusters_share_the_tiles(num_ctas):
    q, k, v = draw(PAIR, 400, 190, 3, 3, batch=2)
    check(PAIR, Call(q, k, v, scale(PAIR)), Schedule(num_ctas=num_ctas))


def test_lengths_on_the_device():
    q, k, v = draw(PAIR, 300, 400, 2, 1, batch=3)
    indices = {"seqused_q": int32([300, 100, 0]), "seqused_k": int32([0, 399, 177])}
    check(PAIR, Call(q, k, v, scale(PAIR), indices=indices), Schedule(num_ctas=4))
    lengths_q, lengths_k = [257, 0, 3, 130], [177, 3, 0, 352]
    q, k, v = draw(PAIR, sum(lengths_q) + 2, sum(lengths_k), 2, 1)
    indices = {"cu_seqlens_q": packed(lengths_q), "cu_seqlens_k": packed(lengths_k)}
    call = Call(q, k, v, scale(PAIR), indices=indices, max_seqlen_q=257, max_seqlen_k=352)
    check(PAIR, call, Schedule(num_ctas=4))


def test_many_seeds_give_the_same_bits():
    q, k, v = draw(PAIR, 200, 800, 1, 1, batch=1)
    check(PAIR, Call(q, k, v, scale(PAIR)), seeds=range(12))


def test_the_bounds_catch_swapped_shares():
    q, k, v = draw(PAIR, 200, 352, 1, 1, batch=1)
    good = Call(q, k, v, scale(PAIR))
    share = 176 // 2
    swapped = torch.cat((v[:, share : 2 * share], v[:, :share], v[:, 2 * share :]), dim=1)
    o, lse = launch(PAIR, replace(good, v=swapped))
    with pytest.raises(AssertionError):
        compare(good, o, lse)


@pytest.mark.parametrize(
    ("seqlen_q", "ratio", "head_dim", "clusters"),
    [(256, 1, 128, True), (300, 1, 128, False), (8192, 1, 64, False), (32, 8, 256, True)],
)
def test_when_ctas_share_loads(seqlen_q, ratio, head_dim, clusters):
    assert heuristics.loads_in_clusters(seqlen_q, ratio, head_dim, False) == clusters


def test_the_public_function_uses_clusters(monkeypatch):
    q, k, v = draw(PAIR, 200, 260, 2, 2, batch=1)
    with device().serving_cpu_tensors(monkeypatch, seed=3):
        o, lse = flash8.flash_attn_func(q, k, v, return_attn_probs=True)
    assert device().report()["kernel"] == "flash8_forward"
    assert kernels.variant_of(PAIR.name) == PAIR
    compare(Call(q, k, v, scale(PAIR)), o, lse)

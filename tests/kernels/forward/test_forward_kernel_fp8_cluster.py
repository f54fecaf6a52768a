"""FP8: two CTAs that load K and V together, with V by token and v_colmajor."""

from dataclasses import replace

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper import heuristics
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import check, compare, int32, launch
from forward_launch import Schedule
from fp8_forward_cases import changed_kernel, dense_call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BY_TOKEN = ForwardVariant("e4m3", 192, 192, scales="head", cluster=True)
V_COLMAJOR = ForwardVariant("e4m3", 128, 128, scales="block", cluster=True, v_colmajor=True)
BLOCKS = ForwardVariant("e4m3", 64, 64, scales="block", cluster=True)
VARIANTS = by_default([BY_TOKEN, V_COLMAJOR, BLOCKS], [BY_TOKEN, V_COLMAJOR])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seqlen_q", [1, 129, 400])
@pytest.mark.parametrize("seqlen_k", [1, 353, 512])
def test_dense(variant, seqlen_q, seqlen_k):
    """With an odd number of blocks of rows one CTA has keys but no rows."""
    check(variant, dense_call(variant, 1, seqlen_q, seqlen_k, 2, 1), Schedule(num_ctas=4))


@pytest.mark.parametrize("variant", [BY_TOKEN, V_COLMAJOR], ids=lambda v: v.name)
def test_lengths_on_the_device(variant):
    indices = {"seqused_q": int32([300, 100, 0]), "seqused_k": int32([0, 399, 177])}
    check(variant, dense_call(variant, 3, 300, 400, 2, 1, indices=indices), Schedule(num_ctas=4))


@pytest.mark.parametrize("variant", [BY_TOKEN, V_COLMAJOR], ids=lambda v: v.name)
def test_many_seeds_give_the_same_bits(variant):
    check(variant, dense_call(variant, 1, 200, 800, 1, 1), seeds=range(12))


@pytest.mark.parametrize("variant", by_default([BY_TOKEN, V_COLMAJOR], []))
def test_a_cluster_computes_what_one_cta_does(variant):
    call = dense_call(variant, 1, 256, 500, 1, 1)
    o, lse = launch(variant, call)
    alone, lse_alone = launch(replace(variant, cluster=False), call)
    assert torch.equal(o, alone) and torch.equal(lse, lse_alone)


@pytest.mark.slow
def test_the_bounds_catch_shares_of_the_same_cta(tmp_path):
    edit = (
        "forward/producer.cuh",
        "full,\n                     first + key, channel,",
        "full,\n first + key, 0,",
    )
    changed = changed_kernel(tmp_path, V_COLMAJOR, edit)  # fmt: skip
    call = dense_call(V_COLMAJOR, 1, 200, 448, 1, 1)
    compare(call, *launch(V_COLMAJOR, call))
    with pytest.raises(AssertionError):
        compare(call, *changed(call, Schedule()))


@pytest.mark.parametrize(
    ("seqlen_q", "head_dim", "clusters"),
    [(512, 192, True), (384, 192, False), (512, 128, False), (512, 256, False), (512, 160, True)],
)
def test_when_they_are_chosen(seqlen_q, head_dim, clusters):
    assert heuristics.loads_in_clusters(seqlen_q, 1, head_dim, True) == clusters

"""Queries of e4m3 over e4m3 caches in the decode kernel: they are what their fp16 values are."""

from dataclasses import replace

import pytest
import torch

from decode_cases import Cache, check, draw, found_by, launch
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_cases import int32, packed
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8)
OTHERS = (
    replace(E8, dtype="fp16", score_mod=True),
    replace(E8, load="gather"),
    replace(E8, rows=32),
    replace(E8, scales="key"),
    DecodeVariant("bf16", "e4m3", 64, 64, 16),
    DecodeVariant("fp16", "e4m3", 512, 512, 16),
)
LENGTHS = (700, 0, 1, 65, 257)


@pytest.mark.parametrize("variant", by_default([E8, *OTHERS], [E8]))
def test_variants(variant):
    call = draw(
        variant,
        LENGTHS,
        seqlen_q=2,
        heads=16 if variant.rows == 32 else 4,
        heads_kv=2,
        causal=True,
        cache=Cache(3 if variant.load == "gather" else 24),
        softcap=3.0 if variant.score_mod else 0.0,
        e4m3_q=True,
    )
    check(variant, call, ctas=7)


@pytest.mark.parametrize("granularity", ["none", "tensor", "kv_head", "block", "packed block"])
def test_descales(granularity):
    call = draw(E8, LENGTHS, seqlen_q=3, heads_kv=2, causal=True, e4m3_q=True)
    generator = torch.Generator().manual_seed(1)
    shapes = {"tensor": (), "kv_head": (5, 2), "block": (5, 4, 1), "packed block": (1, 4, 5)}
    descale = None
    if granularity != "none":
        descale = (1.0 + torch.rand(shapes[granularity], generator=generator)) / 16.0
    call = replace(call, q_descale=descale)
    if granularity == "packed block":
        indices = {**call.indices, "cu_seqlens_q": packed((3, 2, 0, 6, 4))}
        call = replace(call, q=call.q.reshape(15, 4, 128), indices=indices, max_seqlen_q=6)
    check(E8, call, ctas=7)


def test_many_queries_have_blocks():
    """Rows of 300 queries, in three blocks of 128 at most."""
    call = draw(E8, (400, 31), seqlen_q=300, heads=1, causal=True, e4m3_q=True)
    descale = torch.tensor([[1.0, 1.5, 2.0], [3.0, 0.5, 1.0]])[:, None] / 16.0
    check(E8, replace(call, q_descale=descale), ctas=7, seeds=(0,))


def test_the_bits_are_those_of_fp16_queries():
    """Of the same values, with a descale that the softmax scale takes."""
    variant = replace(E8, dtype="fp16")
    call = draw(variant, LENGTHS, seqlen_q=2, causal=True, e4m3_q=True)
    call = replace(call, q_descale=torch.tensor(0.125))
    wide = {"q": call.q.half(), "q_descale": None, "softmax_scale": call.softmax_scale * 0.125}
    (found,), (want,) = launch(variant, call), launch(variant, replace(call, **wide))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


def test_means_and_sinks():
    generator = torch.Generator().manual_seed(3)
    given = {f"{x}_mean": torch.randn(5, 2, 128, generator=generator) for x in "kv"}
    given["s_aux"] = torch.linspace(-2.0, 6.0, 4)
    call = draw(E8, LENGTHS, heads_kv=2, seqlen_q=3, causal=True, e4m3_q=True, **given)
    check(E8, call, ctas=7)


@pytest.mark.parametrize("descale", [0.0, -1.0, float("inf"), float("nan"), 2.0**127])
def test_an_invalid_descale_shows(descale):
    """In the rows that it belongs to, where they have keys."""
    call = draw(E8, (150, 64, 0, 77), seqlen_q=2, heads=2, causal=True, e4m3_q=True)
    given = call.q_descale.clone()
    given[0, 1] = descale
    ((o, lse),) = launch(E8, replace(call, q_descale=given))
    assert o[0, :, 1].isnan().all() and lse[0, 1].isnan().all()
    ((want, _),) = launch(E8, call)
    assert torch.equal(o[1:], want[1:]) and torch.equal(o[0, :, 0], want[0, :, 0])


ROWS = "decode/rows.cuh"
FAULTS = (
    Fault("q_unscaled", E8, (ROWS, "query_descale(params, info, segment.batch, at)", "1.0f")),
    Fault("mean_unscaled", E8, (ROWS, "            shift *= scale;\n", "")),
    Fault("scaled_by_another_head", E8, (ROWS, "row.head / params", "0 * row.head / params")),
    Fault("the_first_block", E8, (ROWS, "(first + row.query / kScaleBlock)", "first")),
    Fault("blocks_of_dense_rows", E8, (ROWS, "info.offset_q / kScaleBlock + batch", "0")),
    Fault("mean_by_bf16", E8, (ROWS, "ElementChoice::kFp16 || is_fp16", "ElementChoice::kFp16")),
)


@pytest.mark.parametrize("fault", by_default(FAULTS, FAULTS[:1]))
def test_fault_is_found(fault, tmp_path):
    generator = torch.Generator().manual_seed(3)
    means = {f"{x}_mean": torch.randn(5, 2, 128, generator=generator) for x in "kv"}
    call = draw(E8, LENGTHS, heads_kv=2, seqlen_q=3, causal=True, e4m3_q=True, **means)
    blocks = draw(E8, (400, 31), seqlen_q=300, heads=1, causal=True, e4m3_q=True)
    by_block = torch.tensor([[1.0, 1.5, 2.0], [3.0, 0.5, 1.0]])[:, None] / 16.0
    indices = {"seqused_k": int32(LENGTHS), "cu_seqlens_q": packed((3, 2, 0, 6, 4))}
    rows = replace(call, q=call.q.reshape(15, 4, 128), indices=indices, max_seqlen_q=6)
    of_packed = torch.linspace(0.5, 2.5, 20).view(1, 4, 5) / 16.0
    problems = [
        (call, 7),
        (replace(blocks, q_descale=by_block), 3),
        (replace(rows, q_descale=of_packed), 7),
    ]
    found = found_by(fault, problems, (0,), tmp_path)
    assert found is not None, f"{fault.name} is not found"
    print(found)

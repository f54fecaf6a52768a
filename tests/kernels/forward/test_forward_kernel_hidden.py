"""Keys that no query of a tile sees may hold NaN, in K and in V: nothing of it comes through."""

import math
from dataclasses import replace

import pytest
import torch

import oracle
from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import draw, int32, kernel, launch
from forward_launch import Call, Schedule
from fp8_forward_cases import changed_kernel, descales
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

LOCAL8 = ForwardVariant("e4m3", 64, 64, mask="local", softcap=True, scales="block")
CASES = {
    "bf16 causal": (ForwardVariant("bf16", 128, 128, mask="causal"), {"causal": True}),
    "bf16 window": (ForwardVariant("bf16", 64, 64, mask="local"), {"window": (37, 21)}),
    "bf16 left window": (ForwardVariant("bf16", 64, 64, mask="local"), {"window": (300, 0)}),
    "bf16 chunks": (ForwardVariant("bf16", 64, 64, mask="local"), {"attention_chunk": 150}),
    "e4m3 causal": (
        ForwardVariant("e4m3", 128, 128, mask="causal", scales="block"),
        {"causal": True},
    ),
    "e4m3 window": (LOCAL8, {"window": (140, 21), "softcap": 3.0}),
    "e4m3 chunks": (LOCAL8, {"attention_chunk": 150, "softcap": 3.0}),
    "e4m3 causal v_colmajor": (
        ForwardVariant("e4m3", 128, 128, mask="causal", scales="block", v_colmajor=True),
        {"causal": True},
    ),
    "e4m3 window v_colmajor": (
        replace(LOCAL8, v_colmajor=True),
        {"window": (140, 21), "softcap": 3.0},
    ),
    "e4m3 chunks v_colmajor": (
        replace(LOCAL8, v_colmajor=True),
        {"attention_chunk": 150, "softcap": 3.0},
    ),
}
ROWS, KEYS, USED = 200, 460, 451


def problem(variant: ForwardVariant, options: dict) -> Call:
    q, k, v = draw(variant, ROWS, KEYS, 1, 1, batch=1)
    scales = {}
    if variant.dtype == "e4m3":
        scales = {"descales": descales(variant, 1, 1, 1, -(-ROWS // 128), -(-KEYS // 128))}
    indices = {"seqused_k": int32([USED])}
    return Call(q, k, v, variant.head_dim**-0.5, indices=indices, **options, **scales)


def hidden_keys(call: Call, rows: slice) -> torch.Tensor:
    """bool (KEYS,): no query of these rows sees them."""
    window = (call.causal, call.window, call.attention_chunk)
    seen = torch.zeros(KEYS, dtype=torch.bool)
    seen[:USED] = oracle.visible(ROWS, USED, *window)[rows].any(dim=0)
    return ~seen


def poison(call: Call, keys: torch.Tensor) -> Call:
    def with_nan(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide[:, keys] = math.nan
        return wide.to(x.dtype)

    return replace(call, k=with_nan(call.k), v=with_nan(call.v))


def tiles(variant: ForwardVariant) -> list[slice]:
    block = kernel(variant).info.block_m
    return [slice(begin, min(begin + block, ROWS)) for begin in range(0, ROWS, block)]


@pytest.mark.parametrize("name", by_default(CASES, list(CASES)[:8]))
def test_nan_in_keys_that_a_tile_does_not_see(name):
    variant, options = CASES[name]
    call = problem(variant, options)
    o, lse = launch(variant, call)
    for rows in tiles(variant):
        keys = hidden_keys(call, rows)
        assert keys[:USED].any() or rows.stop == ROWS
        found, found_lse = launch(variant, poison(call, keys), seed=rows.start)
        assert torch.equal(found[:, rows], o[:, rows])
        assert torch.equal(found_lse[..., rows], lse[..., rows])


ALL_BEFORE = ("attention/mask.cuh", "blocks.first_key = first_key;", "blocks.first_key = 0;")
ALL_BEHIND = ("attention/mask.cuh", "blocks.end_key = end_key;", "blocks.end_key = seqlen_k_;")


MUTATIONS = {
    "bf16 causal": [ALL_BEHIND],
    "bf16 window": [ALL_BEFORE, ALL_BEHIND],
    "e4m3 window": [ALL_BEFORE, ALL_BEHIND],
}


@pytest.mark.parametrize("name", by_default(MUTATIONS, []))
def test_the_cases_catch_keys_that_are_left(name, tmp_path):
    variant, options = CASES[name]
    call, rows = problem(variant, options), tiles(variant)[0]
    changed = changed_kernel(tmp_path, variant, *MUTATIONS[name])
    found, _ = changed(poison(call, hidden_keys(call, rows)), Schedule())
    assert found[:, rows].isnan().any()

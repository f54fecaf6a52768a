"""Faults planted in how keys get the descales that they have for themselves. Each is found."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decode_cases import Cache, changed_kernel, check, draw, found_by, launch
from decode_launch import Call
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_cases import int32
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

K8 = DecodeVariant("bf16", "e4m3", 128, 128, 8, scales="key")
GATHER = replace(K8, load="gather")
SEEDS = range(1, 9)

SCALES, LOADER, LOOP = "decode/key_scales.cuh", "decode/loader.cuh", "decode/mainloop.cuh"
MERGE, RING, CONFIG = "decode/merge.cuh", "decode/ring.cuh", "decode/config.cuh"
ROWS = "decode/rows.cuh"

FAULTS = (
    # Waits, and who still reads.
    Fault("not_waited_for", K8, (RING, "wait<(Config::kSlots - 1) / 2>", "wait<Config::kSlots>")),
    Fault("a_stage_too_few", K8, (CONFIG, "return slots / 2 + 1;", "return slots / 2;")),
    Fault(
        "groups_not_closed",
        K8,
        (
            LOADER,
            "if constexpr (!Config::kGather) {\n                ptx",
            "if constexpr (false) {\n                ptx",
        ),
    ),
    Fault("stage_not_left", K8, (LOOP, "            key_scales_.leave();\n", "")),
    # Which descale.
    Fault("of_hidden_keys", K8, (LOADER, "first + key < walk.sequence.end &&", "true &&")),
    Fault("of_keys_before", K8, (LOADER, "first + key >= walk.sequence.begin &&", "true &&")),
    Fault(
        "of_no_page",
        GATHER,
        (
            LOADER,
            "place.page < params_.pages.num_pages;\n            Key",
            "true;\n            Key",
        ),
    ),
    Fault("of_the_first_head", K8, (SCALES, "head * ref.head_stride", "0 * ref.head_stride")),
    Fault("of_another_row", K8, (LOADER, " + key - (box << box_shift);", ";")),
    Fault(
        "of_another_box",
        K8,
        (
            LOADER,
            "place.page = __shfl_sync(0xffffffff, places_[0].page, box);",
            "place.page = __shfl_sync(0xffffffff, places_[0].page, 0);",
        ),
    ),
    Fault("of_another_block", K8, (SCALES, "(31 - __clz(rows))", "0")),
    Fault("of_the_other_half", K8, (SCALES, "act(i / 2, 1, four.y)", "act(i / 2, 1, four.x)")),
    Fault("of_a_head_as_well", K8, (ROWS, "(Config::kKeyScales && scale_rows != 0)", "false")),
    # Units.
    Fault("unit_forgotten", K8, (MERGE, "Config::kKeyScales ? sums.unit : 1.0f", "1.0f")),
    Fault("o_in_the_old_unit", K8, (LOOP, "alpha[n][1] *= change_of_unit;", "")),
    Fault("unit_of_the_last_segment", K8, (LOOP, "        key_scales_.clear();\n", "")),
    Fault("no_unit", K8, (SCALES, "fmaxf(unit_, __uint_as_float(largest & 0x7f800000u))", "1.0f")),
    Fault("unseen_ones_count", K8, (SCALES, "kUnseenScaleV = 0x1p-126f", "kUnseenScaleV = 1.0f")),
)
UNCHECKED = {
    "k": (SCALES, "checked_descale(tile.k[first + i])", "tile.k[first + i]"),
    "v": (SCALES, "checked_descale(tile.v[first + i])", "tile.v[first + i]"),
}
KEPT = [f for f in FAULTS if f.name == "not_waited_for"]


@functools.cache
def problems(variant: DecodeVariant) -> list[tuple[Call, int]]:
    """Calls and CTAs: ragged pages with padding under a window, many tiles and heads, blocks of a
    dense cache, descales of V that grow and are small, pages that do not exist."""
    ragged = draw(
        variant,
        (700, 0, 1, 257, 131),
        seqlen_q=2,
        window=(150, 0),
        cache=Cache(3 if variant.load == "gather" else 24),
        indices={"leftpad_k": int32([5, 0, 0, 70, 0])},
    )
    assert ragged.page_table is not None
    table = ragged.page_table.clone()
    table[3, 150 // ragged.k.shape[1]] = 2**31 - 1
    calls = [(ragged, 5), (replace(ragged, page_table=table, window=(-1, -1)), 5)]
    if variant.load == "tma":
        long = draw(variant, (64 * 70, 64 * 3), heads_kv=2, causal=True)
        blocks = draw(variant, (700, 300), scales=("block", "block"))
        grows = torch.linspace(-10.0, 10.0, 64 * 70).exp2()[None, :, None]
        assert long.v_descale is not None
        grown = replace(long, v_descale=2.0**-18 * grows * long.v_descale)
        small = replace(ragged, v_descale=2.0**-24 * ragged.v_descale)
        # The first sequence, of the same CTA, has zeros in V, and descales far above the second's.
        dense = draw(variant, (64 * 8, 64 * 8))
        assert dense.v_descale is not None
        falls = torch.tensor([2.0**24, 1.0])[:, None, None]
        v = (dense.v.float() * torch.tensor([0.0, 1.0])[:, None, None, None]).to(dense.v.dtype)
        falling = replace(dense, v=v, v_descale=falls * dense.v_descale)
        calls += [(long, 9), (blocks, 3), (grown, 2), (small, 5), (falling, 1)]
    return calls


@pytest.mark.parametrize("fault", by_default(FAULTS, KEPT))
def test_fault_is_found(fault: Fault, tmp_path: Path):
    found = found_by(fault, problems(fault.variant), SEEDS, tmp_path)
    assert found is not None, f"{fault.name} is not found under {len(SEEDS)} seeds"
    print(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNCHECKED)
def test_without_the_check_an_invalid_descale_does_not_show(name: str, tmp_path: Path):
    changed = changed_kernel(tmp_path, K8, UNCHECKED[name])
    call = draw(K8, (150, 64), heads=2, cache=Cache(16, room=160))
    given = getattr(call, f"{name}_descale").clone()
    assert call.page_table is not None
    given[int(call.page_table[0, 3]), 5] = -1.0
    ((o, _),) = launch(K8, replace(call, **{f"{name}_descale": given}), changed=changed)
    assert not o.isnan().any()


@pytest.mark.parametrize("variant", by_default([K8, GATHER], [K8]))
def test_without_faults(variant: DecodeVariant):
    """The problems find nothing in the kernel as it is."""
    for call, ctas in problems(variant):
        check(variant, call, ctas=ctas, seeds=(0, 5))

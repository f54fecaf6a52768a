"""Faults planted in what a decode kernel does with new keys. Each is found."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decode_append_cases import Step, found_by, with_new_keys
from decode_cases import Cache, draw
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_cases import int32
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

B8 = DecodeVariant("bf16", "same", 128, 128, 8, append=True)
E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8, append=True)

NEW, KERNEL, LOOP = "decode/new_keys.cuh", "decode/kernel.cu", "decode/mainloop.cuh"
WORK, RING, ROWS = "decode/work.cuh", "decode/ring.cuh", "decode/rows.cuh"

FAULTS = (
    Fault("not_patched", E8, (LOOP, "ring_.patch(params_, walk, position);", "")),
    Fault("values_not_patched", B8, (NEW, "item < of_k + of_v", "item < of_k")),
    Fault(
        "values_over_hidden_ones",
        replace(B8, load="gather"),
        (NEW, "if (key >= sequence.begin && key < sequence.end) {", "{"),
    ),
    Fault(
        "values_not_there_yet",
        E8,
        (RING, "ptx::mbarrier_wait(&shared_.full[warp_][next.stage], next.parity);", ""),
    ),
    Fault(
        "gathered_values_not_there_yet",
        replace(B8, load="gather"),
        (RING, "copy_async_wait<Config::kSlots - 2>", "copy_async_wait<Config::kSlots - 1>"),
    ),
    Fault(
        "lengths_without_new_keys",
        E8,
        (WORK, "new_keys = quantize::count_of(params.append.rows[1], batch);", "new_keys = 0;"),
    ),
    Fault(
        "tiles_with_new_keys_pass_unseen",
        E8,
        (
            WORK,
            "work.common_end = min(work.common_end, max(0, params.sequences.seqused_k[batch]));",
            "",
        ),
    ),
    Fault("patch_unseen_by_tma", E8, (NEW, "ptx::fence_proxy_async();  // before TMA", "//")),
    Fault("not_stored", B8, (NEW, "            row.store(channel, made);\n", "")),
    Fault(
        "stored_only_if_seen",
        E8,
        (
            NEW,
            "            row.store(channel, made);\n",
            "            if (key >= sequence.begin) row.store(channel, made);\n",
        ),
    ),
    Fault("others_not_stored", E8, (NEW, "row.store(channel, row.made(channel));", "")),
    Fault(
        "stored_by_two",
        B8,
        (
            NEW,
            "row.place.exists && (start + index < begin || start + index >= end)",
            "row.place.exists",
        ),
        more=((NEW, "start < 0 || (start >= begin && tokens <= end - start)", "start < 0"),),
    ),
    Fault("queries_as_they_are", E8, (ROWS, "return shared.queries.of[row];", "return given;")),
    Fault(
        "queries_not_there_yet",
        E8,
        (
            KERNEL,
            "walk.segment, walk.sequence);\n            __syncthreads();",
            "walk.segment, walk.sequence);",
        ),
    ),
    Fault(
        "the_first_query_of_all",
        B8,
        (NEW, "NewToken::at(segment.batch, at.query)", "NewToken::at(segment.batch, 0)"),
    ),
    Fault("the_first_key_of_all", E8, (NEW, "key - start, segment.head);", "0, segment.head);")),
    Fault("head_of_another", B8, (NEW, "item / groups % heads);", "0);")),
    Fault(
        "a_row_further",
        E8,
        (NEW, "TileK::offset(key - position, byte)", "TileK::offset((key - position) ^ 1, byte)"),
    ),
    Fault(
        "a_value_further",
        B8,
        (NEW, "TileV::offset(key - position, byte)", "TileV::offset((key - position) ^ 1, byte)"),
    ),
)
DEFAULT = ("not_patched", "lengths_without_new_keys", "stored_only_if_seen", "stored_by_two")


@functools.cache
def problems(variant: DecodeVariant) -> list[tuple[Step, int]]:
    """Across tiles, all CTAs; new keys that no query sees; and without queries at all."""
    first = draw(variant, (600, 0, 61, 63, 64), seqlen_q=2, heads=4, heads_kv=2, causal=True)
    first = replace(first, k=_roomy(first.k), v=_roomy(first.v))
    given = {"seqlen_q": 1, "heads": 2, "heads_kv": 2, "window": (1, 0)}
    hidden = draw(variant, (59, 300, 0, 64), cache=Cache(24, room=320), **given)
    indices = {**hidden.indices, "leftpad_k": int32([0, 4, 8, 72])}
    rows = {**first.indices, "kv_batch_idx": int32([1, 0, 3, -1, 2])}
    unseen = with_new_keys(replace(hidden, indices=indices), 8, rotary_dim=64, interleaved=False)
    unseen.new_v[:, :6] = torch.inf
    return [
        (with_new_keys(first, 3, rotary_dim=128, normalises=True), 5),
        (unseen, 5),
        (with_new_keys(replace(first, indices=rows), 3, rotary_dim=128), 5),
    ]


def _roomy(cache):
    return cache.repeat_interleave(2, dim=1)


@pytest.mark.parametrize(
    "fault", by_default(FAULTS, [x for x in FAULTS if x.name in DEFAULT]), ids=lambda x: x.name
)
def test_is_found(fault: Fault, tmp_path: Path):
    found = found_by(fault, problems(fault.variant), range(1, 5), tmp_path)
    assert found is not None, f"{fault.name} is not found"

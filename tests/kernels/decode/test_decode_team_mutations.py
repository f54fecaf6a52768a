"""Faults planted in what the warps of a team exchange, share out and scale. Each is found."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decode_cases import Cache, check, draw, found_by
from decode_launch import Call
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_cases import int32
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

E16 = DecodeVariant("bf16", "e4m3", 64, 512, 16, qv=True)
B32 = DecodeVariant("bf16", "same", 64, 512, 32, qv=True)
D8 = DecodeVariant("bf16", "same", 512, 512, 8)
GATHER = replace(E16, load="gather")
SEEDS = range(1, 9)

TEAM, LOADER, MERGE = "decode/team_mainloop.cuh", "decode/loader.cuh", "decode/merge.cuh"
ROWS, RING, BARRIERS = "decode/rows.cuh", "decode/ring.cuh", "arch/named_barriers.cuh"

FAULTS = (
    # What the warps exchange.
    Fault("scores_not_written_yet", E16, (TEAM, "Meeting::wait(team_);  // the scores", "")),
    Fault("p_not_written_yet", E16, (TEAM, "Meeting::wait(team_);  // P", "")),
    Fault("one_barrier_for_both_teams", B32, (BARRIERS, "kTeamMeeting) + team", "kTeamMeeting)")),
    Fault("a_part_left_out", E16, (TEAM, "int member = 1; member <", "int member = 2; member <")),
    Fault("parts_of_one_warp", B32, (TEAM, "scores[at.team][member][n]", "scores[at.team][0][n]")),
    Fault("statistics_not_kept", E16, (TEAM, "        store_statistics(own);\n", "")),
    Fault("factors_of_the_other_row", B32, (TEAM, "[row + 1] = alpha[1]", "[row + 1] = alpha[0]")),
    Fault("o_not_rescaled", D8, (TEAM, "sums.rescale(n, alpha);", "")),
    # Channels.
    Fault(
        "qv_of_another_warp",
        E16,
        (TEAM, "member * kStepsOfQv + step", "(member ^ 1) * kStepsOfQv + step"),
    ),
    Fault(
        "q_of_another_warp",
        B32,
        (TEAM, "member * kStepsOfQ + step", "(member ^ 1) * kStepsOfQ + step"),
    ),
    Fault(
        "o_of_another_warp",
        E16,
        (MERGE, "member * Config::kWarpChannelsV + first", "(member ^ 2) * 128 + first"),
    ),
    Fault("all_load_the_first_channels", E16, (LOADER, "first_channel + panel", "0 + panel")),
    Fault("all_gather_the_first", GATHER, (LOADER, "member_ * kRowBytes;", "0;")),
    Fault("k_of_one_warp", B32, (TEAM, "if (member_ < Config::kWarpsOfK) {", "if (member_ < 1) {")),
    Fault("k_not_counted", E16, (LOADER, "(beside ? Config::kSlotBytesK : 0)", "0")),
    Fault(
        "k_not_gathered",
        GATHER,
        (LOADER, "if (beside) {\n                    g", "if (false) {\n g"),
    ),
    Fault("v_replaces_k", D8, (RING, "kSlots % 2 == 0 || Config::kQv", "kSlots % 2 == 1")),
    # Numbers.
    Fault("k_unscaled", E16, (TEAM, "return score * shared_.key_factor;", "return score;")),
    Fault("scaled_the_other_way", E16, (ROWS, "k_descale / v_descale;", "v_descale / k_descale;")),
    Fault("qv_scaled_by_k", E16, (ROWS, "                descale = of_v;\n", "")),
    Fault(
        "qv_not_in_the_power_of_two",
        E16,
        (
            ROWS,
            "largest = max(largest, max(",
            "if (step >= kStepsOfQv) largest = max(largest, max(",
        ),
    ),
)
KEPT = [f for f in FAULTS if f.name == "p_not_written_yet"]


def problems(variant: DecodeVariant) -> list[tuple[Call, int]]:
    """Calls and CTAs: ragged pages with padding and sinks, many tiles of one sequence, a row of
    large values."""
    heads = {8: 3, 16: 7, 32: 14}[variant.rows]
    ragged = draw(
        variant,
        (700, 0, 1, 257),
        seqlen_q=2,
        heads=heads,
        window=(150, 0),
        cache=Cache(3 if variant.load == "gather" else 24),
        s_aux=torch.linspace(-1.0, 2.0, heads),
        indices={"leftpad_k": int32([5, 0, 0, 70])},
    )
    large = draw(variant, (200, 70), heads=heads, seqlen_q=2, causal=True)
    by = {}
    for name in ("q", "qv") if variant.qv else ("q",):
        by[name] = getattr(large, name).clone()
        by[name][:, 0] *= 1e5 if name == "qv" else 10.0
    long = draw(variant, (64 * 30, 64 * 3), heads=heads, seqlen_q=2, causal=True)
    return [(ragged, 5), (replace(large, **by), 3), (long, 9)]


@pytest.mark.parametrize("fault", by_default(FAULTS, KEPT))
def test_fault_is_found(fault: Fault, tmp_path: Path):
    found = found_by(fault, problems(fault.variant), SEEDS, tmp_path)
    assert found is not None, f"{fault.name} is not found under {len(SEEDS)} seeds"
    print(found)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [E16, B32, D8, GATHER])
def test_without_faults(variant: DecodeVariant):
    """The problems find nothing in the kernel as it is."""
    for call, ctas in problems(variant):
        check(variant, call, ctas=ctas, seeds=(0, 5))

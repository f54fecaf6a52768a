"""Faults planted in the backward kernels: waits, fences, masks, scales and order. Each is found."""

import functools
from pathlib import Path

import pytest
import torch

from backward_cases import Problem, check, draw, with_low_logits
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import int32, packed
from fp8_forward_cases import changed_sources
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal")
ORDERED = BackwardVariant("bf16", 128, 128, deterministic=True)
LOCAL = BackwardVariant("bf16", 64, 64, mask="local")
WIDE = BackwardVariant("bf16", 256, 256)
CAPPED = BackwardVariant("bf16", 64, 64, softcap=True)
SEEDS = range(1, 21)

PRODUCER, LOOP = "backward/producer.cuh", "backward/mainloop.cuh"
SPLIT, MASK = "backward/mainloop_split.cuh", "backward/query_mask.cuh"
PROBABILITIES, CONFIG = "backward/probabilities.cuh", "backward/config.cuh"
BEFORE, TILE = "backward/preprocess.cuh", "backward/key_tile.cuh"

FAULTS = (
    # Waits of the producer warpgroup.
    Fault("q_early", CAUSAL, (PRODUCER, "shared_.pipeline_q.wait_empty(state);", "")),
    Fault("dout_early", WIDE, (PRODUCER, "shared_.pipeline_do.wait_empty(state_do);", "")),
    Fault("staged_dq_reused", CAUSAL, (PRODUCER, "ptx::bulk_wait_read();", "")),
    Fault("cleared_unseen", CAUSAL, (PRODUCER, "ptx::fence_proxy_async();\n", "\n")),
    Fault("nothing_cleared", CAUSAL, (PRODUCER, "vectors[i] = make_uint4(0, 0, 0, 0);", "")),
    Fault("one_head_cleared", CAUSAL, (PRODUCER, "parities ^= 1u << stage;", "")),
    # The order of a deterministic dQ.
    Fault("no_turn", ORDERED, (PRODUCER, "!= tile.n_block - first", "> tile.n_block - first")),
    Fault("turn_unsaid", ORDERED, (PRODUCER, "params.dq_semaphore + block, 1", "nullptr, 0")),
    # Waits of the mainloop.
    Fault("ds_early", CAUSAL, (LOOP, "shared_.pipeline_ds.wait(before);\n            ", "")),
    Fault("s_early", CAUSAL, (LOOP, "kFirst ? 0 : 2>();", "kFirst ? 0 : 3>();")),
    Fault("dp_early", CAUSAL, (LOOP, "dp);\n            cute::warpgroup_wait<0>();", "dp);")),
    Fault(
        "dq_early",
        CAUSAL,
        (
            LOOP,
            "cute::warpgroup_wait<behind>();\n                cute::warpgroup_fence_operand(dq);",
            "",
        ),
    ),
    Fault(
        "q_released_early",
        CAUSAL,
        (
            LOOP,
            "cute::warpgroup_wait<1>();\n                cute::warpgroup_fence_operand(dk);",
            "",
        ),
    ),
    Fault(
        "wrong_parity",
        CAUSAL,
        (CONFIG, "state.parity ^ static_cast<uint32_t>(stage)", "state.parity"),
    ),
    Fault(
        "staged_dq_early",
        CAUSAL,
        ("backward/dq_store.cuh", "shared_.pipeline_dq[warpgroup_].wait_empty(state);", ""),
    ),
    Fault(
        "half_of_ds",
        CAUSAL,
        (
            CONFIG,
            "pipeline_ds.init(Config::kConsumerWarps, Config::kConsumerWarps);",
            "pipeline_ds.init(Config::kConsumerWarps, 4);",
        ),
    ),
    Fault("p_overwritten", WIDE, (SPLIT, "cute::warpgroup_wait<kLastDq>();", "")),
    Fault("p_early", WIDE, (SPLIT, "shared_.pipeline_p.wait(once);", "")),
    # Masks.
    Fault("a_key_too_many", ORDERED, (PROBABILITIES, "8 * r < keys", "8 * r <= keys")),
    Fault(
        "a_query_too_few",
        CAUSAL,
        (PROBABILITIES, "begin + 8 <= 8 * i + c", "begin + 8 < 8 * i + c"),
    ),
    Fault("unmasked_too_early", CAUSAL, (MASK, "first + kBlockN - 1 - shift_", "first - shift_")),
    Fault(
        "ragged_keys_seen",
        ORDERED,
        (MASK, "bool const ragged = last + 1 < first + kBlockN;", "bool const ragged = false;"),
    ),
    Fault("window_end_unmasked", LOCAL, (MASK, "max(0, head.end) / kBlockM", "blocks.end")),
    Fault("window_too_wide", LOCAL, (MASK, "key - shift_ + left_ + 1", "key - shift_ + left_ + 2")),
    Fault(
        "next_keys_window",
        LOCAL,
        (PROBABILITIES, "shared.visible[slot + 8 * r].begin", "shared.visible[slot].begin"),
    ),
    # Numbers.
    Fault("d_left_out", CAUSAL, (LOOP, "differ(low, two.x)", "low")),
    Fault(
        "no_slope_of_tanh",
        CAPPED,
        (PROBABILITIES, "probability[c] * (1.0f - finite * finite)", "probability[c]"),
    ),
    Fault("dlse_added", CAUSAL, (BEFORE, "product - dlse", "product + dlse")),
    Fault("sums_not_zeroed", CAUSAL, (BEFORE, "        zero_dq();\n", "")),
    Fault("rows_without_keys", CAUSAL, (BEFORE, "empty ? INFINITY :", "")),
    Fault("dk_unscaled", CAUSAL, ("backward/epilogue.cuh", "params.scores.softmax_scale", "1.0f")),
    Fault("unused_keys", CAUSAL, ("backward/epilogue.cuh", "row < tile.rows_k", "key < tile.keys")),
    Fault(
        "unused_queries",
        CAUSAL,
        ("backward/postprocess.cu", "query < info.rows_q", "query < info.seqlen_q"),
    ),
    Fault(
        "blocks_shared",
        CAUSAL,
        (
            "backward/row_stats.cuh",
            "return offset_q / kBlockM + static_cast<int64_t>(batch);",
            "return offset_q / kBlockM;",
        ),
    ),
    Fault(
        "wrong_head",
        CAUSAL,
        (
            PRODUCER,
            "load_queries(state, head, m_block);",
            "load_queries(state, tile_.head_kv, m_block);",
        ),
    ),
)
KEPT = tuple(f for f in FAULTS if f.name == "no_turn")


@functools.cache
def problems(variant: BackwardVariant) -> list[Problem]:
    """A few blocks on both sides with two heads, packed sequences with unused rows, low scores, and
    a window that is wider than a block."""
    indices = {
        "cu_seqlens_q": packed([5, 0, 130, 1, 64]) + 3,
        "cu_seqlens_k": packed([7, 40, 141, 1, 64]) + 2,
        "seqused_q": int32([5, 0, 99, 1, 64]),
        "seqused_k": int32([3, 11, 137, 0, 64]),
    }
    lengths = {"max_seqlen_q": 130, "max_seqlen_k": 141}
    wide = {"window": (150, 21)} if variant.mask == "local" else {}
    return [
        draw(variant, 211, 260, 2, 1, indices=indices, **lengths, with_dlse=True),
        draw(variant, 330, 290, 2, 1, batch=1),
        draw(variant, 130, 700, 1, 1, batch=1),
        with_low_logits(draw(variant, 70, 150, 1, 1, batch=1, window=(-1, -1))),
        draw(variant, 290, 450, 1, 1, batch=1, **wide),
    ]


@pytest.mark.parametrize("fault", by_default(FAULTS, KEPT))
def test_fault_is_found(fault: Fault, tmp_path: Path):
    root = changed_sources(tmp_path, fault.edit)
    for seed in SEEDS:
        for problem in problems(fault.variant):
            try:
                check(fault.variant, problem, seeds=(0, seed), root=root)
            except (AssertionError, RuntimeError):
                return
    pytest.fail(f"{fault.name} is not found under {len(SEEDS)} seeds")


def test_without_faults():
    """The problems find nothing in the kernels as they are."""
    torch.manual_seed(0)
    for problem in problems(CAUSAL):
        check(CAUSAL, problem, seeds=(0, 5))

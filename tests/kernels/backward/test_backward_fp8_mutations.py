"""Faults planted in what the backward of an FP8 forward has of its own. Each is found."""

import functools
from pathlib import Path

import pytest
import torch

from backward_cases import Problem, check
from backward_fp8_cases import draw
from defaults import by_default
from faults import Fault
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import int32, packed
from fp8_forward_cases import changed_sources
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal", fp8=True)
CAPPED = BackwardVariant("fp16", 64, 64, softcap=True, fp8=True)
SEEDS = range(1, 11)

PRODUCER, KEYS = "backward/producer.cuh", "backward/fp8_keys.cuh"
OPERANDS, BEFORE = "backward/fp8_operands.cuh", "backward/preprocess_fp8.cuh"
ROWS, TILE = "backward/preprocess.cuh", "backward/key_tile.cuh"
AFTER, PROBABILITIES = "backward/postprocess.cu", "backward/probabilities.cuh"

FAULTS = (
    # Waits and fences.
    Fault("keys_early", CAUSAL, (KEYS, "shared.pipeline_kv.wait(PipelineState<1>{});", "")),
    Fault("keys_unfenced", CAUSAL, (KEYS, "ptx::fence_proxy_async();", "")),
    Fault(
        "half_of_the_keys",
        CAUSAL,
        (
            KEYS,
            "ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kKeysPrepared), kThreads);",
            "",
        ),
    ),
    Fault(
        "nothing_of_q_counted",
        CAUSAL,
        (PRODUCER, "(Config::kFp8 ? sizeof(Stored) : 0)", "0"),
    ),
    # Rows that belong to nobody.
    Fault(
        "keys_not_cleared",
        CAUSAL,
        (
            PRODUCER,
            "clear<Config::kPanelQ8, Config::kHeadDim, Config::kBlockN>(shared.k8, tile.seen);",
            "",
        ),
    ),
    Fault(
        "values_not_cleared",
        CAUSAL,
        (
            PRODUCER,
            "clear<Config::kPanelV8, Config::kHeadDimV, Config::kBlockN>(shared.v8(), tile.seen);",
            "",
        ),
    ),
    Fault(
        "unused_q",
        CAUSAL,
        (BEFORE, "used && column < params_.head_dim", "column < params_.head_dim"),
    ),
    # Scales.
    Fault("no_q_descale", CAUSAL, (PROBABILITIES, "shared.stats[stage].q_descale[0] * ", "")),
    Fault("no_v_descale", CAUSAL, (PROBABILITIES, "dp * v_descale_ - d", "dp - d")),
    Fault(
        "no_k_descale", CAUSAL, (TILE, "tile.score_scale = tile.k_descale *", "tile.score_scale = ")
    ),
    Fault("unscaled_q", CAUSAL, (BEFORE, "inside ? descale_ : 0.0f", "inside ? 1.0f : 0.0f")),
    Fault(
        "wrong_block", CAUSAL, (OPERANDS, "offset / kScaleBlock + batch", "offset / kScaleBlock")
    ),
    Fault("first_block", CAUSAL, (OPERANDS, "static_cast<int64_t>(row / kScaleBlock)", "0")),
    Fault("first_head", CAUSAL, (BEFORE, "tile.head / params.heads_per_q_descale", "0")),
    Fault(
        "cap_twice",
        CAPPED,
        (TILE, "scores.softmax_scale / scores.softcap", "scores.softmax_scale_log2"),
    ),
    # Means.
    Fault("k_mean_in_s", CAUSAL, (ROWS, "params_.scores.softmax_scale * shift", "0.0f * shift")),
    Fault("v_mean_in_d", CAUSAL, (ROWS, "d - v_share", "d")),
    Fault("mean_not_taken_off", CAUSAL, (KEYS, " - mean[column + c]", "")),
    Fault("mean_not_given_back", CAUSAL, (AFTER, "own[0] + mean[0]", "mean[0]")),
    Fault("given_mean_forgotten", CAUSAL, (AFTER, "own[0] + mean[0]", "own[0]")),
    Fault("sum_without_sink", CAUSAL, (ROWS, "dlse - sink_share", "dlse")),
    Fault("capped_mean", CAPPED, (KEYS, "Config::kSoftcap ? nullptr : ", "")),
)
KEPT = tuple(f for f in FAULTS if f.name == "v_mean_in_d")


@functools.cache
def problems(variant: BackwardVariant) -> list[Problem]:
    """Packed sequences with unused rows and descales per block, and sinks with a bias of keys."""
    indices = {
        "cu_seqlens_q": packed([5, 0, 170, 1, 64]) + 3,
        "cu_seqlens_k": packed([7, 40, 181, 1, 64]) + 2,
        "seqused_q": int32([5, 0, 139, 1, 64]),
        "seqused_k": int32([3, 11, 177, 0, 64]),
    }
    lengths = {"max_seqlen_q": 170, "max_seqlen_k": 181}
    # Under a softcap K keeps its mean, and a large one in fp16 rounds more than the rule allows.
    bias = 1.0 if variant.softcap else 8.0
    given = {"with_dlse": True, "s_aux": torch.tensor([0.5, 3.0]), "bias": bias}
    return [
        draw(variant, 251, 300, 2, 1, indices=indices, scales="block", with_dlse=True, **lengths),
        draw(variant, 200, 290, 2, 1, batch=2, scales="block", **given),
        draw(variant, 130, 150, 2, 2, batch=1, **given),
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


@pytest.mark.parametrize("variant", [CAUSAL, pytest.param(CAPPED, marks=pytest.mark.slow)])
def test_without_faults(variant):
    """The problems find nothing in the kernels as they are."""
    for problem in problems(variant):
        check(variant, problem, seeds=(0, 5))

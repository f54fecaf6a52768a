"""The comparison of test_qkv_kernel.py must catch a QKV projection that is wrong."""

import pytest
import torch

from defaults import by_default
from flash8 import _native
from gemm_cases import changed_kernel
from qkv_cases import assert_same, device, emulated, make, on_kernel
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

EPILOGUE, WALK = "qkv_epilogue.cuh", "qkv_walk.cuh"
HALVES, NEIGHBOURS = {"rope": "halves"}, {"rope": "interleaved"}
PACKED = {"tokens": (277,), "cu_seqlens": [0, 0, 130, 131, 131, 259, 270]}

# file, what is replaced, by what, and the projection that must notice.
FAULTS = {
    "a column's scale of the first head": (
        EPILOGUE,
        "block.head * kHeadDim + column_of(i)",
        "column_of(i)",
        {"granularity": "row"},
    ),
    "a row's scale of the first sequence": (
        EPILOGUE,
        "(block.offset + readable(block, r)) * gemm.scale_a.row_stride",
        "readable(block, r) * gemm.scale_a.row_stride",
        {"granularity": "row"},
    ),
    "no bias": (
        EPILOGUE,
        "gemm.bias != nullptr ? __fadd_rn(scaled, bias) : scaled",
        "scaled",
        {"bias": torch.bfloat16},
    ),
    "values that are rotated": (EPILOGUE, "if (!is_v) {", "if (true) {", HALVES),
    "keys with the norm of queries": (
        EPILOGUE,
        "is_q ? params_.q_norm : params_.k_norm",
        "params_.q_norm",
        {"norms": True},
    ),
    "a norm after the rotation": (
        EPILOGUE,
        "if (weight != nullptr) {",
        "if (params_.rope_cos != nullptr) {\n turn(block, y);\n }\n if (weight != nullptr) {",
        {"norms": True, **HALVES},
    ),
    "a norm of half a quad": (
        EPILOGUE,
        "sum = quantize::add(sum, __shfl_xor_sync(kAllLanes, sum, 2));",
        "",
        {"norms": True},
    ),
    "turned the other way": (
        EPILOGUE,
        "first = quantize::subtract(",
        "first = quantize::add(",
        HALVES,
    ),
    "a pair of the first value twice": (
        EPILOGUE,
        "quantize::multiply(x, sin), quantize",
        "quantize::multiply(first, sin), quantize",
        NEIGHBOURS,
    ),
    "channels beyond rotary_dim that turn": (
        EPILOGUE,
        "if (pair < half) {",
        "if (pair <= half) {",
        {"rope": "interleaved", "rotary_dim": 48},
    ),
    "positions from zero on": (
        EPILOGUE,
        "min(start + readable(block, r), last)",
        "min(int64_t{readable(block, r)}, last)",
        {"offsets": [3, 50], **HALVES},
    ),
    "positions of another row": (
        EPILOGUE,
        "min(start + readable(block, r), last)",
        "min(start + readable(block, 0), last)",
        NEIGHBOURS,
    ),
    "positions of the whole batch": (
        EPILOGUE,
        "min(start + readable(block, r), last)",
        "min(start + block.offset + readable(block, r), last)",
        HALVES,
    ),
    "tokens that count for more than they should": (
        EPILOGUE,
        "token(block, r) < block.counted ? of_row : 0.0f",
        "token(block, r) < block.capacity ? of_row : 0.0f",
        {"seqused": [100, 3]},
    ),
    "infinities count": (
        EPILOGUE,
        "bits < quantize::kInfinity ? bits",
        "true ? bits",
        {"infinite": True},
    ),
    "the amax of one warpgroup": (
        EPILOGUE,
        "warp < Config::kConsumerWarps; ++warp",
        "warp < Config::kConsumerWarps / 2; ++warp",
        {},
    ),
    "slots of one tile only": (EPILOGUE, "turn_ ^= 1;", "", {}),
    "warpgroups that do not meet": (
        EPILOGUE,
        "ptx::named_barrier_sync(static_cast<int>(NamedBarrier::kTileAmax), "
        "32 * Config::kConsumerWarps);",
        "",
        {},
    ),
    "columns not transposed": (
        EPILOGUE,
        "                transpose_quad(words, quad_lane());\n",
        "",
        {},
    ),
    "groups of a pair swapped": (
        EPILOGUE,
        "row + 4 * first + 16 * quad_lane()",
        "row + (64 - 4 * first) + 16 * quad_lane()",
        {},
    ),
    "a token beyond the last": (
        EPILOGUE,
        "if (token(block, r) < block.capacity) {",
        "if (true) {",
        {"tokens": (1, 125)},  # the rest of its block fits the guards
    ),
    "keys that do not count": (
        EPILOGUE,
        "return counts[r] ? quantize::multiply(y[r][i], inverse) : 0.0f;",
        "return quantize::multiply(y[r][i], inverse);",
        {"bias": torch.bfloat16},
    ),
    "keys in plain order": (EPILOGUE, "0x5140", "0x5410", {}),
    "keys of the other lane": (
        EPILOGUE,
        "uint32_t const even_key = odd ? other : own;",
        "uint32_t const even_key = own;",
        {},
    ),
    "channels in plain order": (
        EPILOGUE,
        "channel / 16 * 16 + channel % 2 * 8 + channel % 16 / 2",
        "channel",
        {},
    ),
    "keys of the first warp": (EPILOGUE, "first_row_ / 16 * 16", "first_row_ / 64 * 64", {}),
    "keys of the first block": (EPILOGUE, "int64_t{block.block} * kScaleBlock", "int64_t{0}", {}),
    "descales of the first block": (
        EPILOGUE,
        "block.block * ref.block_stride",
        "0 * ref.block_stride",
        {},
    ),
    "seqused that is not read": (WALK, "params_.seqused != nullptr", "false", {"seqused": [9, 3]}),
    "sequences that end with the rows": (
        WALK,
        "batch * seqlen, own * kScaleBlock, seqlen, seqlen}",
        "batch * seqlen, own * kScaleBlock, params_.gemm.m - batch * seqlen, seqlen}",
        {},
    ),
    "blocks without a token that are loaded": (
        WALK,
        "while (block.empty())",
        "while (false)",
        PACKED,
    ),
    "blocks without a token that are waited for": (
        "qkv.cu",
        "mainloop.run(block.empty() ? 0 : k, 0, sum);",
        "mainloop.run(k, 0, sum);",
        PACKED,
    ),
    "sequences without blocks of their own": (
        "packed_block.cuh",
        "offset / kScaleBlock + batch",
        "offset / kScaleBlock + min(batch, 3)",
        PACKED,
    ),
}
KEPT = ["warpgroups that do not meet", "keys in plain order"]


def projection_of(options):
    given = {"tokens": (2, 150), "k": 144, "heads": (2, 1)} | options
    infinite = given.pop("infinite", False)
    projection = make(given.pop("tokens"), given.pop("k"), given.pop("heads"), **given)
    if infinite:
        projection.scale_a[5] = torch.inf
    return projection


@pytest.mark.parametrize("name", by_default(FAULTS, KEPT))
def test_is_caught(monkeypatch, tmp_path, name):
    file, old, new, options = FAULTS[name]
    projection = projection_of(options)
    want = emulated(projection)
    assert_same(on_kernel(monkeypatch, projection), want)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device(), "_registry", changed_kernel(tmp_path, file, old, new))
    assert any(fails(monkeypatch, projection, want, seed) for seed in range(6))


def fails(monkeypatch, projection, want, seed):
    try:
        assert_same(on_kernel(monkeypatch, projection, seed=seed), want)
    except (AssertionError, _native.DriverError):
        return True
    return False

"""The comparison of test_gemm_kernel.py must catch a GEMM kernel that is wrong."""

import pytest
import torch

from flash8 import _native
from flash8.backends.hopper.gemm_variants import GemmVariant
from gemm_cases import (
    assert_same,
    changed_kernel,
    changed_text,
    device,
    emulated,
    is_caught,
    make,
    on_kernel,
    variant,
)
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn

# file, what is replaced, by what, and the product that must notice.
FAULTS = {
    "scales of the first block": (
        "producer.cuh",
        "of_rows += params.scale_a.block_stride;",
        "",
        {},
    ),
    "scales of B of the first column": (
        "producer.cuh",
        "columns * params.scale_b.row_stride",
        "0 * params.scale_b.row_stride",
        {"n": 140},
    ),
    "the first scale of B for all columns": (
        "mainloop.cuh",
        "part == 0 || (column < kScaleBlock && column < first_columns)",
        "true",
        {"n": 140, "block_n": 160},
    ),
    "a second scale of B where the first tile has it": (
        "mainloop.cuh",
        "kScaleBlock - n0 % kScaleBlock",
        "kScaleBlock",
        {"n": 320, "block_n": 160},
    ),
    "a second scale of B that nobody brings": (
        "producer.cuh",
        "lane < Config::kColumnScales",
        "lane == 0",
        {"n": 140, "block_n": 160},
    ),
    "rows that share no scale": (
        "producer.cuh",
        ">> params.scale_a_row_shift",
        ">> 0",
        {"granularity": "128x128", "m": 2},
    ),
    "scales of all K in one": (
        "mainloop.cuh",
        "Scales const scales = scales_of(state_.stage, first_columns);",
        "Scales const scales = scales_of(0, first_columns);",
        {},
    ),
    "rows with the scale of the one 8 above": (
        "mainloop.cuh",
        "first_row_ + wave * Config::kWaveRows + 8 * r",
        "first_row_ + wave * Config::kWaveRows",
        {},
    ),
    "never promoted": (
        "mainloop.cuh",
        "issue<true>(state_.stage, wave, t);",
        "issue<false>(state_.stage, wave, t);",
        {"granularity": "row"},
    ),
    "released before it is read": (
        "mainloop.cuh",
        """                cute::warpgroup_wait<0>();
                cute::warpgroup_fence_operand(t);
                if (wave == kWaves - 1) {
                    release_and_advance<Config::kClusterM>(shared_.pipeline, state_);
                }
""",
        """                if (wave == kWaves - 1) {
                    release_and_advance<Config::kClusterM>(shared_.pipeline, state_);
                }
                cute::warpgroup_wait<0>();
                cute::warpgroup_fence_operand(t);
""",
        {"k": 1424},
    ),
    "a fast block released too early": (
        "mainloop.cuh",
        "cute::warpgroup_wait<kWaves>();",
        "cute::warpgroup_wait<2 * kWaves>();",
        {"granularity": "row", "fast": True, "k": 1424},
    ),
    "no bias": (
        "epilogue.cuh",
        "params.bias != nullptr ? __fadd_rn(scaled, bias) : scaled",
        "scaled",
        {"bias": BF16},
    ),
    "bias of a neighbour": (
        "epilogue.cuh",
        "min(tile.n0 + first + column_of(i), params.n - 1)",
        "min(tile.n0 + first + column_of(i & 6), params.n - 1)",
        {"bias": BF16},
    ),
    "a row beyond the last": (
        "epilogue.cuh",
        "row < tile.m_end ? params.n - tile.n0 : 0",
        "params.n - tile.n0",
        {"m": 100, "n": 48, "out_dtype": BF16},  # the rest of its tile fits the guards
    ),
    "columns not transposed": (
        "epilogue.cuh",
        """pack<cutlass::bfloat16_t>(low, high);
        }
        if (params.vector_stores) {
            int const lane = threadIdx.x % 4;
            transpose_quad(words, lane);""",
        """pack<cutlass::bfloat16_t>(low, high);
        }
        if (params.vector_stores) {
            int const lane = threadIdx.x % 4;""",
        {"n": 48, "out_dtype": BF16},
    ),
    "a column beyond the last": (
        "epilogue.cuh",
        "if (column + 1 < row.columns) {",
        "if (column < row.columns) {",
        {"n": 41},
    ),
    "an e4m3 output that is not scaled": (
        "epilogue.cuh",
        "scale(values[r], result);",
        "",
        {"out_dtype": E4M3},
    ),
    "columns of e4m3 in another order": (
        "epilogue.cuh",
        "words[0] | words[1] << 16, words[2] | words[3] << 16",
        "words[0] | words[2] << 16, words[1] | words[3] << 16",
        {"n": 48, "out_dtype": E4M3},
    ),
    "bands of another height": (
        "tile.cuh",
        "min(params.band, m_blocks - first)",
        "params.band",
        {"m": 300, "n": 270},
    ),
}


def product_of(options):
    sizes = {"m": 70, "n": 40, "k": 400} | options
    sizes.pop("block_n", None)
    return make(sizes.pop("m"), sizes.pop("n"), sizes.pop("k"), **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_is_caught(monkeypatch, tmp_path, name):
    file, old, new, options = FAULTS[name]
    product = product_of(options)
    kernel = variant(product, block_n=options.get("block_n", 128))
    want = emulated(product)
    assert_same(on_kernel(monkeypatch, product, kernel), want)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device(), "_registry", changed_kernel(tmp_path, file, old, new))
    assert is_caught(lambda seed: on_kernel(monkeypatch, product, kernel, seed=seed), want)


BLOCK = GemmVariant("block", 128, 128)
#: Of the PTX: nothing is compiled.
EDITS = {
    "scales that may still be on their way": (
        r"cp\.async\.mbarrier\.arrive\.noinc\.shared::cta\.b64 ([^;]*);",
        r"mbarrier.arrive.shared::cta.b64 _, \1;",
    ),
    "a sum that is not scaled": (
        r"fma\.rn\.ftz\.f32\s+(%f\d+), %f\d+, (%f\d+), (%f\d+);",
        r"add.f32 \1, \2, \3;",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_caught(monkeypatch, name):
    product = product_of({})
    assert variant(product) == BLOCK
    text = changed_text(BLOCK, *EDITS[name])
    registry = _native.Registry(device().driver, lambda key, kind: text)
    monkeypatch.setattr(device(), "_registry", registry)
    assert is_caught(lambda seed: on_kernel(monkeypatch, product, seed=seed), emulated(product))

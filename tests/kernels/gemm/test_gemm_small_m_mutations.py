"""The comparisons of test_gemm_small_m.py and test_gemm_quantizing.py must catch a kernel that is
wrong."""

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
    values,
)
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
BLOCK = GemmVariant("block", 16, 64, small_m=True)
OUTER = GemmVariant("outer", 16, 64, small_m=True)
QUANTIZES = GemmVariant("block", 16, 64, small_m=True, a="bf16")

# kernel, file, what is replaced, by what, and the product that must notice.
FAULTS = {
    "scales of the first block": (
        BLOCK,
        ("small_m_producer.cuh", "of_rows += params.scale_a.block_stride;", ""),
        {},
    ),
    "scales of B of the first column": (
        BLOCK,
        (
            "small_m_producer.cuh",
            "tile.n0 / kScaleBlock * params.scale_b.row_stride",
            "0 * params.scale_b.row_stride",
        ),
        {"n": 140},
    ),
    "rows that share no scale": (
        BLOCK,
        ("small_m_producer.cuh", ">> params.scale_a_row_shift", ">> 0"),
        {"granularity": "128x128", "m": 2},
    ),
    "scales of the first stage": (
        BLOCK,
        ("small_m_mainloop.cuh", "scaling_of(done.stage)", "scaling_of(0)"),
        {},
    ),
    "a block less": (
        BLOCK,
        ("small_m_mainloop.cuh", "if (block < blocks) {", "if (block + 1 < blocks) {"),
        {"k": 272},
    ),
    "added before it is there": (
        BLOCK,
        ("small_m_mainloop.cuh", "finish<1>(done, t[0], sum);", "finish<2>(done, t[0], sum);"),
        {},
    ),
    "no bias": (
        OUTER,
        ("small_m_epilogue.cuh", "__fadd_rn(sums(r, i), bias)", "sums(r, i)"),
        {"bias": BF16},
    ),
    "a row's scale for its neighbour": (
        OUTER,
        ("small_m_epilogue.cuh", "row + 8 * (i / 2) + i % 2", "row + 8 * (i / 2)"),
        {"granularity": "row"},
    ),
    "a row beyond the last": (
        OUTER,
        ("small_m_epilogue.cuh", "m >= rows.begin && m < rows.end && column", "column"),
        {},
    ),
    "an e4m3 output that is not scaled": (
        BLOCK,
        ("small_m_epilogue.cuh", "__fmul_rn(x, result)", "x"),
        {"out_dtype": E4M3},
    ),
    "a second tile of rows is the first": (
        BLOCK,
        ("small_m_tile_walk.cuh", "(index_ - column * m_blocks_) * Config::kBlockM", "0"),
        {"m": 20},
    ),
    "an infinity counts": (
        QUANTIZES,
        ("small_m_quantizer.cuh", "if (largest >= kInfinity) {", "if (false) {"),
        {},
    ),
    "a magnitude of four lanes": (
        QUANTIZES,
        ("small_m_quantizer.cuh", "step < kLanes", "step < kLanes / 2"),
        {},
    ),
    "quantized before it has come": (
        QUANTIZES,
        (
            "small_m_quantizer.cuh",
            "ptx::mbarrier_wait(&shared.wide.full[state.stage], state.parity);",
            "",
        ),
        {},
    ),
}


def product_of(kernel, options):
    sizes = {"m": 11, "n": 40, "k": 400} | options
    granularity = sizes.pop("granularity", "1x128" if kernel.scales == "block" else "tensor")
    m, n, k = sizes.pop("m"), sizes.pop("n"), sizes.pop("k")
    product = make(m, n, k, granularity, **sizes)
    if kernel.a == "e4m3":
        return product
    a = values(m, k, seed=5).bfloat16()
    a[3, 130] = torch.inf
    return product._replace(a=a, scale_a=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_is_caught(monkeypatch, tmp_path, name):
    kernel, edit, options = FAULTS[name]
    product = product_of(kernel, options)
    want = emulated(product)
    assert_same(on_kernel(monkeypatch, product, kernel), want)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device(), "_registry", changed_kernel(tmp_path, *edit))
    assert is_caught(lambda seed: on_kernel(monkeypatch, product, kernel, seed=seed), want)


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
    "products that may not be there": (
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "wgmma.wait_group.sync.aligned 2;",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_caught(monkeypatch, name):
    product = product_of(BLOCK, {})
    text = changed_text(BLOCK, *EDITS[name])
    registry = _native.Registry(device().driver, lambda key, kind: text)
    monkeypatch.setattr(device(), "_registry", registry)
    assert is_caught(
        lambda seed: on_kernel(monkeypatch, product, BLOCK, seed=seed), emulated(product)
    )

"""What ptxas makes of the GEMM kernel: no spills, and how many instructions 128 of K cost."""

import pytest

from defaults import by_default
from flash8.backends.hopper.gemm_variants import (
    CLUSTERED_GEMMS,
    SHIPPED_GEMMS,
    SHIPPED_GROUPED_GEMMS,
    GemmVariant,
)
from flash8.backends.hopper.qkv_variants import SHIPPED_QKV_PROJECTIONS
from flash8.compiler import compile_unit
from machine_code import missing_disassembler
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
_NO_DISASSEMBLER = missing_disassembler()

#: FFMA or FADD, and other instructions.
LIMITS = {
    "gemm_outer_128x128": (64, 53),
    "gemm_outer_128x160": (80, 60),
    "gemm_outer_128x192": (96, 60),
    "gemm_outer_256x128": (128, 72),
    "gemm_block_128x128": (64, 53),
    "gemm_block_128x160": (80, 60),
    "gemm_block_128x192": (96, 60),
    "gemm_block_256x128": (128, 72),
    "gemm_outer_fast_128x128": (0, 46),
    "gemm_outer_fast_128x256": (0, 46),
    "gemm_small_m_outer_16x64": (8, 42),
    "gemm_small_m_outer_16x128": (8, 42),
    "gemm_small_m_outer_64x64": (32, 42),
    "gemm_small_m_outer_64x128": (32, 42),
    "gemm_small_m_block_16x64": (8, 53),
    "gemm_small_m_block_16x128": (8, 53),
    "gemm_small_m_block_64x64": (32, 78),
    "gemm_small_m_block_64x128": (32, 78),
    "gemm_small_m_block_bf16_16x64": (8, 53),
    "gemm_small_m_block_bf16_16x128": (8, 53),
    "gemm_small_m_block_bf16_64x64": (32, 78),
    "gemm_small_m_block_fp16_16x64": (8, 53),
    "gemm_small_m_block_fp16_16x128": (8, 53),
    "gemm_small_m_block_fp16_64x64": (32, 78),
    "gemm_grouped_outer_128x128": (64, 68),
    "gemm_grouped_block_128x128": (64, 68),
    "gemm_grouped_outer_fast_128x128": (0, 60),
    "gemm_grouped_k_outer_128x128": (64, 68),
    "gemm_grouped_k_block_128x128": (64, 68),
    "gemm_grouped_k_outer_fast_128x128": (0, 60),
    "gemm_outer_cluster_128x128": (64, 53),
    "gemm_outer_cluster_128x160": (80, 63),
    "gemm_outer_cluster_128x192": (96, 63),
    "gemm_outer_cluster_256x128": (128, 72),
    "gemm_block_cluster_128x128": (64, 53),
    "gemm_block_cluster_128x160": (80, 63),
    "gemm_block_cluster_128x192": (96, 63),
    "gemm_block_cluster_256x128": (128, 72),
    "gemm_outer_fast_cluster_128x128": (0, 50),
    "gemm_outer_fast_cluster_128x256": (0, 50),
    "qkv_projection_outer": (64, 53),
    "qkv_projection_block": (64, 53),
}
VARIANTS = (
    *SHIPPED_GEMMS,
    *SHIPPED_GROUPED_GEMMS,
    *CLUSTERED_GEMMS,
    *SHIPPED_QKV_PROJECTIONS,
)
KEPT = [
    *(
        GemmVariant(scales, 128, 128, grouped=grouped)
        for scales in ("outer", "block")
        for grouped in (False, True)
    ),
    *(GemmVariant(scales, 128, 128, grouped_k=True) for scales in ("outer", "block")),
    GemmVariant("block", 16, 64, small_m=True),
    *SHIPPED_QKV_PROJECTIONS,
    GemmVariant("block", 128, 128, cluster=True),
]


@pytest.mark.parametrize("variant", by_default(VARIANTS, KEPT))
def test_nothing_spills(variant):
    report = compile_unit(variant.unit()).report
    assert report.problems() == []
    assert all(cost.spill_stores == cost.spill_loads == 0 for cost in report.kernels)


@pytest.mark.skipif(_NO_DISASSEMBLER is not None, reason=str(_NO_DISASSEMBLER))
@pytest.mark.parametrize("variant", by_default(VARIANTS, KEPT))
def test_instructions_of_a_block(variant):
    import gemm_code

    found = gemm_code.loop(variant)
    promotions, others = LIMITS[variant.name]
    assert found.promotions == promotions, found
    assert 15 <= found.others <= others, found

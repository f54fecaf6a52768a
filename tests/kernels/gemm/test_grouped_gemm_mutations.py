"""The comparison of test_grouped_gemm_kernel.py must catch a grouped GEMM kernel that is wrong."""

import pytest
import torch

from gemm_cases import changed_kernel, is_caught
from grouped_gemm_cases import assert_same, device, emulated, make, on_kernel
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16 = torch.bfloat16

# file, what is replaced, by what, and the product that must notice.
FAULTS = {
    "rows that end with the matrix": (
        "epilogue.cuh",
        "row < tile.m_end ? params.n - tile.n0 : 0",
        "row < params.m ? params.n - tile.n0 : 0",
        {},
    ),
    "a column's scale of the first group": (
        "epilogue.cuh",
        "params.scale_b.ptr + tile.group * params.scale_b_group_stride",
        "params.scale_b.ptr",
        {"granularity": "row"},
    ),
    "a group's scale of the first group": (
        "epilogue.cuh",
        "row * params.scale_a.row_stride + tile.group * params.scale_a_group_stride",
        "row * params.scale_a.row_stride",
        {"granularity": "group"},
    ),
    "the B of the first group": (
        "producer.cuh",
        "k0, tile.n0, 0, 0, tile.group);",
        "k0, tile.n0, 0, 0, 0);",
        {},
    ),
    "blocks' scales of the first group's B": (
        "producer.cuh",
        "tile.group * params.scale_b_group_stride",
        "0 * params.scale_b_group_stride",
        {},
    ),
    "blocks' scales of rows as if groups were not apart": (
        "producer.cuh",
        "params.scale_a.ptr + tile.group * params.scale_a_group_stride",
        "params.scale_a.ptr",
        {"room": 150},
    ),
    "tiles of rows of two groups": (
        "grouped_walk.cuh",
        "tile.m0 += begin;",
        "tile.m0 += begin & -Config::kBlockM;",
        {},
    ),
    "offsets that are not clamped": (
        "grouped_walk.cuh",
        "clamped(params.group_rows[group], 0, params.m)",
        "params.group_rows[group]",
        {"offsets": [5, 90, 175, 130, 170, 171]},
    ),
    "offsets that may decrease": (
        "grouped_walk.cuh",
        "running_max(max(rows_before, clamped_offset(params_, group)))",
        "max(rows_before, clamped_offset(params_, group))",
        {"offsets": [5, 130, 20, 171, 150, 171]},
    ),
    "counts that are not clamped": (
        "grouped_walk.cuh",
        "clamped(rows, 0, params_.rows_per_group)",
        "rows",
        {"granularity": "group", "room": 150, "offsets": [5, 151, 0, 3, 4, 1]},
    ),
    "the first 32 groups only": (
        "grouped_walk.cuh",
        "first_group_ + 32 >= params_.groups",
        "true",
        {"sizes": [1] * 32 + [7]},
    ),
    "rows that are counted anew after 32 groups": (
        "grouped_walk.cuh",
        "hold_groups(first_group_ + 32, __shfl_sync(0xffffffff, row_end_, 31),",
        "hold_groups(first_group_ + 32, 0,",
        {"sizes": [1] * 32 + [7]},
    ),
    "tiles that are counted anew after 32 groups": (
        "grouped_walk.cuh",
        "__shfl_sync(0xffffffff, tiles_end_, 31));",
        "0);",
        {"sizes": [1] * 32 + [7]},
    ),
    "rows of no group that are not written": (
        "grouped_walk.cuh",
        "row < params.m; row += static_cast<int>(gridDim.x)",
        "row < params.m - 1; row += static_cast<int>(gridDim.x)",
        {},
    ),
    "columns of no group that are not written": (
        "grouped_walk.cuh",
        "for (int64_t i = 2 * lane; i < int64_t{params.n} * bytes;",
        "for (int64_t i = 2 * lane; i < int64_t{params.n} * 2;",
        {"n": 41},
    ),
    "unused rows of a group that are cleared": (
        "grouped_walk.cuh",
        "if (params.rows_per_group > 0) {\n        return;",
        "if (params.rows_per_group < 0) {\n        return;",
        {"room": 150},
    ),
}


def product_of(options):
    given = {"sizes": [5, 0, 130, 1, 0, 34], "n": 140, "k": 272, "granularity": "block"} | options
    offsets = given.pop("offsets", None)
    if "room" not in given:
        given["beyond"] = 3
    product = make(given.pop("sizes"), given.pop("n"), given.pop("k"), **given)
    if offsets is not None:
        product = product._replace(group_rows=torch.tensor(offsets, dtype=torch.int32))
    return product


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_is_caught(monkeypatch, tmp_path, name):
    file, old, new, options = FAULTS[name]
    product = product_of(options)
    want = emulated(product)
    assert_same(on_kernel(monkeypatch, product), want)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device(), "_registry", changed_kernel(tmp_path, file, old, new))
    rows = want.flatten(0, -2)
    assert is_caught(
        lambda seed: on_kernel(monkeypatch, product, seed=seed).flatten(0, -2), rows, seeds=4
    )

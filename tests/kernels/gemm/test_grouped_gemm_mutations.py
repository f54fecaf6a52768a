"""The comparison of test_grouped_gemm_kernel.py must catch a grouped GEMM kernel that is wrong."""

import pytest
import torch

from gemm_cases import changed_kernel, is_caught
from grouped_gemm_cases import assert_same, device, emulated, make, make_along_k, on_kernel, poison
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
        "clamped(params.group_rows[group], 0, most)",
        "params.group_rows[group]",
        {"offsets": [5, 90, 175, 130, 170, 171]},
    ),
    "offsets that may decrease": (
        "grouped_walk.cuh",
        "running_max(max(before, clamped_offset(params_, group)))",
        "max(before, clamped_offset(params_, group))",
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
        "hold_groups(first_group_ + 32, __shfl_sync(0xffffffff, end_, 31),",
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
        "end + static_cast<int>(blockIdx.x); row < params.m;",
        "end + static_cast<int>(blockIdx.x); row < params.m - 1;",
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


# The same with groups along K: a stage holds K of up to five of them.
FAULTS_ALONG_K = {
    "stages that begin before the group": ("k_range.cuh", "k0 < tile.k_begin || ", "", {}),
    "stages that end behind the group": (
        "k_range.cuh",
        " || k0 + Config::kBlockK > tile.k_end",
        "",
        {},
    ),
    "A that is not cut": (
        "k_range.cuh",
        "keep<Config::kBlockM>(shared.a[state.stage], tile.k_begin - k0, tile.k_end - k0);",
        "",
        {"poisoned": 2},
    ),
    "B that is not cut": (
        "k_range.cuh",
        "keep<Config::kBlockN>(shared.b[state.stage], tile.k_begin - k0, tile.k_end - k0);",
        "",
        {"poisoned": 2},
    ),
    "the first rows of A alone": (
        "k_range.cuh",
        "keep<Config::kBlockM>(",
        "keep<Config::kBlockM / 4>(",
        {"poisoned": 2},
    ),
    "chunks that stay whole": (
        "k_range.cuh",
        "if (begin <= byte && byte + kChunk <= end) {",
        "if (begin <= byte + 15 && byte < end) {",
        {},
    ),
    "words of a chunk that are cut alike": (
        "k_range.cuh",
        "bytes_inside(begin - byte - 8, end - byte - 8)",
        "bytes_inside(begin - byte - 4, end - byte - 4)",
        {},
    ),
    "rows that are not swizzled": (
        "k_range.cuh",
        "tile + Rows::offset(row, byte)",
        "tile + row * Config::kBlockK + byte",
        {},
    ),
    "a stage that is full before it is cut": (
        "k_range.cuh",
        "is_cut(tile, k0) ? &shared.landed[state.stage] : &shared.pipeline.full[state.stage];",
        "&shared.pipeline.full[state.stage];",
        {},
    ),
    "the phase of another stage": (
        "k_range.cuh",
        "parities >> state.stage & 1",
        "state.parity",
        {"sizes": [3, 700, 900, 14]},
    ),
    "scales of blocks from the group's beginning": (
        "producer.cuh",
        "int const first = first_k(tile) / Config::kBlockK;",
        "int const first = 0;",
        {},
    ),
    "blocks that begin with the group": (
        "tile_walk.cuh",
        "return Config::kBlockScales ?",
        "return Config::kBlockScales && false ?",
        {},
    ),
    "the first group's out": (
        "epilogue.cuh",
        "int64_t{tile.group} * params.m + row",
        "row",
        {},
    ),
    "groups without K that are not written": (
        "grouped_walk.cuh",
        "if (end == begin) {",
        "if (false) {",
        {},
    ),
    "groups that end below the one before": (
        "grouped_walk.cuh",
        "int const end = max(begin, clamped_offset(params, group));",
        "int const end = clamped_offset(params, group);",
        {"offsets": [5, 130, 20, 171, 150, 176]},
    ),
    "all of K of a matrix": (
        "grouped_walk.cuh",
        "tile.k_end = end;",
        "tile.k_end = params_.k;",
        {},
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
    expect_caught(monkeypatch, tmp_path, (file, old, new), product_of(options))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS_ALONG_K)
def test_is_caught_along_k(monkeypatch, tmp_path, name):
    *edit, options = FAULTS_ALONG_K[name]
    product = make_along_k(options.get("sizes", [5, 0, 130, 1, 0, 40]), 140, 40)
    if "poisoned" in options:  # of both operands, so that cutting one of them is not enough
        product = poison(product, options["poisoned"])
    if "offsets" in options:
        index = torch.tensor(options["offsets"], dtype=torch.int32)
        product = product._replace(group_rows=index)
    expect_caught(monkeypatch, tmp_path, edit, product)


def expect_caught(monkeypatch, tmp_path, edit, product):
    want = emulated(product)
    assert_same(on_kernel(monkeypatch, product), want)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device(), "_registry", changed_kernel(tmp_path, *edit))
    rows = want.flatten(0, -2)
    assert is_caught(
        lambda seed: on_kernel(monkeypatch, product, seed=seed).flatten(0, -2), rows, seeds=4
    )

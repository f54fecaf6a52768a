"""The comparison of test_quantizer_kernels.py must catch a quantizer kernel that is wrong."""

import pytest
import torch

from cases import cumulative, int32
from flash8 import fp8
from flash8.backends.hopper import kernels
from flash8.tensors.rotary import Rope
from quantizer_cases import assert_equal, draw, ragged, tables
from quantizer_device import changed_kernels, device
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

HALVES = {"rope": Rope(*tables(64), int32((3, 50)), False)}
NEIGHBOURS = {"rope": Rope(*tables(64), int32((3, 50)), True)}
MEAN = {"smooth_k": draw(2, 64, dtype=torch.float32, seed=9)}
PACKED = {"cu_seqlens": cumulative((70, 70)), "seqused": int32((60, 70))}
MANY = {
    n: {"x": draw(sum(ragged(n)), 1, 64), "cu_seqlens": cumulative(ragged(n))} for n in (33, 65)
}
INFINITE = torch.tensor([1.0, float("inf")])[torch.randint(2, (2, 70, 2, 64))].bfloat16()

# file, what is replaced, by what, and the call that must notice.
MUTATIONS = {
    "descale for its inverse": ("cast.cu", "reciprocal(choose", "(choose", {}),
    "another largest value": ("quantize/arithmetic.cuh", ": 448.0f", ": 447.0f", {}),
    "infinities count": ("rows.cuh", "bits < kInfinity ? bits", "true ? bits", {"x": INFINITE}),
    "no mean": ("rows.cuh", "if (params.mean.ptr != nullptr)", "if (false)", MEAN),
    "mean before position": (
        "rows.cuh",
        "if (params.rope_cos != nullptr)",
        "if (params.mean.ptr != nullptr) { subtract_mean(params, tile); }\n"
        "if (params.rope_cos != nullptr)",
        MEAN | HALVES,
    ),
    "halves swapped": ("rows.cuh", "first ? -1.0f : 1.0f", "first ? 1.0f : -1.0f", HALVES),
    "neighbours swapped": ("rows.cuh", "y[2 * c] = subtract(", "y[2 * c] = add(", NEIGHBOURS),
    "no offset": ("rows.cuh", "min(start + readable_row", "min(int64_t{0} + readable_row", HALVES),
    "no signs": ("rows.cuh", "^ (signs >> c << 31)", "", {"hadamard": 1}),
    "one exchange less": (
        "rows.cuh",
        "step < Config::kLanes",
        "step < Config::kLanes / 2",
        {"hadamard": 1},
    ),
    "unused tokens count": (
        "tokens.cuh",
        "tile.counted = clamped(params.seqused[tile.batch], 0, tile.counted);",
        "",
        PACKED,
    ),
    "blocks of one sequence": (
        "packed_block.cuh",
        "/ kScaleBlock + batch",
        "/ kScaleBlock",
        PACKED,
    ),
    "no sequence behind 32": (
        "packed_block.cuh",
        "int high = offsets.sequences - 1;",
        "int high = min(offsets.sequences, 32) - 1;",
        MANY[33],
    ),
    "no sequence behind 64": (
        "packed_block.cuh",
        "int high = offsets.sequences - 1;",
        "int high = min(offsets.sequences, 64) - 1;",
        MANY[65],
    ),
    "keys in plain order": (
        "rows.cuh",
        "if constexpr (Config::kVColMajor)",
        "if constexpr (false)",
        {"v_colmajor": True},
    ),
    "banks read as written elsewhere": (
        "v_colmajor.cuh",
        "[permuted(channel, chunk) * 4]",
        "[chunk * 4]",
        {"v_colmajor": True},
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_is_caught(monkeypatch, tmp_path, mutation):
    file, old, new, options = MUTATIONS[mutation]
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    registry = changed_kernels(tmp_path, file, old, new)
    packed = "cu_seqlens" in options
    x = draw(140, 2, 64, scale=3.0) if packed else draw(2, 70, 2, 64)
    if packed:
        x[60:70] *= 100.0
    options = dict(options)
    x = options.pop("x", x)
    want = fp8.quantize(x, "block", **options)
    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(kernels, "registry", lambda: registry)
        have = fp8.quantize(x, "block", **options)
    with pytest.raises(AssertionError):
        assert_equal(have, want)

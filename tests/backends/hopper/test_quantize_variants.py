"""Variants of the quantizer: valid, unambiguous, and what the compiler is told."""

import itertools

import pytest

from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
from flash8.backends.hopper.quantize_variants import (
    SHIPPED_QUANTIZERS,
    QuantizeVariant,
    tile_head_dim,
)


def test_names_and_defines_tell_variants_apart():
    variants = [QuantizeVariant("mean_finish", "fp32", d) for d in (64, 128)]
    for dtype, head_dim in itertools.product(("fp16", "bf16", "fp32"), (64, 128, 256)):
        variants += [QuantizeVariant(job, dtype, head_dim) for job in ("amax", "mean")]
        for out, transposed in itertools.product(("e4m3", "e5m2"), (False, True)):
            variants.append(QuantizeVariant("cast", dtype, head_dim, out, transposed))
    assert len({variant.name for variant in variants}) == len(variants)
    assert len({variant.unit() for variant in variants}) == len(variants)
    assert all(variant.unit().source.is_file() for variant in variants)


def test_names_and_defines_of_one():
    variant = QuantizeVariant("cast", "bf16", 128, "e5m2", v_colmajor=True)
    assert variant.name == "quantize_cast_bf16_d128_e5m2_vcolmajor"
    assert dict(variant.defines) == {
        "FLASH8_DTYPE": "kBf16",
        "FLASH8_HEAD_DIM": "128",
        "FLASH8_OUT": "kE5m2",
        "FLASH8_V_COLMAJOR": "1",
    }
    assert variant.unit().label == variant.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job": "copy"}, "job is 'copy'; supported are"),
        ({"dtype": "fp64"}, "dtype is 'fp64'; supported are"),
        ({"out": "int8"}, "out is 'int8'; supported are"),
        ({"head_dim": 96}, r"head_dim is 96; supported are \(64, 128, 256\)"),
        ({"job": "amax", "out": "e5m2"}, "job is 'amax'; only 'cast' has out and v_colmajor"),
        ({"job": "mean", "v_colmajor": True}, "job is 'mean'; only 'cast'"),
        ({"job": "mean_finish"}, "dtype is 'bf16'; 'mean_finish' reads sums"),
    ],
)
def test_bad_choices_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        QuantizeVariant(**{"job": "cast", "dtype": "bf16", "head_dim": 128, **change})


def test_a_head_gets_the_smallest_tile():
    assert [tile_head_dim(d) for d in (16, 64, 80, 128, 192, 256)] == [64, 64, 128, 128, 256, 256]


def test_shipped_rows_are_distinct():
    assert len(set(SHIPPED_QUANTIZERS)) == len(SHIPPED_QUANTIZERS)


def test_variants_of_operands_of_products():
    variants = [
        QuantizeMatrixVariant(dtype, prologue)
        for dtype in ("fp16", "bf16", "fp32")
        for prologue in ("none", "rms_norm", "silu_mul")
    ]
    assert len({variant.name for variant in variants}) == len(variants)
    assert len({variant.unit() for variant in variants}) == len(variants)
    one = QuantizeMatrixVariant("bf16", "rms_norm")
    assert one.name == "quantize_matrix_bf16_rms_norm"
    assert dict(one.defines) == {"FLASH8_DTYPE": "kBf16", "FLASH8_PROLOGUE": "kRmsNorm"}
    with pytest.raises(ValueError, match="dtype is 'e4m3'; supported are"):
        QuantizeMatrixVariant("e4m3")
    with pytest.raises(ValueError, match="prologue is 'gelu'; supported are"):
        QuantizeMatrixVariant("bf16", "gelu")

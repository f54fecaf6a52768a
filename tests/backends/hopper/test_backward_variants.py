"""Variant keys of the backward: valid, unambiguous, and what the compiler is told."""

import itertools
import re
from dataclasses import fields

import pytest

from flash8.backends.hopper import kernels
from flash8.backends.hopper.backward_variants import (
    SHIPPED_BACKWARDS,
    TILES,
    TILES_FP8,
    BackwardStep,
    BackwardVariant,
)
from flash8.backends.hopper.variants import SHIPPED
from flash8.compiler import kernel_root


def every_variant():
    masks, flags = ("none", "causal", "local"), (False, True)
    for dtype, tile, dropout, *choices in itertools.product(
        ("fp16", "bf16"), TILES, flags, masks, flags, flags
    ):
        choices = (dtype, *tile, *choices)
        yield BackwardVariant(*choices, dropout=dropout)
        yield BackwardVariant(*choices, dq="reduced", dropout=dropout)
        yield BackwardVariant(*choices, deterministic=True, dropout=dropout)
    for dtype, tile, *choices in itertools.product(
        ("fp16", "bf16"), TILES_FP8, masks, flags, flags
    ):
        choices = (dtype, *tile, *choices)
        yield BackwardVariant(*choices, fp8=True)
        yield BackwardVariant(*choices, dq="reduced", fp8=True)
        yield BackwardVariant(*choices, deterministic=True, fp8=True)


def test_names_and_defines_tell_kernels_apart():
    variants = list(every_variant())
    assert len({variant.defines for variant in variants}) == len(variants)
    parts = {part for variant in variants for part in kernels.kernels_of(variant)}
    assert len(parts) == len(variants) + 2 * 2 * (len(TILES) + len(TILES_FP8))
    names = {part.name for part in parts} | {variant.name for variant in SHIPPED}
    assert len(names) == len(parts) + len(SHIPPED)
    assert all(name.replace("_", "").isalnum() for name in names)
    assert len({part.unit() for part in parts}) == len(parts)


def test_names_and_defines_of_one():
    variant = BackwardVariant("bf16", 128, 64, mask="causal", softcap=True, dq="reduced")
    assert variant.name == "backward_bf16_d128v64_causal_softcap_reduced"
    assert dict(variant.defines) == {
        "FLASH8_DTYPE": "kBf16",
        "FLASH8_HEAD_DIM": "128",
        "FLASH8_HEAD_DIM_V": "64",
        "FLASH8_MASK": "kCausal",
        "FLASH8_SOFTCAP": "1",
        "FLASH8_ALIBI": "0",
        "FLASH8_DROPOUT": "0",
        "FLASH8_DQ": "kReduced",
        "FLASH8_DETERMINISTIC": "0",
        "FLASH8_FP8": "0",
    }
    assert variant.unit().label == variant.name
    first, kernel, last = kernels.kernels_of(variant)
    assert (first.name, last.name) == (
        "backward_preprocess_bf16_d128v64",
        "backward_postprocess_bf16_d128v64",
    )
    assert kernel is variant
    assert [part.unit().source.name for part in (first, kernel, last)] == [
        "preprocess.cu",
        "kernel.cu",
        "postprocess.cu",
    ]


def test_the_device_code_has_these_choices_and_no_other():
    text = "".join(path.read_text() for path in sorted((kernel_root() / "backward").glob("*.cu*")))
    read = {name.lower() for name in re.findall(r"FLASH8_(\w+)", text)}
    assert read == {field.name for field in fields(BackwardVariant)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "e4m3"}, "dtype is 'e4m3'; supported are"),
        ({"mask": "full"}, "mask is 'full'; supported are"),
        ({"dq": "ordered"}, r"dq is 'ordered'; supported are \('staged', 'reduced'\)"),
        ({"dq": "reduced", "deterministic": True}, "deterministic is True with dq 'reduced'"),
        ({"head_dim": 72}, r"head_dim and head_dim_v are \(72, 128\); supported are \(\(64, 64\)"),
        ({"head_dim_v": 256}, r"head_dim and head_dim_v are \(128, 256\)"),
        ({"head_dim": 256, "head_dim_v": 256, "fp8": True}, r"are \(256, 256\); .*192\)\)$"),
    ],
)
def test_bad_choices_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BackwardVariant(**{"dtype": "bf16", "head_dim": 128, "head_dim_v": 128, **change})


def test_a_bad_step_is_named():
    with pytest.raises(ValueError, match="job is 'process'; supported are"):
        BackwardStep("process", "bf16", 128, 128)


def test_shipped_rows_are_distinct():
    assert len(set(SHIPPED_BACKWARDS)) == len(SHIPPED_BACKWARDS)

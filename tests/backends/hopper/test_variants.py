"""Variant keys: valid, unambiguous, and what the compiler is told."""

import itertools

import pytest

from flash8.backends.hopper.variants import SHIPPED, ForwardVariant


def every_variant():
    """All choices over a few head dimensions."""
    flags = (False, True)
    for dtype, scales in (("fp16", "none"), ("bf16", "none"), ("e4m3", "head"), ("e4m3", "block")):
        for dims, mask, softcap, pack_gqa, alibi, dropout in itertools.product(
            ((64, 64), (128, 128), (192, 128), (128, 64)),
            ("none", "causal", "local"),
            flags,
            flags,
            flags,
            flags,
        ):
            choices = (dtype, *dims, mask, softcap, pack_gqa, scales, alibi)
            yield ForwardVariant(*choices, dropout=dropout)
            if not dropout and dims[1] == 128:
                yield ForwardVariant(*choices, out="e4m3")
            if not dropout and scales != "block":
                yield ForwardVariant(*choices, paged=True)
                yield ForwardVariant(*choices, paged=True, gather=True)
            if not dropout and dtype != "e4m3":
                yield ForwardVariant(*choices, cache="e4m3")
            if mask == "none" and dtype != "e4m3":
                yield ForwardVariant(*choices, cluster=True, dropout=dropout)


def test_names_and_defines_tell_variants_apart():
    variants = list(every_variant())
    assert len({variant.name for variant in variants}) == len(variants)
    assert len({variant.defines for variant in variants}) == len(variants)
    assert all(variant.name.replace("_", "").isalnum() for variant in variants)


def test_names_and_defines_of_one():
    variant = ForwardVariant("bf16", 192, 128, mask="causal", pack_gqa=True)
    assert variant.name == "forward_bf16_d192v128_causal_packgqa"
    assert dict(variant.defines) == {
        "FLASH8_DTYPE": "kBf16",
        "FLASH8_HEAD_DIM": "192",
        "FLASH8_HEAD_DIM_V": "128",
        "FLASH8_MASK": "kCausal",
        "FLASH8_SOFTCAP": "0",
        "FLASH8_PACK_GQA": "1",
        "FLASH8_SCALES": "kNone",
        "FLASH8_ALIBI": "0",
        "FLASH8_CLUSTER": "0",
        "FLASH8_V_COLMAJOR": "0",
        "FLASH8_DROPOUT": "0",
        "FLASH8_PAGED": "0",
        "FLASH8_GATHER": "0",
        "FLASH8_CACHE": "kSame",
        "FLASH8_OUT": "kWide",
    }
    assert variant.unit().label == variant.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp32"}, "dtype is 'fp32'; supported are"),
        ({"mask": "full"}, "mask is 'full'; supported are"),
        ({"scales": "token"}, "scales is 'token'; supported are"),
        ({"head_dim": 0}, "head_dim is 0; supported are the multiples of 8 up to 512"),
        ({"head_dim": 100}, "head_dim is 100"),
        ({"head_dim_v": 520}, "head_dim_v is 520"),
        ({"cluster": True, "mask": "causal"}, "cluster is True with mask 'causal'"),
        ({"paged": True, "dropout": True}, "paged is True with cluster, dropout, v_colmajor or"),
        ({"gather": True}, "gather is True without paged"),
        ({"cache": "bf16"}, "cache is 'bf16'; supported are"),
        ({"out": "fp8"}, "out is 'fp8'; supported are"),
        ({"out": "e4m3", "head_dim_v": 64}, "out is 'e4m3' with head_dim_v 64 and dropout False"),
        ({"out": "e4m3", "dropout": True}, "out is 'e4m3' with head_dim_v 128 and dropout True"),
        ({"cache": "e4m3", "paged": True}, "cache is 'e4m3' with dtype 'bf16'"),
        ({"cache": "e4m3", "dtype": "e4m3", "scales": "head"}, "cache is 'e4m3' with dtype 'e4m3'"),
        ({"scales": "head"}, "scales is 'head' with dtype 'bf16'"),
        ({"dtype": "e4m3"}, "scales is 'none' with dtype 'e4m3'"),
    ],
)
def test_bad_choices_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ForwardVariant(**{"dtype": "bf16", "head_dim": 128, "head_dim_v": 128, **change})


def test_shipped_rows_are_distinct():
    assert len(set(SHIPPED)) == len(SHIPPED)

"""A call in FlashAttention-2's order is told that it looks like one."""

import warnings

import pytest
import torch

import flash8

Q = torch.randn(1, 4, 2, 8)
PACKED = Q.flatten(0, 1)
CU_SEQLENS = torch.tensor([0, 4], dtype=torch.int32)
LENGTHS = (CU_SEQLENS, CU_SEQLENS, 4, 4)
SUSPICION = "FlashAttention-2's order.*import flash8.compat.flash_attn"


@pytest.mark.parametrize(
    "call",
    [
        lambda: flash8.flash_attn_func(Q, Q, Q, 0.0, causal=True),
        lambda: flash8.flash_attn_func(Q, Q, Q, 0.1, None, True),
        lambda: flash8.flash_attn_func(Q, Q, Q, 0.1, 0.3, True),
        lambda: flash8.flash_attn_varlen_func(PACKED, PACKED, PACKED, *LENGTHS, 0.0, 0.3),
        lambda: flash8.flash_attn_varlen_func(PACKED, PACKED, PACKED, *LENGTHS, 0.1),
        lambda: flash8.flash_attn_qkvpacked_func(torch.stack((Q, Q, Q), 2), 0.0),
        lambda: flash8.flash_attn_varlen_kvpacked_func(
            PACKED, torch.stack((PACKED, PACKED), 1), *LENGTHS, 0.0
        ),
    ],
)
def test_what_cannot_be_right_says_so(call):
    with pytest.raises((TypeError, ValueError), match=SUSPICION):
        call()


def test_a_dropout_probability_as_the_scale_warns():
    with pytest.warns(
        UserWarning, match=rf"softmax_scale = 0\.1 was given by position.*{SUSPICION}"
    ):
        flash8.flash_attn_func(Q, Q, Q, 0.1, causal=True)
    with pytest.warns(UserWarning, match=r"softmax_scale = 0\.2"):
        flash8.flash_attn_qkvpacked_func(torch.stack((Q, Q, Q), 2), 0.2)


def test_what_can_be_right_is_quiet():
    arguments, options = (Q, Q, Q, 0.1), dict(softmax_scale=0.1)
    wide = torch.randn(1, 4, 2, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash8.flash_attn_func(Q, Q, Q, causal=False, softmax_scale=0.1)
        flash8.flash_attn_func(Q, Q, Q, 0.11)
        flash8.flash_attn_func(wide, wide, wide, 0.1)  # is the default
        flash8.flash_attn_func(*arguments)  # of code that cannot be looked at
        flash8.flash_attn_func(Q, Q, Q, **options)
        flash8.flash_attn_varlen_func(PACKED, PACKED, PACKED, *LENGTHS, softmax_scale=0.1)
        flash8.nn.FlashSelfAttention(softmax_scale=0.1)(torch.stack((Q, Q, Q), 2))

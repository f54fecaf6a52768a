"""Small calls of every public function, for the transforms of torch.func."""

import functools

import torch
import torch.nn.functional as F

import flash8
from cases import int32
from flash8.integrations.torch import sdpa


def small():
    return [torch.randn(1, 4, 2, 8, dtype=torch.float64) for _ in range(3)]


FACE = {
    "flash_attn_func": lambda q, k, v: flash8.flash_attn_func(q, k, v, causal=True),
    "flash_attn_varlen_func": lambda q, k, v: flash8.flash_attn_varlen_func(
        *(x[0] for x in (q, k, v)), int32([0, 3, 4]), int32([0, 1, 4]), 3, 3
    ),
    "flash_attn_qkvpacked_func": lambda q, k, v: flash8.flash_attn_qkvpacked_func(
        torch.stack((q, k, v), dim=2)
    ),
    "flash_attn_varlen_qkvpacked_func": lambda q, k, v: flash8.flash_attn_varlen_qkvpacked_func(
        torch.stack((q, k, v), dim=2)[0], int32([0, 3, 4]), 3, causal=True
    ),
    "flash_attn_kvpacked_func": lambda q, k, v: flash8.flash_attn_kvpacked_func(
        q, torch.stack((k, v), dim=2)
    ),
    "flash_attn_varlen_kvpacked_func": lambda q, k, v: flash8.flash_attn_varlen_kvpacked_func(
        q[0], torch.stack((k, v), dim=2)[0], int32([0, 3, 4]), int32([0, 1, 4]), 3, 3
    ),
    "flash_attn_with_kvcache": lambda q, k, v: flash8.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=3, num_splits=2
    ),
    "flash_attn_combine": lambda q, k, v: flash8.flash_attn_combine(
        torch.stack((q, k, v)), torch.stack((q, k, v))[..., 0]
    ),
    "FlashSelfAttention": lambda q, k, v: flash8.nn.FlashSelfAttention(causal=True)(
        torch.stack((q, k, v), dim=2)
    ),
    "FlashCrossAttention": lambda q, k, v: flash8.nn.FlashCrossAttention()(
        q, torch.stack((k, v), dim=2)
    ),
    "FlashMHA": lambda q, k, v: _mha()(torch.cat((q, k, v), dim=1).flatten(2)),
    "FlashMHA, padded": lambda q, k, v: _mha()(
        torch.cat((q, k, v), dim=1).flatten(2), key_padding_mask=torch.arange(12)[None] > 8
    ),
    "sdpa": lambda q, k, v: _sdpa(q, k, v),
    "sdpa, hidden keys": lambda q, k, v: _sdpa(q, k, v, attn_mask=torch.arange(4)[None] < 3),
    "pack, unpack": lambda q, k, v: torch.cat(_packed(q[0, :3], k[0, 1:], v[0])),
}


@functools.cache
def _mha():
    torch.manual_seed(0)
    return flash8.nn.FlashMHA(
        16, 2, num_heads_kv=1, causal=True, rotary_dim=8, sinks=True, dtype=torch.float64
    )


def _sdpa(q, k, v, **options):
    with sdpa(strict=True):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)


def _packed(*tensors):
    x, ends, longest = flash8.varlen.pack(tensors)
    out = flash8.flash_attn_varlen_func(x, x, x, ends, ends, longest, longest)
    return flash8.varlen.unpack(out, ends)


def summed(call):
    """One tensor of all outputs."""

    def function(*tensors):
        found = call(*tensors)
        return torch.cat([x.flatten() for x in (found if isinstance(found, tuple) else (found,))])

    return function

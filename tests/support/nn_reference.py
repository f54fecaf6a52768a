"""The maths of flash8.nn spelt out in float64, and the modules that the tests compare with it."""

import math

import torch
import torch.nn.functional as F

from flash8.nn import (
    FlashMHA,
    RotaryEmbedding,
)

LENGTHS = [5, 0, 17, 1, 9]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 3e-2}


def assert_near(got, want, dtype=None):
    tolerance = TOLERANCE[dtype or got.dtype]
    torch.testing.assert_close(
        got.double(), want.double(), rtol=tolerance, atol=tolerance, check_dtype=False
    )


def sdpa(q, k, v, **options):
    """torch's attention on (batch, seqlen, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def reference_mha(mha: FlashMHA, x: torch.Tensor) -> torch.Tensor:
    """The module's maths for one sequence (seqlen, embed_dim), spelt out in float64."""
    seqlen, heads, heads_kv, d = x.shape[0], mha.num_heads, mha.num_heads_kv, mha.head_dim
    weights = {name: p.double() for name, p in mha.named_parameters()}
    qkv = F.linear(x.double(), weights["in_proj.weight"], weights.get("in_proj.bias"))
    qkv = qkv.reshape(seqlen, heads + 2 * heads_kv, d).transpose(0, 1)
    q, k, v = qkv.split([heads, heads_kv, heads_kv])
    if mha.rotary is not None:
        q, k = (rotate_by_hand(t, mha.rotary) for t in (q, k))
    k, v = (t.repeat_interleave(heads // heads_kv, 0) for t in (k, v))
    scale = d**-0.5 if mha.softmax_scale is None else mha.softmax_scale
    scores = q @ k.transpose(1, 2) * scale
    if mha.softcap > 0:
        scores = mha.softcap * (scores / mha.softcap).tanh()
    distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
    if mha.alibi_slopes is not None:
        scores = scores - mha.alibi_slopes.double()[:, None, None] * distance.abs()
    left, right = mha.window_size
    hidden = torch.zeros(seqlen, seqlen, dtype=torch.bool)
    hidden |= (distance > left) if left >= 0 else False
    hidden |= (distance < -right) if right >= 0 else False
    hidden |= (distance < 0) if mha.causal else False
    scores = scores.masked_fill(hidden, -math.inf)
    if mha.sinks is not None:
        sink = weights["sinks"][:, None, None].expand(heads, seqlen, 1)
        weight = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weight = scores.softmax(-1)
    attended = (weight @ v).transpose(0, 1).reshape(seqlen, heads * d)
    return F.linear(attended, weights["out_proj.weight"], weights.get("out_proj.bias"))


def rotate_by_hand(x: torch.Tensor, rotary: RotaryEmbedding) -> torch.Tensor:
    """Complex multiplication, (heads, seqlen, d)."""
    half = rotary.dim // 2
    angles = torch.arange(x.shape[1])[:, None] * rotary.base ** (
        -torch.arange(0, rotary.dim, 2).double() / rotary.dim
    )
    turned, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    if rotary.interleaved:
        pairs = turned.reshape(*turned.shape[:-1], half, 2)
    else:
        pairs = turned.reshape(*turned.shape[:-1], 2, half).transpose(-1, -2)
    pairs = torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * torch.polar(
        torch.ones_like(angles), angles
    )
    pairs = torch.view_as_real(pairs)
    if not rotary.interleaved:
        pairs = pairs.transpose(-1, -2)
    return torch.cat((pairs.reshape(turned.shape), rest), -1)


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "gqa": {"causal": True, "num_heads_kv": 2},
    "mqa, no bias": {"num_heads_kv": 1, "bias": False},
    "rotary": {"causal": True, "rotary_dim": 16},
    "rotary interleaved": {"rotary_dim": 16, "rotary_interleaved": True, "rotary_base": 100.0},
    "half rotary": {"causal": True, "rotary_dim": 16, "head_dim": 24},
    "window": {"window_size": (3, 2)},
    "causal window": {"causal": True, "window_size": (3, 0), "num_heads_kv": 2},
    "softcap": {"softcap": 0.5, "softmax_scale": 1.0},
    "sinks": {"causal": True, "sinks": True},
    "alibi": {"causal": True, "alibi": True},
}


def make_mha(dtype=torch.float32, **options) -> FlashMHA:
    torch.manual_seed(1)
    mha = FlashMHA(64, 4, dtype=dtype, **options)
    with torch.no_grad():
        if mha.in_proj.bias is not None:
            mha.in_proj.bias.normal_()
        if mha.sinks is not None:
            mha.sinks.normal_()
    return mha

"""FP8 inputs and their dequantized values."""

import torch

from fp8_model import quantise


def inputs(seqlen_q, seqlen_k, heads=2, heads_kv=1, d=128, dv=128, batch=1, seed=0, mean_v=0.0):
    """fp32 q, k, v with unit normal entries."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, seqlen_q, heads, d, generator=g)
    k = torch.randn(batch, seqlen_k, heads_kv, d, generator=g)
    v = torch.randn(batch, seqlen_k, heads_kv, dv, generator=g) + mean_v
    return q, k, v


def quantised(q, k, v):
    """e4m3 tensors and FA3's (batch, heads_kv) descales by name."""
    q8, q_descale = quantise(q, q.shape[2] // k.shape[2])
    k8, k_descale = quantise(k)
    v8, v_descale = quantise(v)
    return (q8, k8, v8), dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)


def sink_key(position, seqlen=2048):
    """One key with a logit 13 above the rest and no value, the others with values of mean 0.5."""
    q, k, v = inputs(32, seqlen, 1, 1, dv=64, mean_v=0.5)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, position, :, 0] = 13.0 * 128**0.5 / 8.0
    v[:, position] = 0.0
    return quantised(q, k, v)

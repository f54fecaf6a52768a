"""The QKV projection by its parts: the product in fp32, RMSNorm of heads, and the quantizer.

It is what the kernel does in one pass, bit by bit: nothing is rounded between the parts."""

from collections.abc import Callable

import torch
from torch import Tensor

from flash8.backends.cpu import gemm, quantize
from flash8.call.qkv_projection import Projection
from flash8.call.request import Request
from flash8.call.scaled_mm import Product
from flash8.tensors.rms_norm import rms_norm

Quantize = Callable[[Request], tuple[Tensor, Tensor, Tensor]]


def qkv_projection(projection: Projection) -> tuple[Tensor, ...]:
    """q, its descale, k, its descale, v and its descale, as `Projection` has their shapes."""
    return by_parts(projection, _multiply, quantize.quantize)


def by_parts(
    projection: Projection, multiply: Callable[[Product], Tensor], quantize: Quantize
) -> tuple[Tensor, ...]:
    """The same, by a product in fp32 and a quantizer."""
    p, d = projection, projection.head_dim
    x = multiply(p.product).unflatten(-1, (-1, d))  # (tokens, heads, d)
    x = x.view(*p.a.shape[:-1], *x.shape[1:])
    q, k, v = x.split((p.heads_q, p.heads_kv, p.heads_kv), dim=-2)
    found: list[Tensor] = []
    for y, norm in ((q, p.q_norm), (k, p.k_norm)):
        y = y if norm is None else rms_norm(y, norm)
        request = Request(y, "block", rope=p.rope, cu_seqlens=p.cu_seqlens, seqused=p.seqused)
        found += quantize(request)[:2]
    request = Request(v, "block", cu_seqlens=p.cu_seqlens, seqused=p.seqused, v_colmajor=True)
    found += quantize(request)[:2]
    return tuple(x.contiguous() for x in found)


def _multiply(product: Product) -> Tensor:
    m, n, _ = product.sizes
    out = product.a.new_empty((m, n), dtype=torch.float32)
    gemm.scaled_mm(product, out)
    return out

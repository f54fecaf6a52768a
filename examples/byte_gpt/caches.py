"""The KV caches a model is served from: 16-bit, and e4m3 with descales from a few texts."""

from __future__ import annotations

import torch
from torch import Tensor

import data
from config import Config, device, mixed_precision
from flash8 import fp8, varlen
from flash8.nn import PagedKVCache
from model import ByteGPT

HEADROOM = 2.0  # beyond what calibration saw; a floating-point scale loses little by it


def paged_cache(
    config: Config,
    dtype: torch.dtype,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> PagedKVCache:
    """An empty cache of the demo's sizes; descales are (layers, heads)."""
    return PagedKVCache(
        config.layers,
        config.pool_pages,
        config.page_size,
        config.serve_rows,
        config.longest + config.new_tokens,
        config.heads,
        config.head_dim,
        dtype=dtype,
        device=device(),
        k_descale=k_descale,
        v_descale=v_descale,
    )


@torch.no_grad()
def e4m3_cache(model: ByteGPT, config: Config, documents: list[data.Document]) -> PagedKVCache:
    """A cache whose descales come from the largest keys and values of these documents."""
    texts = [document.tokens for document in documents]
    pages = sum(-(-text.shape[0] // config.page_size) for text in texts)
    seen = PagedKVCache(
        config.layers,
        pages,
        config.page_size,
        len(texts),
        max(text.shape[0] for text in texts),
        config.heads,
        config.head_dim,
        dtype=torch.bfloat16,
        device=device(),
    )
    rows = [seen.add_sequence() for _ in texts]
    tokens, cu_seqlens, max_seqlen = varlen.pack(texts)
    step = seen.prepare(rows, [text.shape[0] for text in texts])
    with mixed_precision(device()):
        model(tokens.to(device()), cu_seqlens.to(device()), max_seqlen, step)
    descales = (fp8.quantize(x.flatten(1, 2), "head").descale * HEADROOM for x in (seen.k, seen.v))
    return paged_cache(config, torch.float8_e4m3fn, *descales)

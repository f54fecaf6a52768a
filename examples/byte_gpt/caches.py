"""The KV caches a model is served from: 16-bit, and e4m3 with descales from a few texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

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
        config.longest_document + config.new_tokens,
        config.heads,
        config.head_dim,
        dtype=dtype,
        device=device(),
        k_descale=k_descale,
        v_descale=v_descale,
    )


@torch.no_grad()
def e4m3_cache(model: ByteGPT, config: Config, documents: list[Tensor]) -> PagedKVCache:
    """A cache whose descales come from the largest keys and values of these documents."""
    texts = documents[: config.calibration_documents]
    texts = [text[: config.cached_tokens] for text in texts]
    pages = sum(-(-text.shape[0] // config.page_size) for text in texts)
    seen = PagedKVCache(
        config.layers,
        pages,
        config.page_size,
        len(texts),
        config.cached_tokens,
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


@torch.no_grad()
def loss_through(
    cache: PagedKVCache, model: ByteGPT, config: Config, documents: list[Tensor], label: str
) -> float:
    """Nats per byte of the documents' beginnings, read a few tokens at a time from an empty cache.

    Every token is appended before it is attended to, so each of its keys and values has been
    through the cache.
    """
    length = config.cached_tokens
    texts = [text[: length + 1] for text in documents if text.shape[0] > length]
    tokens = torch.stack(texts[: config.serve_rows]).to(device())
    rows = [cache.add_sequence() for _ in tokens]
    total = 0.0
    starts = range(0, length, config.cached_chunk)
    for begin in tqdm(starts, desc=f"held-out texts, {label}", unit="step"):
        end = min(begin + config.cached_chunk, length)
        step = cache.prepare(rows, end - begin)
        with mixed_precision(device()):
            logits = model(tokens[:, begin:end], step=step)
        step.commit()
        targets = tokens[:, begin + 1 : end + 1].flatten()
        total += F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum").item()
    for row in rows:
        cache.remove_sequence(row)
    return total / (len(rows) * length)

"""Masks that models ask transformers for, of every kind, and attention under them."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import masking_utils

from flash8.integrations.transformers.attention import attend

BATCH, HEADS, HEADS_KV, HEAD_DIM = 3, 4, 2, 8
SEQLEN = 11

MASKS = {
    "causal": (masking_utils.create_causal_mask, {}),
    "window_4": (masking_utils.create_sliding_window_causal_mask, {"sliding_window": 4}),
    "window_1": (masking_utils.create_sliding_window_causal_mask, {"sliding_window": 1}),
    "chunk_4": (masking_utils.create_chunked_causal_mask, {"attention_chunk_size": 4}),
    "bidirectional": (masking_utils.create_bidirectional_mask, {}),
    "bidirectional_window_2": (
        masking_utils.create_bidirectional_sliding_window_mask,
        {"sliding_window": 2},
    ),
}

PADDING = {
    "none": [range(SEQLEN)] * 3,
    "left": [range(5, SEQLEN), range(1, SEQLEN), range(SEQLEN)],
    "right": [range(4), range(SEQLEN - 1), range(SEQLEN)],
    "both": [range(2, 9), range(SEQLEN), range(3, 4)],
    "empty_row": [range(0), range(2, SEQLEN), range(SEQLEN)],
    "holes": [[0, 1, 4, 5, 10], range(SEQLEN), [2, 3, 4, 6, 7, 8, 9]],
}


def padding_mask(kind):
    mask = torch.zeros(BATCH, SEQLEN, dtype=torch.long)
    for row, valid in enumerate(PADDING[kind]):
        mask[row, list(valid)] = 1
    return mask


class Config:
    """What masks ask of a configuration."""


def build(kind, implementation, q_length, attention_mask=None, cache=None, **kwargs):
    """The mask of a model whose configuration has what `kind` needs."""
    create, values = MASKS[kind]
    config = Config()
    for key, value in ({"_attn_implementation": implementation} | values).items():
        setattr(config, key, value)
    embeds = torch.empty(BATCH, q_length, 0)
    return create(config, embeds, attention_mask, past_key_values=cache, **kwargs)


def tensors(q_length, kv_length):
    q = torch.randn(BATCH, HEADS, q_length, HEAD_DIM, dtype=torch.float64)
    k, v = torch.randn(2, BATCH, HEADS_KV, kv_length, HEAD_DIM, dtype=torch.float64)
    return q, k, v


def check(layout, dense, q, k, v, rows=None, is_causal=True):
    """Our output under the layout (or the output itself) equals that of the dense mask, at the used
    rows of q."""
    mask = None if dense is None else dense == 0
    reference = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and is_causal, enable_gqa=True
    ).transpose(1, 2)
    out = layout
    if not isinstance(layout, torch.Tensor):
        module = SimpleNamespace(is_causal=is_causal)
        out, weights = attend(module, q, k, v, layout)
        assert weights is None
    assert out.shape == reference.shape
    rows = torch.ones(out.shape[:2], dtype=torch.bool) if rows is None else rows.bool()
    torch.testing.assert_close(out[rows], reference[rows], rtol=1e-10, atol=1e-10)

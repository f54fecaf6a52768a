"""V with its keys contiguous, as the tensor cores read it: (..., heads, d, 128 * blocks).

Blocks are those of `flash8.tensors.descales`: of every sequence of a dense tensor, or of all
sequences of a packed one, sequence b from number cu_seqlens[b] // 128 + b. Keys that do not count
are zero. Within every 16 keys the order is `KEY_ORDER`: that of the columns of P which one thread
of a warpgroup has, so that P goes from one product to the next in its registers. Within every whole
16 channels it is `CHANNEL_ORDER`, which gives a thread neighbouring columns of O. Both are the
orders that the kernel's own transposition leaves (hopper/forward/transpose_v.cuh).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash8.tensors.descales import BLOCK, num_blocks, num_packed_blocks
from flash8.tensors.tokens import Tokens

#: Place 4 q + r of 16 holds key 2 q + r % 2 + 8 (r // 2).
KEY_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
#: Row 8 h + g of 16 holds channel 2 g + h.
CHANNEL_ORDER = (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)


def colmajor_shape(shape: torch.Size, batch: int, packed: bool) -> tuple[int, ...]:
    """(batch, heads, d, 128 * blocks), or (heads, d, 128 * blocks) of a packed tensor."""
    *_, tokens, heads, width = shape
    if packed:
        return heads, width, BLOCK * num_packed_blocks(tokens, batch)
    return batch, heads, width, BLOCK * num_blocks(tokens)


def to_colmajor(data: Tensor, tokens: Tokens) -> Tensor:
    """8-bit (batch, seqlen, heads, d) or (total, heads, d) with keys innermost."""
    raw = data.view(torch.uint8)
    used = tokens.used(data)
    if used is not None:
        raw = torch.where(used[..., None, None], raw, 0)
    if tokens.cu_seqlens is None:
        raw = pad(raw, (0, 0, 0, 0, 0, num_blocks(data.shape[1]) * BLOCK - data.shape[1]))
    else:
        places = tokens.places(data)
        rows = BLOCK * num_packed_blocks(data.shape[0], tokens.cu_seqlens.shape[0] - 1)
        raw = raw.new_zeros((rows, *raw.shape[1:])).index_copy(0, places, raw)
    colmajor = _reordered(raw.movedim(-3, -1), KEY_ORDER)
    return _channels_reordered(colmajor, CHANNEL_ORDER).view(data.dtype)


def from_colmajor(data: Tensor, keys: int, tokens: Tokens) -> Tensor:
    """The first `keys` tokens, (batch, keys, heads, d), or all `keys` of a packed tensor."""
    raw = _reordered(data.view(torch.uint8), _inverse(KEY_ORDER))
    raw = _channels_reordered(raw, _inverse(CHANNEL_ORDER)).movedim(-1, -3)
    if tokens.cu_seqlens is None:
        return raw[:, :keys].contiguous().view(data.dtype)
    like = raw.new_empty((keys, *raw.shape[1:]))
    return raw[tokens.places(like)].view(data.dtype)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(place) for place in range(len(order)))


def _channels_reordered(raw: Tensor, order: tuple[int, ...]) -> Tensor:
    whole = raw.shape[-2] // 16 * 16
    sixteens = _reordered(raw[..., :whole, :].transpose(-1, -2), order).transpose(-1, -2)
    return torch.cat((sixteens, raw[..., whole:, :]), dim=-2)


def _reordered(raw: Tensor, order: tuple[int, ...]) -> Tensor:
    index = torch.tensor(order, device=raw.device)
    reordered: Tensor = raw.unflatten(-1, (-1, 16)).index_select(-1, index).flatten(-2)
    return reordered

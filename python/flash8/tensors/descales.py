"""Descales, the factors of float8 tensors: their shapes and the values that they may have.

x ~ descale * x_fp8 [+ mean], everything fp32. A descale's rank says what it belongs to:

    ()                                  the whole tensor
    (batch, heads)                      a head of a sequence; heads_kv, or for q also its heads
    (batch, heads, ceil(seqlen / 128))  128 tokens of a dense tensor
    (1, heads, total // 128 + batch)    128 tokens of a packed tensor; sequence b's first block is
                                        number cu_seqlens[b] // 128 + b (`block_offsets`)
    (pages, heads, 1)                   a page of a paged cache
    (batch or pages, tokens, heads)     a token of a KV cache: the cache's shape without channels

V may have another one per channel beside it, (heads_kv, d) or (batch, heads_kv, d), which O is
multiplied with when it is complete. K's channels have none: they would multiply inside q . k.

Blocks of a packed tensor start with their sequence, so a tile never has two descales. Their
number depends on shapes only and their place on cu_seqlens only: nothing needs the lengths on the
host.
"""

import torch
from torch import Tensor

from flash8.tensors.arguments import require_rank, require_tensor

#: Tokens that share a block descale: kBlockN of the kernels, and kBlockM of a warpgroup pair.
BLOCK = 128
#: Descales are at least this, the smallest normal number of fp32, and finite.
SMALLEST = 2.0**-126
#: Its inverse is a normal number, too.
LARGEST = 2.0**126


def num_blocks(seqlen: int) -> int:
    """Blocks of a dense sequence."""
    return -(-seqlen // BLOCK)


def is_per_token(descale: Tensor | None, cache: Tensor) -> bool:
    """Whether a descale of the KV cache has a value for each token. (The other shapes of rank 3 are
    equal to this one only where they mean the same.)"""
    return descale is not None and descale.dim() == 3 and descale.shape == cache.shape[:-1]


def num_packed_blocks(total: int, batch: int) -> int:
    """Blocks that any `batch` sequences of `total` tokens together fit in."""
    return total // BLOCK + batch


def block_offsets(cu_seqlens: Tensor) -> Tensor:
    """The first block of every sequence of a packed tensor, int64 (batch,).

    Raises TypeError or ValueError when cu_seqlens is not int32 or int64 (batch + 1,).
    """
    require_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    require_rank("cu_seqlens", cu_seqlens, 1, "(batch + 1,)")
    starts = cu_seqlens[:-1].long()
    return starts // BLOCK + torch.arange(starts.shape[0], device=starts.device)


def checked(descale: Tensor) -> Tensor:
    """The descale with NaN for every value that is none: not positive, too small or not finite.

    So what it scales is visibly wrong, on devices whose values the host does not read.
    """
    return torch.where(_fits(descale), descale, float("nan"))


def check_value(name: str, descale: Tensor) -> None:
    """Raises ValueError where a descale holds what is none. Reads it: for CPU tensors."""
    fits = _fits(descale)
    if bool(fits.all()):
        return
    index = (~fits).nonzero()[0].tolist()
    place = f" at {index}" if index else ""
    raise ValueError(
        f"{name} must be positive and finite, from 2^-126 to 2^126, "
        f"got {descale[tuple(index)]}{place}"
    )


def _fits(descale: Tensor) -> Tensor:
    return (descale >= SMALLEST) & (descale <= LARGEST)

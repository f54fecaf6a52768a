"""Calls of the forward kernel over a paged cache, made of dense calls.

The pages of a call are those of the dense one in another order. What no query sees is NaN: unused
slots, pages that belong to nobody, pages that a window has left behind. The table has no page for
them either.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

import oracle
from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import draw, int32, launch, masks, packed, poisoned, sequences
from forward_launch import Call, Schedule

MOST = 2**31 - 1
#: What stands in a table where no page is needed.
NO_PAGES = (-1, MOST, 10**6, -(2**31))
#: No key, one, around a tile of 128, and several.
LENGTHS = (0, 1, 127, 128, 129, 300)
#: Masks that leave keys behind, and one that does not.
MASKS = {
    "window": {"window": (70, 0)},
    "both sides": {"window": (37, 21)},
    "chunks": {"attention_chunk": 90},
    "causal": {"causal": True, "window": (-1, -1)},
}


def dense_call(variant: ForwardVariant, lengths=LENGTHS, *, seqlen_q=20, heads=2, **given) -> Call:
    """Over a dense cache of which `lengths` are used."""
    q, k, v = draw(variant, seqlen_q, max(lengths), heads, 1, batch=len(lengths))
    indices = {"seqused_k": int32(lengths), **given.pop("indices", {})}
    return Call(q, k, v, variant.head_dim**-0.5, **{**masks(variant), **given}, indices=indices)


def call_with_freed_pages(variant: ForwardVariant, mask: str, **given) -> Call:
    """Of few queries, so that masks but the causal one hide all of some pages."""
    return dense_call(variant, (0, 5, 300, 420), seqlen_q=9, heads=1, **MASKS[mask], **given)


def padded_call(variant: ForwardVariant, mask: str | None = None, **given) -> Call:
    """With left padding: none, all of a sequence, and more than a tile."""
    indices = {"leftpad_k": int32([0, 1, 7, 8, 70, 130, 300])}
    lengths = (300, 1, 127, 128, 129, 300, 300)
    own_mask = {} if mask is None else MASKS[mask]
    return dense_call(variant, lengths, heads=1, indices=indices, **own_mask, **given)


def call_of_rows(variant: ForwardVariant, **given) -> Call:
    """Over rows of a cache in any order, twice, and none; the queries are packed."""
    rows = (0, 150, 1, 20, 3, 140)
    q = torch.randn(sum(rows), 1, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    indices = {
        "kv_batch_idx": int32([5, 2, 4, -1, 4, 0]),
        "seqused_k": int32([300, 1, 90, 9, 7, 0]),
        "cu_seqlens_q": packed(rows),
    }
    call = dense_call(variant, heads=1, indices=indices, **given)
    return replace(call, q=q, max_seqlen_q=150)


def paged(call: Call, page_size: int, *, seed: int = 0) -> Call:
    """The same call over pages."""
    generator = torch.Generator().manual_seed(seed)
    rows, capacity = call.k.shape[:2]
    columns = -(-capacity // page_size) + 1
    seen = seen_keys(call, columns * page_size).view(rows, columns, page_size)
    wanted = seen.any(dim=-1)
    pages = int(wanted.sum()) + 3
    order = torch.randperm(pages, generator=generator)[: pages - 3].int()
    table = int32(NO_PAGES).repeat(-(-wanted.numel() // len(NO_PAGES)))[: wanted.numel()]
    table = table.view(rows, columns)
    table[wanted] = order

    def stored(x: Tensor) -> Tensor:
        wide = x.new_zeros(rows, columns * page_size, *x.shape[2:])
        wide[:, :capacity] = x
        wide = torch.where(seen.view(rows, -1, 1, 1), wide.float(), math.nan).to(x.dtype)
        found = torch.full((pages, page_size, *x.shape[2:]), math.nan).to(x.dtype)
        found[order.long()] = wide.view(rows, columns, page_size, *x.shape[2:])[wanted]
        return found

    q = poisoned(call).q
    return replace(call, q=q, k=stored(call.k), v=stored(call.v), page_table=table)


def seen_keys(call: Call, room: int) -> Tensor:
    """bool (rows of the cache, room): some query sees the key."""
    seen = torch.zeros(call.k.shape[0], room, dtype=torch.bool)
    for used in sequences(call):
        row, keys = used.keys
        rows, count = call.q[used.queries].shape[0], keys.stop - keys.start
        if row >= 0 and rows > 0 and count > 0:
            window = (call.causal, call.window, call.attention_chunk)
            seen[row, keys] |= oracle.visible(rows, count, *window).any(dim=0)
    return seen


def check_bits(
    variant: ForwardVariant,
    call: Call,
    page_size: int,
    schedule: Schedule | None = None,
    *,
    seeds=(0, 1),
) -> None:
    """A paged variant gives the bits of the dense one, under every schedule."""
    want = launch(replace(variant, paged=False, gather=False), poisoned(call), schedule)
    for seed in seeds:
        found = launch(variant, paged(call, page_size, seed=seed), schedule, seed=seed)
        for name, x, y in zip(("O", "LSE"), found, want, strict=True):
            assert torch.equal(x, y), f"{name} differs from that of a dense cache, seed {seed}"

"""What a call of this package is refused for, and what its arguments say together.

Every rank raises the same for what all ranks are given alike. What only one of them sees (a wrong
number of rows) stops that one, and the others wait for it as they do for any rank that has failed.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flash8.distributed.layout import LAYOUTS, Batch
from flash8.fp8.recipes import Recipe
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    describe,
    require_int,
    require_rank,
    require_tensor,
)

METHODS = ("all_gather", "ring", "ulysses", "ulysses+ring")
_INT32_MAX = 2**31 - 1


class Ranks(NamedTuple):
    """The ranks of a call: their number, and which one this is."""

    size: int
    rank: int
    groups: tuple[ProcessGroup, ...]  # one, or (ulysses, ring)

    def local_count(self, batch: Batch) -> int:
        return batch.counts(self.size)[self.rank]


def ranks_of(group: Any) -> Ranks:
    """Those of a process group, or of a pair (ulysses, ring), which form a grid: of the ranks of
    the sequences number u of a Ulysses group, itself number r of its ring, is r * U + u."""
    groups = tuple(group) if isinstance(group, (tuple, list)) else (group,)
    if len(groups) not in (1, 2) or not all(isinstance(x, ProcessGroup) for x in groups):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup (mesh.get_group() of a DeviceMesh) of "
            f"this process, or a pair (ulysses, ring) of them, got {describe(group)}"
        )
    if len(groups) == 1:
        return Ranks(groups[0].size(), groups[0].rank(), groups)
    ulysses, ring = groups
    shared = {*dist.get_process_group_ranks(ulysses)} & {*dist.get_process_group_ranks(ring)}
    if shared != {dist.get_rank()}:
        raise ValueError(
            "group = (ulysses, ring) must have this process and no other in common, as the two "
            f"dimensions of a DeviceMesh do, got ranks {sorted(shared)} in both"
        )
    return Ranks(
        ulysses.size() * ring.size(), ring.rank() * ulysses.size() + ulysses.rank(), groups
    )


def method(value: Any, ranks: Ranks) -> str:
    if value not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {value!r}")
    if (len(ranks.groups) == 2) != (value == "ulysses+ring"):
        wanted = "a pair (ulysses, ring)" if value == "ulysses+ring" else "one ProcessGroup"
        got = "a pair" if len(ranks.groups) == 2 else "one ProcessGroup"
        raise ValueError(f"group must be {wanted} with method={value!r}, got {got}")
    return str(value)


def fp8_method(value: str, recipe: Recipe) -> None:
    if value not in ("ring", "ulysses+ring"):
        return
    if recipe.backward != "16bit":
        raise ValueError(
            f"recipe.backward must be '16bit' with method={value!r}, got {recipe.backward!r}: its "
            "FP8 products need all keys of a query in one call, as 'all_gather' and 'ulysses' have "
            "them"
        )
    if value == "ulysses+ring" and recipe.scaling("k").granularity == "block":
        raise ValueError(
            f"recipe must not scale by 128 tokens with method={value!r}, got {recipe}: the pieces "
            "that go around begin inside of them; take CurrentScaling or DelayedScaling"
        )


def layout(value: Any) -> str:
    if value not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {value!r}")
    return str(value)


def packed_batch(cu_seqlens: Any, layout: str, like: Tensor | None = None) -> Batch:
    """The batch that cu_seqlens describes. Reads it on the host."""
    require_tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES)
    require_rank("cu_seqlens", cu_seqlens, 1, "(batch + 1,)")
    offsets = cu_seqlens.tolist()
    lengths = tuple(end - begin for begin, end in zip(offsets, offsets[1:], strict=False))
    if not offsets or offsets[0] != 0 or min(lengths, default=0) < 0 or offsets[-1] > _INT32_MAX:
        raise ValueError(
            "cu_seqlens must start at 0, never decrease, and hold at most 2^31 - 1 tokens: the "
            f"lengths of the whole sequences, summed up; got {offsets[:8]}"
        )
    return Batch(lengths, layout)


def no_seqlen(seqlen: Any, cu_seqlens: Any) -> None:
    if seqlen is not None and cu_seqlens is not None:
        raise ValueError(
            f"seqlen must be None with cu_seqlens, which have the lengths, got {seqlen!r}"
        )


def dense_batch(x_name: str, x: Tensor, seqlen: Any, ranks: Ranks, layout: str) -> Batch:
    """The batch of whole sequences of one length, from a rank's part (batch, seqlen, ...)."""
    if x.dim() < 2:
        raise ValueError(
            f"{x_name} must be (batch, seqlen, ...), or packed (total, ...) with cu_seqlens, got "
            f"shape {tuple(x.shape)}"
        )
    if seqlen is None:
        seqlen = x.shape[1] * ranks.size
    seqlen = require_int("seqlen", seqlen, minimum=0, maximum=_INT32_MAX)
    return Batch((seqlen,) * x.shape[0], layout)


def local_rows(x_name: str, x: Tensor, batch: Batch, ranks: Ranks, packed: bool) -> None:
    """Raises where x, a rank's part, has not the tokens that the layout gives it."""
    expected = ranks.local_count(batch)
    got = x.shape[0] if packed else x.shape[0] * x.shape[1]
    if got == expected:
        return
    whole = f"cu_seqlens of {sum(batch.lengths)} tokens" if packed else f"seqlen={batch.lengths[0]}"
    wanted = expected if packed else expected // x.shape[0]
    raise ValueError(
        f"{x_name} must have {wanted} tokens{'' if packed else ' a sequence'}: what rank "
        f"{ranks.rank} of {ranks.size} has of {whole} in layout {batch.layout!r} (see "
        f"flash8.distributed.shard); got shape {tuple(x.shape)}"
    )


def same_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {x.device}")

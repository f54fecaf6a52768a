"""What the ranks tell each other. Tensors go as they are, float8 as bytes, which every backend of
torch.distributed knows."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flash8.tensors.float8 import E4M3, E5M2


def gather(x: Tensor, longest: int, group: ProcessGroup) -> Tensor:
    """(ranks * longest, ...): the rows of all ranks, each with zeros up to `longest`."""
    padded = _bytes(x)
    if len(x) < longest:
        padded = padded.new_zeros((longest, *padded.shape[1:]))
        padded[: len(x)] = _bytes(x)
    found = padded.new_empty((group.size() * longest, *padded.shape[1:]))
    dist.all_gather_single(found, padded.contiguous(), group=group)
    return found.view(x.dtype)


def scatter_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """A rank's part of the sum of (ranks * longest, ...) over ranks."""
    found = x.new_empty((len(x) // group.size(), *x.shape[1:]))
    dist.reduce_scatter_single(found, x, group=group)
    return found


class Passing:
    """A tensor on its way to another rank, `shift` ranks on, and one on its way from there."""

    def __init__(self, x: Tensor, rows: int, group: ProcessGroup, shift: int = 1) -> None:
        self._sent = _bytes(x.contiguous())
        self._found = self._sent.new_empty((rows, *self._sent.shape[1:]))
        self._dtype = x.dtype
        rank, size = group.rank(), group.size()
        sends = dist.P2POp(dist.isend, self._sent, group=group, group_peer=(rank + shift) % size)
        receives = dist.P2POp(
            dist.irecv, self._found, group=group, group_peer=(rank - shift) % size
        )
        self._works = dist.batch_isend_irecv([sends, receives])

    def wait(self) -> Tensor:
        """What has come. What was sent may be written to after this."""
        for work in self._works:
            work.wait()
        return self._found.view(self._dtype)


def exchange(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup
) -> Tensor:
    """Sends sent[r] elements of the flat x to rank r and gives what came, rank by rank."""
    flat = _bytes(x)
    found = flat.new_empty(sum(received))
    dist.all_to_all_single(found, flat, list(received), list(sent), group=group)
    return found.view(x.dtype)


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype in (E4M3, E5M2) else x

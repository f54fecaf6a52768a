"""Which tokens share a descale: reductions over, and broadcasts back to, the tokens of a tensor.

Plain torch operations without a look at the data, so they trace and never wait for a device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash8.tensors.descales import BLOCK, block_offsets, num_blocks, num_packed_blocks
from flash8.tensors.rotary import token_sequences

GRANULARITIES = ("tensor", "head", "block", "page", "channel")


@dataclass(frozen=True)
class Tokens:
    """The tokens of (batch, seqlen, heads, d), of (pages, page_size, heads, d), or with cu_seqlens
    of (total, heads, d)."""

    cu_seqlens: Tensor | None = None  # int32 (batch + 1,)
    seqused: Tensor | None = None  # int32 (batch,): rows past these count for nothing

    def finite_amax(self, x: Tensor, granularity: str) -> Tensor:
        """The largest finite |x| of each group of used tokens, in x's dtype; 0 of nothing."""
        magnitude = torch.where(self._counts(x), x.abs(), 0.0)
        if granularity == "tensor":
            return pad(magnitude.flatten(), (0, 1)).amax()
        if granularity == "channel":
            return self._sequence_amax(magnitude)
        tokens = magnitude.amax(dim=-1)  # (..., heads)
        if granularity == "page":
            return tokens.amax(dim=1)[..., None]
        if granularity == "head":
            return self._sequence_amax(tokens)
        return self._block_amax(tokens)

    def finite_mean(self, x: Tensor) -> Tensor:
        """The mean of the finite values of the used tokens, (batch, heads, d); 0 of nothing."""
        counts = self._counts(x)
        values, ones = torch.where(counts, x, 0.0), counts.to(x.dtype)
        if self.cu_seqlens is None:
            total, number = values.sum(dim=1), ones.sum(dim=1)
        else:
            empty = x.new_zeros((self.cu_seqlens.shape[0] - 1, *x.shape[1:]))
            sequences = self._sequences(x)
            total = empty.index_add(0, sequences, values)
            number = empty.index_add(0, sequences, ones)
        return total / number.clamp_min(1.0)

    def spread_descale(self, descale: Tensor, x: Tensor, granularity: str = "") -> Tensor:
        """A descale of these tokens so that it broadcasts over x; its shape says what it is, but
        for granularity "channel", (heads, d) or (batch, heads, d)."""
        if granularity == "channel":
            return descale if descale.dim() == 2 else self.spread(descale, x)
        if descale.dim() == 0:
            return descale
        if descale.dim() == 2:
            return self.spread(descale, x)[..., None]
        if self.cu_seqlens is not None:
            return descale[0].transpose(0, 1)[self._slots(x)][..., None]
        rows_per_block = x.shape[1] if descale.shape[2] == 1 else BLOCK
        rows = descale.repeat_interleave(rows_per_block, dim=2)[:, :, : x.shape[1]]
        return rows.transpose(1, 2)[..., None]

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """(batch, ...) of every sequence so that it broadcasts over x's tokens."""
        return values[:, None] if self.cu_seqlens is None else values[self._sequences(x)]

    def used(self, x: Tensor) -> Tensor | None:
        """bool (batch, seqlen) or (total,): which tokens belong to a sequence; None if all do."""
        if self.cu_seqlens is None:
            if self.seqused is None:
                return None
            return torch.arange(x.shape[1], device=x.device) < self.seqused.long()[:, None]
        token = torch.arange(x.shape[0], device=x.device)
        if self.seqused is None:
            return token < self.cu_seqlens[-1]
        ends = self.cu_seqlens[:-1].long() + self.seqused.long()
        return token < ends[self._sequences(x)]

    def _counts(self, x: Tensor) -> Tensor:
        """Which elements are finite and of used tokens."""
        finite, used = torch.isfinite(x), self.used(x)
        return finite if used is None else finite & used[..., None, None]

    def _sequences(self, x: Tensor) -> Tensor:
        assert self.cu_seqlens is not None
        return token_sequences(x, self.cu_seqlens.shape[0] - 1, self.cu_seqlens)

    def places(self, x: Tensor) -> Tensor:
        """The place of every packed token where sequences start with a block. On a CUDA device,
        where offsets are not checked, wrong ones give places that exist."""
        assert self.cu_seqlens is not None
        sequences = self._sequences(x)
        token = torch.arange(x.shape[0], device=x.device)
        within = token - self.cu_seqlens[:-1].long()[sequences]
        places = block_offsets(self.cu_seqlens)[sequences] * BLOCK + within
        return places.clamp(0, self._blocks(x) * BLOCK - 1)

    def _slots(self, x: Tensor) -> Tensor:
        """The block of every packed token."""
        return self.places(x) // BLOCK

    def _blocks(self, x: Tensor) -> int:
        assert self.cu_seqlens is not None
        return num_packed_blocks(x.shape[0], self.cu_seqlens.shape[0] - 1)

    def _sequence_amax(self, tokens: Tensor) -> Tensor:
        """(batch, ...) of non-negative (batch, seqlen, ...) or (total, ...); 0 of nothing."""
        if self.cu_seqlens is None:
            largest: Tensor = pad(tokens.movedim(1, -1), (0, 1)).amax(dim=-1)
            return largest
        return _grouped_amax(tokens, self._sequences(tokens), self.cu_seqlens.shape[0] - 1)

    def _block_amax(self, tokens: Tensor) -> Tensor:
        if self.cu_seqlens is None:
            blocks = num_blocks(tokens.shape[1])
            padded = pad(tokens, (0, 0, 0, blocks * BLOCK - tokens.shape[1]))
            tops: Tensor = padded.unflatten(1, (blocks, BLOCK)).amax(dim=2)
            return tops.transpose(1, 2)
        groups = num_packed_blocks(tokens.shape[0], self.cu_seqlens.shape[0] - 1)
        return _grouped_amax(tokens, self._slots(tokens), groups).transpose(0, 1)[None]


def _grouped_amax(tokens: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, ...): the largest of (total, ...) non-negative values by group, 0 of none."""
    flat = tokens.flatten(1)
    start = flat.new_zeros((groups, flat.shape[1]))
    largest = start.scatter_reduce(0, group[:, None].expand_as(flat), flat, "amax")
    result: Tensor = largest.unflatten(1, tokens.shape[1:])
    return result

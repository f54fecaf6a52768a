"""FP8: scales that all ranks agree on, and which of them a call of a plan needs.

K and V, and under "ulysses" q, are quantized once, by the rank that has them, with the scales that
one process with all tokens would find: the ranks take the largest amax of each sequence, head or
128 tokens, and the mean over all tokens where a recipe smooths. That is one all-reduce of a few
numbers per sequence or block; delayed scaling knows its scales and sends none. What travels then
is e4m3. The queries that a rank keeps to itself have scales of its own, by piece.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flash8.call.options import Options
from flash8.distributed.layout import Batch, kept
from flash8.distributed.plan import Call, cumulative
from flash8.fp8.quantize import descale_of, quantize
from flash8.fp8.recipes import Recipe
from flash8.tensors.descales import BLOCK, block_offsets, num_packed_blocks
from flash8.tensors.hadamard import rotation_for
from flash8.tensors.scaled_tensor import ScaledTensor
from flash8.tensors.tokens import Tokens

Groups = tuple[dist.ProcessGroup, ...]


class Shared(NamedTuple):
    """A rank's tokens in e4m3, and the scales of whole sequences."""

    data: Tensor
    descale: Tensor  # (), (batch, heads), or (1, heads, blocks) as in `flash8.tensors.descales`
    mean: Tensor | None  # (batch, heads, d), rotated as data is


class _Runs(NamedTuple):
    """Own tokens in runs that share a scale."""

    cu_seqlens: Tensor
    sequences: Tensor  # int64 (runs,)
    scales: Tensor  # int64 (runs,): which scale each has
    number: int  # of scales


@kept(maxsize=32)
def pieces(batch: Batch, ranks: int, rank: int, device: torch.device) -> Tensor:
    """cu_seqlens of a rank's spans."""
    return cumulative([x.end - x.begin for x in batch.spans(ranks, rank)], device)


@kept(maxsize=32)
def _runs(batch: Batch, ranks: int, rank: int, by_block: bool, device: torch.device) -> _Runs:
    lengths, sequences, scales = [], [], []
    first = _first_blocks(batch)
    for span in batch.spans(ranks, rank):
        begin = span.begin
        while begin < span.end:
            end = min(span.end, begin - begin % BLOCK + BLOCK) if by_block else span.end
            lengths.append(end - begin)
            sequences.append(span.sequence)
            scales.append(first[span.sequence] + begin // BLOCK if by_block else span.sequence)
            begin = end
    return _Runs(
        cumulative(lengths, device),
        torch.tensor(sequences, dtype=torch.int64).to(device),
        torch.tensor(scales, dtype=torch.int64).to(device),
        first[-1] if by_block else len(batch.lengths),
    )


def _first_blocks(batch: Batch) -> list[int]:
    """The first block of each packed sequence, and the number of blocks."""
    return [offset // BLOCK + i for i, offset in enumerate(batch.offsets())]


def agree(
    recipe: Recipe, name: str, x: Tensor, batch: Batch, ranks: int, rank: int, groups: Groups
) -> Shared:
    """q, k or v (`name`) of a rank's tokens by a recipe. All ranks of all groups have to call."""
    granularity, descale, amax = recipe.scaling(name)
    runs = _runs(batch, ranks, rank, granularity == "block", x.device)
    rotation = rotation_for(recipe.hadamard, x.shape[-1]) if name in ("q", "k") else None
    smooths = (name == "k" and recipe.smooth_k) or (name == "v" and recipe.smooth_v)
    mean = _mean(x, runs, len(batch.lengths), groups) if smooths else None
    if descale is None:
        y = x if mean is None else x - Tokens(runs.cu_seqlens).spread(mean[runs.sequences], x)
        y = (
            y
            if rotation is None
            else rotation.apply(y.to(torch.promote_types(y.dtype, torch.float)))
        )
        own = Tokens(runs.cu_seqlens).finite_amax(y, "head").float()
        of_scales = own.new_zeros((runs.number, x.shape[1]))
        of_scales.scatter_reduce_(0, runs.scales[:, None].expand_as(own), own, "amax")
        if granularity == "tensor":
            of_scales = torch.nn.functional.pad(of_scales.flatten(), (0, 1)).amax()
        for group in groups:
            dist.all_reduce(of_scales, op=dist.ReduceOp.MAX, group=group)
        descale = descale_of(of_scales)
    smooth = False if mean is None else mean[runs.sequences]
    quantized = quantize(
        x,
        "tensor" if descale.dim() == 0 else "head",
        hadamard=rotation,
        smooth_k=smooth if name == "k" else False,
        smooth_v=smooth if name == "v" else False,
        cu_seqlens=runs.cu_seqlens,
        descale=descale if descale.dim() == 0 else descale[runs.scales],
        amax=amax,
    )
    if granularity == "block":
        descale = descale.transpose(0, 1)[None].contiguous()
    if mean is not None and rotation is not None:
        mean = rotation.apply(mean)
    return Shared(quantized.data, descale, mean)


def _mean(x: Tensor, runs: _Runs, batch: int, groups: Groups) -> Tensor:
    """Over the finite values of all tokens of each sequence and head, fp32 (batch, heads, d)."""
    finite = torch.isfinite(x)
    token = Tokens(runs.cu_seqlens).spread(runs.sequences, x)
    values = torch.stack((torch.where(finite, x, 0.0).float(), finite.float()))
    sums = values.new_zeros((2, batch, *x.shape[1:])).index_add_(1, token, values)
    for group in groups:
        dist.all_reduce(sums, group=group)
    mean: Tensor = sums[0] / sums[1].clamp_min(1.0)
    return mean


def of_call(
    options: Options,
    call: Call,
    q: ScaledTensor,
    k: Shared,
    v: Shared,
    q_pieces: Tensor,
    batch: Batch,
) -> Options:
    """The options with the scales of a call: those of its queries by piece, of its keys by
    sequence."""
    first_q = block_offsets(q_pieces)[call.q_spans]
    first_k = _first_blocks_of(batch, q_pieces.device)[call.sequences] + call.k_begins // BLOCK
    of_q = (call.q_spans, first_q, call.cu_seqlens_q, len(q.data))
    of_k = (call.sequences, first_k, call.cu_seqlens_k, len(call.k_rows))
    return options._replace(
        q_descale=_taken(q.descale, *of_q),
        k_descale=_taken(k.descale, *of_k),
        v_descale=_taken(v.descale, *of_k),
        k_mean=None if k.mean is None else k.mean[call.sequences],
        v_mean=None if v.mean is None else v.mean[call.sequences],
    )


def _taken(
    descale: Tensor, entries: Tensor, first: Tensor, cu_seqlens: Tensor, rows: int
) -> Tensor:
    """A descale by entry. first: the block of `descale` that each entry begins with."""
    if descale.dim() == 0:
        return descale
    if descale.dim() == 2:
        return descale[entries]
    slots = torch.arange(num_packed_blocks(rows, len(entries)), device=entries.device)
    starts = block_offsets(cu_seqlens)
    entry = torch.searchsorted(starts, slots, right=True) - 1
    # Slots past the last block of an entry are nobody's.
    blocks = (first[entry] + slots - starts[entry]).clamp_max(descale.shape[-1] - 1)
    return descale[:, :, blocks]


@kept(maxsize=32)
def _first_blocks_of(batch: Batch, device: torch.device) -> Tensor:
    return torch.tensor(_first_blocks(batch)).to(device)

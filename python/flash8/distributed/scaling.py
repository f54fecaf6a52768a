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
from flash8.fp8.recipes import Recipe, Scaling
from flash8.tensors.descales import BLOCK, block_offsets, num_packed_blocks
from flash8.tensors.hadamard import Rotation, rotation_for
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
    """q, k or v (`name`) of a rank's tokens, with scales of whole sequences. All ranks of all
    groups have to call."""
    granularity, descale, amax = recipe.scaling(name)
    runs = _runs(batch, ranks, rank, granularity == "block", x.device)
    rotation = _rotation(recipe, name, x)
    mean = _smoothed(recipe, name, x, batch, ranks, rank, groups)
    own_mean = None if mean is None else mean[runs.sequences]
    if descale is None:
        y = x.double() if x.dtype == torch.float64 else x.float()
        y = y if own_mean is None else y - Tokens(runs.cu_seqlens).spread(own_mean, y)
        y = y if rotation is None else rotation.apply(y)
        own = Tokens(runs.cu_seqlens).finite_amax(y, "head").float()
        of_scales = own.new_zeros((runs.number, x.shape[1]))
        of_scales.scatter_reduce_(0, runs.scales[:, None].expand_as(own), own, "amax")
        if granularity == "tensor":
            of_scales = torch.nn.functional.pad(of_scales.flatten(), (0, 1)).amax()
        for group in groups:
            dist.all_reduce(of_scales, op=dist.ReduceOp.MAX, group=group)
        descale = descale_of(of_scales)
    shared = descale.dim() == 0
    scaling = Scaling(
        "tensor" if shared else "head", descale if shared else descale[runs.scales], amax
    )
    data = _quantized(recipe, name, x, scaling, runs.cu_seqlens, own_mean).data
    if granularity == "block":
        descale = descale.transpose(0, 1)[None].contiguous()
    if mean is not None and rotation is not None:
        mean = rotation.apply(mean)
    return Shared(data, descale, mean)


def by_span(
    recipe: Recipe, name: str, x: Tensor, batch: Batch, ranks: int, rank: int, groups: Groups
) -> Shared:
    """k or v (`name`) of a rank's tokens, with scales of its own spans: a descale is as that of
    packed sequences which are the spans. Only the mean is that of whole sequences."""
    rotation = _rotation(recipe, name, x)
    mean = _smoothed(recipe, name, x, batch, ranks, rank, groups)
    own_mean = None if mean is None else mean.repeat_interleave(batch.parts, dim=0)
    cu_seqlens = pieces(batch, ranks, rank, x.device)
    found = _quantized(recipe, name, x, recipe.scaling(name), cu_seqlens, own_mean)
    if mean is not None and rotation is not None:
        mean = rotation.apply(mean)
    return Shared(found.data, found.descale, mean)


def _rotation(recipe: Recipe, name: str, x: Tensor) -> Rotation | None:
    return rotation_for(recipe.hadamard, x.shape[-1]) if name in ("q", "k") else None


def _smoothed(
    recipe: Recipe, name: str, x: Tensor, batch: Batch, ranks: int, rank: int, groups: Groups
) -> Tensor | None:
    """The mean that the recipe takes off."""
    smooths = (name == "k" and recipe.smooth_k) or (name == "v" and recipe.smooth_v)
    return mean_of(x, batch, ranks, rank, groups) if smooths else None


def _quantized(
    recipe: Recipe,
    name: str,
    x: Tensor,
    scaling: Scaling,
    cu_seqlens: Tensor,
    mean: Tensor | None,
) -> ScaledTensor:
    smooth = False if mean is None else mean
    return quantize(
        x,
        scaling.granularity,
        hadamard=_rotation(recipe, name, x),
        smooth_k=smooth if name == "k" else False,
        smooth_v=smooth if name == "v" else False,
        cu_seqlens=cu_seqlens,
        descale=scaling.descale,
        amax=scaling.amax,
    )


def mean_of(x: Tensor, batch: Batch, ranks: int, rank: int, groups: Groups) -> Tensor:
    """Over the finite values of all tokens of each sequence and head, fp32 (batch, heads, d)."""
    runs = _runs(batch, ranks, rank, False, x.device)
    finite = torch.isfinite(x)
    token = Tokens(runs.cu_seqlens).spread(runs.sequences, x)
    values = torch.stack((torch.where(finite, x, 0.0).float(), finite.float()))
    sums = values.new_zeros((2, len(batch.lengths), *x.shape[1:])).index_add_(1, token, values)
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
    firsts: tuple[Tensor, Tensor],
    parts: int = 1,
) -> Options:
    """The options with the scales of a call: those of its queries by span, of its keys by run.

    firsts: the first block of every span and of every run. parts: runs of a sequence, which has one
    mean.
    """
    first_q = firsts[0][call.q_spans] + call.q_offsets // BLOCK
    first_k = firsts[1][call.k_runs] + call.k_offsets // BLOCK
    q_count = len(q.data) if call.q_rows is None else len(call.q_rows)
    of_q = (call.q_spans, first_q, call.cu_seqlens_q, q_count)
    of_k = (call.k_runs, first_k, call.cu_seqlens_k, len(call.k_rows))
    sequences = call.k_runs // parts
    return options._replace(
        q_descale=_taken(q.descale, *of_q),
        k_descale=_taken(k.descale, *of_k),
        v_descale=_taken(v.descale, *of_k),
        k_mean=None if k.mean is None else k.mean[sequences],
        v_mean=None if v.mean is None else v.mean[sequences],
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
def first_blocks(batch: Batch, device: torch.device) -> Tensor:
    """Of every sequence, int64."""
    return torch.tensor(_first_blocks(batch)[:-1], dtype=torch.int64).to(device)

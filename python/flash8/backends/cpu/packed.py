"""Packed batches that torch's compiled attention serves sequence by sequence, with little around.

A short sequence takes some 20 microseconds, less than it takes to look at it. So the sequences are
views that one split makes, their results are put together by one copy, and whether these are
numbers is asked once of all. Where it is not as expected, nothing counts and the units are
worked on as `forward` and `backward` do it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash8.backends.cpu import compiled
from flash8.backends.cpu.mask import Mask
from flash8.backends.cpu.sequences import is_plain_pack
from flash8.call.options import Options


class Run(NamedTuple):
    """Sequences that follow each other in q and in k alike, and fill both."""

    lengths: list[int]
    causal: bool
    dtype: torch.dtype  # of the products
    scale: float


def run_of(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, s_aux: Tensor | None, options: Options
) -> Run | None:
    """How they are served; None if they are not such a batch, or one group of equal lengths.

    Of wrong lengths nothing is said here.
    """
    if s_aux is not None or options.cu_seqlens_q is None or q.numel() == 0:
        return None
    if q.shape[-1] != v.shape[-1] or not compiled.can_do(q, k, v, qv, options):
        return None
    lengths = _lengths(q, k, options)
    if lengths is None or min(lengths) < compiled.LEAST_KEYS or len(set(lengths)) == 1:
        return None
    longest = max(lengths)
    mask = Mask(longest, longest, options)
    if not (mask.is_full or mask.is_causal):
        return None
    dtype = q.dtype if compiled.has_products(q.dtype) else torch.float32
    return Run(lengths, not mask.is_full, dtype, options.scale(q))


def forward_run(run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> bool:
    """Fills out and lse. False: what they hold does not count."""
    forward = compiled.required_ops().forward
    parts = (_split(x, run, run.dtype) for x in (q, k, v))
    made = [forward(*part, 0.0, run.causal, scale=run.scale) for part in zip(*parts, strict=True)]
    torch.cat([row[0] for _, row in made], dim=1, out=lse)
    if not compiled.is_told(lse):
        return False
    _join([o for o, _ in made], out)
    return not run.causal or compiled.is_finite(out)


def backward_run(
    run: Run,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: Sequence[Tensor],
) -> bool:
    """Fills the gradients of q, k and v. False: what they hold does not count."""
    if not compiled.tells_weights(lse):
        return False
    backward = compiled.required_ops().backward
    parts = (_split(x, run, torch.float32) for x in (dout, q, k, v, out))
    rows = (row[None] for row in lse.split(run.lengths, dim=1))
    made = [
        backward(*part, row, 0.0, run.causal, scale=run.scale)
        for *part, row in zip(*parts, rows, strict=True)
    ]
    for gradient, sequences in zip(gradients, zip(*made, strict=True), strict=True):
        _join(sequences, gradient)
    return not run.causal or all(compiled.is_finite(x) for x in gradients)


def _lengths(q: Tensor, k: Tensor, options: Options) -> list[int] | None:
    """Those of the sequences; None unless q and k have the same, which are all of their rows."""
    cu_seqlens_q, cu_seqlens_k = options.cu_seqlens_q, options.cu_seqlens_k
    if cu_seqlens_q is None or cu_seqlens_k is None or not is_plain_pack(options):
        return None
    offsets: list[int] = cu_seqlens_q.tolist()
    if cu_seqlens_k is not cu_seqlens_q and cu_seqlens_k.tolist() != offsets:
        return None
    lengths = [end - begin for begin, end in zip(offsets, offsets[1:], strict=False)]
    fills = offsets[0] == 0 and offsets[-1] == q.shape[0] == k.shape[0]
    longest = (options.max_seqlen_q, options.max_seqlen_k)
    fits = all(most is None or max(lengths, default=0) <= most for most in longest)
    return lengths if lengths and fills and fits else None


def _split(x: Tensor, run: Run, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(1, heads, seqlen, d) for each sequence of (total, heads, d)."""
    heads_first = compiled.operand(x.unsqueeze(0), dtype, x.shape[-1])
    return torch.split(heads_first, run.lengths, dim=2)


def _join(sequences: Sequence[Tensor], into: Tensor) -> None:
    """The inverse of `_split`."""
    torch.cat([x[0].transpose(0, 1) for x in sequences], out=into)

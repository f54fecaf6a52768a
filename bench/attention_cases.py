"""What the attention benchmark measures: shapes, their cost, their inputs, and the truth."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

_HIDDEN = 2048
_TOKENS = 16384
_MAX_CHECKED = 2048  # the reference materialises scores: longer cases are checked at this length
#: Lengths of packed documents: log-normal, as text is (a few long ones hold most of the tokens).
_MEDIAN_LENGTH, _SIGMA, _SHORTEST, _LONGEST = 700, 1.1, 16, 8192


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    kind: "dense" (batch, seqlen, heads, head_dim); "packed": sequences of `lengths` back to back;
    "decode": one query per sequence over a cache of seqlen_k tokens.
    """

    suite: str
    kind: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    head_dim: int
    causal: bool
    lengths: tuple[int, ...] = ()

    @property
    def pairs(self) -> int:
        """Queries times keys, before any mask."""
        if self.kind == "packed":
            return sum(length * length for length in self.lengths)
        return self.batch * self.seqlen_q * self.seqlen_k

    @property
    def rows(self) -> tuple[int, int]:
        """Queries and keys of the whole batch."""
        if self.kind == "packed":
            return sum(self.lengths), sum(self.lengths)
        return self.batch * self.seqlen_q, self.batch * self.seqlen_k

    def flops(self, *, backward: bool) -> float:
        """Matrix FLOPs: 4 * heads * pairs * d, half if causal; 3.5 times that with the backward."""
        forward = 4.0 * self.heads * self.pairs * self.head_dim
        forward *= 0.5 if self.causal and self.kind != "decode" else 1.0
        return forward * (3.5 if backward else 1.0)

    def least_bytes(self, element_size: int) -> int:
        """What a forward has to move: q, k and v once, O once, LSE in fp32."""
        queries, keys = self.rows
        tensors = 2 * queries * self.heads + 2 * keys * self.heads_kv
        return tensors * self.head_dim * element_size + 4 * queries * self.heads

    def score_bytes(self, element_size: int) -> int:
        """What the matrix of scores of unfused attention takes."""
        return self.heads * self.pairs * element_size

    def checked(self) -> "Case":
        """The same kind of case, small enough for the reference."""
        lengths = tuple(min(length, _MAX_CHECKED) for length in self.lengths[:3])
        return replace(
            self,
            batch=len(lengths) if lengths else min(self.batch, 2),
            seqlen_q=min(self.seqlen_q, _MAX_CHECKED),
            seqlen_k=min(self.seqlen_k, _MAX_CHECKED),
            lengths=lengths,
        )


def shows_order(case: Case) -> bool:
    """Many blocks of keys add to one of dQ; under a causal mask they take different times."""
    return case.causal and max(case.seqlen_k, *case.lengths, 0) >= 4096


@dataclass(frozen=True)
class Call:
    """The inputs of a case: (batch, seqlen, heads, head_dim) or packed (total, heads, head_dim)."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def causal(self) -> bool:
        return self.case.causal

    @property
    def max_seqlen(self) -> int:
        return max(self.case.lengths)

    @property
    def document(self) -> Tensor:
        """The sequence of every packed token."""
        assert self.cu_seqlens is not None
        lengths = self.cu_seqlens.diff().long()
        return torch.arange(lengths.shape[0], device=lengths.device).repeat_interleave(lengths)


def gpu_cases() -> list[Case]:
    """The FlashAttention-3 paper's, Llama-3's, packed documents, decoding; in BF16.

    What tells most is first, for runs that end early: head_dim 128, and long sequences.
    """
    paper = [
        dense("FA3 paper", max(1, _TOKENS // seqlen), seqlen, _HIDDEN // d, _HIDDEN // d, d, causal)
        for seqlen in (8192, 16384, 4096, 1024, 2048, 512)
        for d in (128, 64, 256)
        for causal in (True, False)
    ]
    llama = [dense("Llama-3", 1, 8192, heads, 8, 128, True) for heads in (32, 64)]
    packing = [
        packed("packed", lengths, 32, 8, 128)
        for lengths in (document_lengths(4 * _TOKENS), (2048,) * (_TOKENS // 2048))
    ]
    packing.append(dense("packed", _TOKENS // 2048, 2048, 32, 8, 128, True))  # equal FLOPs
    decoding = [
        decode("decode", batch, seqlen, heads, 8, 128)
        for heads in (32, 64)
        for batch, seqlen in ((1, 8192), (1, 131072), (16, 8192), (128, 4096))
    ]
    return paper + llama + packing + decoding


def cpu_cases() -> list[Case]:
    """Small ones, in float32."""
    return [
        dense("CPU", 8, 256, 8, 8, 64, True),
        dense("CPU", 1, 1024, 8, 8, 64, True),
        dense("CPU", 1, 1024, 8, 2, 64, True),
        dense("CPU", 1, 4096, 4, 4, 64, True),
        dense("CPU", 1, 4096, 4, 4, 64, False),
        packed("CPU", document_lengths(2048, longest=1024), 8, 2, 64),
        decode("CPU", 4, 2048, 8, 2, 64),
    ]


def dense(
    suite: str, batch: int, seqlen: int, heads: int, heads_kv: int, head_dim: int, causal: bool
) -> Case:
    return Case(suite, "dense", batch, seqlen, seqlen, heads, heads_kv, head_dim, causal)


def packed(suite: str, lengths: tuple[int, ...], heads: int, heads_kv: int, head_dim: int) -> Case:
    longest = max(lengths)
    batch = len(lengths)
    return Case(suite, "packed", batch, longest, longest, heads, heads_kv, head_dim, True, lengths)


def decode(suite: str, batch: int, seqlen_k: int, heads: int, heads_kv: int, head_dim: int) -> Case:
    return Case(suite, "decode", batch, 1, seqlen_k, heads, heads_kv, head_dim, True)


def document_lengths(total: int, *, longest: int = _LONGEST, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths that add up to `total`; the last one is cut to fit."""
    drawn = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        length = round(_MEDIAN_LENGTH * drawn.lognormvariate(0.0, _SIGMA))
        lengths.append(min(max(length, _SHORTEST), longest, left))
    return tuple(lengths)


def inputs(case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Call:
    """Random normal q, k and v that require grad."""
    generator = torch.Generator(device=device).manual_seed(seed)
    queries, keys = case.rows
    shapes = (
        (queries, case.seqlen_q, case.heads),
        (keys, case.seqlen_k, case.heads_kv),
        (keys, case.seqlen_k, case.heads_kv),
    )
    drawn = []
    for rows, seqlen, heads in shapes:
        x = torch.randn(
            (rows, heads, case.head_dim), generator=generator, device=device, dtype=dtype
        )
        drawn.append(x if case.kind == "packed" else x.unflatten(0, (case.batch, seqlen)))
    q, k, v = (x.requires_grad_() for x in drawn)
    if case.kind != "packed":
        return Call(case, q, k, v)
    ends = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32, device=device)
    return Call(case, q, k, v, ends)


@torch.no_grad()
def reference(call: Call) -> Tensor:
    """O in float32 from materialised scores, in q's layout."""
    parts = _by_sequence(call, call.q, call.k, call.v)
    return _joined(call, [_sequence(*x, call.causal) for x in parts])


def reference_gradients(call: Call, dout: Tensor) -> tuple[Tensor, ...]:
    """Those of q, k and v in float32, from materialised scores of one sequence at a time."""
    found = []
    for q, k, v, d in _by_sequence(call, call.q, call.k, call.v, dout):
        leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
        out = _sequence(*leaves, call.causal)
        found.append(torch.autograd.grad(out, leaves, d.float()))
    return tuple(_joined(call, parts) for parts in zip(*found, strict=True))


def _by_sequence(call: Call, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    packed = call.cu_seqlens is not None
    return zip(*(x.split(call.case.lengths) if packed else x for x in tensors), strict=True)


def _joined(call: Call, parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)) if call.cu_seqlens is None else torch.cat(list(parts))


def _sequence(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(seqlen, heads, head_dim) each."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~seen.tril(seqlen_k - seqlen_q), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)

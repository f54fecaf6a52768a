"""Sequence parallel attention as in DeepSpeed-Ulysses (arXiv 2309.14509), with flash8 inside.

    python examples/distributed/ulysses.py

Each of two CPU processes holds half of every sequence. An all-to-all turns (half of the sequence,
all heads) into (all of the sequence, half of the heads), flash8 attends, and a second all-to-all
turns the output back. Keys and values keep their own, smaller number of heads.
`deepspeed_ulysses.py` is the same with DeepSpeed's `DistributedAttention`.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from flash8 import flash_attn_func
from processes import report, run

BATCH, SEQLEN, HEADS, HEADS_KV, HEAD_DIM = 2, 96, 8, 2, 32


class _AllToAll(torch.autograd.Function):
    """Chunk i of dimension 0 goes to rank i; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return _AllToAll.apply(grad)


def heads_to_sequence(x: Tensor) -> Tensor:
    """(batch, seqlen / P, heads, d) to (batch, seqlen, heads / P, d)."""
    batch, seqlen, heads, head_dim = x.shape
    ranks = dist.get_world_size()
    x = x.view(batch, seqlen, ranks, heads // ranks, head_dim).permute(2, 0, 1, 3, 4)
    return _AllToAll.apply(x).permute(1, 0, 2, 3, 4).flatten(1, 2)


def sequence_to_heads(x: Tensor) -> Tensor:
    """(batch, seqlen, heads / P, d) to (batch, seqlen / P, heads, d)."""
    batch, seqlen, heads, head_dim = x.shape
    ranks = dist.get_world_size()
    x = x.view(batch, ranks, seqlen // ranks, heads, head_dim).transpose(0, 1)
    return _AllToAll.apply(x).permute(1, 2, 0, 3, 4).flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of sequences that are spread over the ranks in equal pieces."""
    q, k, v = (heads_to_sequence(x) for x in (q, k, v))
    return sequence_to_heads(flash_attn_func(q, k, v, causal=True))


def main() -> None:
    torch.manual_seed(0)  # the same tensors everywhere; each rank takes its piece
    whole = [
        torch.randn(BATCH, SEQLEN, heads, HEAD_DIM, requires_grad=True)
        for heads in (HEADS, HEADS_KV, HEADS_KV)
    ]
    grad = torch.randn(BATCH, SEQLEN, HEADS, HEAD_DIM)
    reference = flash_attn_func(*whole, causal=True)
    expected = (reference, *torch.autograd.grad(reference, whole, grad))

    def piece(x: Tensor) -> Tensor:
        return x.detach().chunk(dist.get_world_size(), dim=1)[dist.get_rank()]

    local = [piece(x).requires_grad_() for x in whole]
    out = attend(*local)
    results = (out, *torch.autograd.grad(out, local, piece(grad)))
    difference = max(
        (result - piece(x)).abs().max().item() for result, x in zip(results, expected, strict=True)
    )
    report(f"out and gradients, largest difference from one process: {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    run(main)

"""DeepSpeed's Ulysses (arXiv 2309.14509) with flash8 as its local attention.

    pip install deepspeed
    python examples/distributed/deepspeed_ulysses.py

`deepspeed.sequence.layer.DistributedAttention` turns (half of the sequence, all heads) into (all of
the sequence, half of the heads) and back, in two CPU processes over gloo. What it calls in between
is `flash8.flash_attn_func`, with the arguments that follow q, k and v. `ulysses.py` is the same
without DeepSpeed.
"""

import os
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from flash8 import flash_attn_func
from processes import report, run

BATCH, SEQLEN, HEADS, HEADS_KV, HEAD_DIM = 2, 96, 8, 2, 32
BATCH_DIM, SEQUENCE_DIM, HEADS_DIM = 0, 1, 2


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)  # the same tensors everywhere; each rank takes its piece
    whole = [
        torch.randn(BATCH, SEQLEN, heads, HEAD_DIM, requires_grad=True)
        for heads in (HEADS, HEADS_KV, HEADS_KV)
    ]
    grad = torch.randn(BATCH, SEQLEN, HEADS, HEAD_DIM)
    options = dict(causal=True, window_size=(40, 0))
    reference = flash_attn_func(*whole, **options)
    expected = (reference, *torch.autograd.grad(reference, whole, grad))

    def piece(x: Tensor) -> Tensor:
        return x.detach().chunk(dist.get_world_size(), dim=SEQUENCE_DIM)[dist.get_rank()]

    attention = DistributedAttention(
        partial(flash_attn_func, **options), dist.group.WORLD, HEADS_DIM, SEQUENCE_DIM
    )
    local = [piece(x).contiguous().requires_grad_() for x in whole]
    out = attention(*local, BATCH_DIM)
    results = (out, *torch.autograd.grad(out, local, piece(grad)))
    difference = max(
        (result - piece(x)).abs().max().item() for result, x in zip(results, expected, strict=True)
    )
    report(f"out and gradients, largest difference from one process: {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    run(main)

"""Trains a small transformer under FSDP2 (`fully_shard`) with flash8 attention on packed batches.

    python examples/distributed/fsdp2.py

Two CPU processes over gloo. Each holds half of every parameter and sees its own sequences; the
losses are those of one process that sees all of them.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flash8.nn import FlashMHA
from flash8.varlen import PackedBatch, pack
from processes import run

VOCABULARY, WIDTH, HEADS, LAYERS, STEPS = 16, 64, 4, 2, 8
LENGTHS = ((17, 40, 5), (30, 31, 1))  # of the sequences of each rank; equal totals


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attention = FlashMHA(
            WIDTH, HEADS, num_heads_kv=HEADS // 2, causal=True, rotary_dim=16, bias=False
        )
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        x = x + self.attention(self.norms[0](x), cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, batch: PackedBatch) -> Tensor:
        x = self.embedding(batch.values)
        for block in self.blocks:
            x = block(x, batch.cu_seqlens, batch.max_seqlen)
        return self.head(x)


def targets(batch: PackedBatch) -> Tensor:
    """Every token is to name the first token of its sequence: what only attention can tell."""
    lengths = batch.cu_seqlens.diff()
    return batch.values[batch.cu_seqlens[:-1]].repeat_interleave(lengths)


def batch_of(rank: int) -> PackedBatch:
    """The packed sequences of a rank, the same in every run."""
    generator = torch.Generator().manual_seed(rank)
    return pack([torch.randint(VOCABULARY, (n,), generator=generator) for n in LENGTHS[rank]])


def new_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer()


def train(model: nn.Module, batches: list[PackedBatch]) -> list[float]:
    """The loss of each step; every step sees all the batches, which are of equal size."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = torch.stack([F.cross_entropy(model(b), targets(b)) for b in batches]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    model = new_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = torch.tensor(train(model, [batch_of(dist.get_rank())]))
    dist.all_reduce(sharded)
    sharded /= dist.get_world_size()

    if dist.get_rank() == 0:
        compare_with_one_process(sharded)


def compare_with_one_process(sharded: Tensor) -> None:
    every_batch = [batch_of(rank) for rank in range(dist.get_world_size())]
    single = torch.tensor(train(new_model(), every_batch))
    difference = (sharded - single).abs().max().item()
    print(f"loss {sharded[0]:.4f} -> {sharded[-1]:.4f} under FSDP2, two processes")
    print(f"largest difference from one process: {difference:.1e}")
    assert sharded[-1] < 0.5 * sharded[0]
    assert difference < 1e-3


if __name__ == "__main__":
    run(main)

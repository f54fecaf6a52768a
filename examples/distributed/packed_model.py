"""What ddp.py and fsdp2.py train: a small transformer on packed sequences, and the loop of both."""

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flash8.nn import FlashMHA
from flash8.varlen import PackedBatch, pack
from processes import device

VOCABULARY, WIDTH, HEADS, LAYERS, STEPS = 16, 128, 2, 2, 8
LENGTHS = ((17, 40, 5), (30, 31, 1))  # of the sequences of each batch; equal totals


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
    """The same weights in every process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, values: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        x = self.embedding(values)
        for block in self.blocks:
            x = block(x, cu_seqlens, max_seqlen)
        return self.head(x)


def own_batches() -> list[PackedBatch]:
    """Those of this process. All processes together have the same ones, however many there are."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        pack([torch.randint(VOCABULARY, (n,), generator=generator).to(device()) for n in lengths])
        for lengths in LENGTHS
    ]
    return batches[dist.get_rank() :: dist.get_world_size()]


def loss_of(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Every token is to name the first token of its sequence: what only attention can tell."""
    first = batch.values[batch.cu_seqlens[:-1]]
    targets = first.repeat_interleave(batch.cu_seqlens.diff(), output_size=len(batch.values))
    logits = model(batch.values, batch.cu_seqlens, batch.max_seqlen)
    return F.cross_entropy(logits.float(), targets)


def train(model: nn.Module, precision: AbstractContextManager) -> Tensor:
    """The loss of each step, over all processes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches, losses = own_batches(), []
    for _ in range(STEPS):
        with precision:
            loss = torch.stack([loss_of(model, batch) for batch in batches]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total.cpu() / dist.get_world_size()


def compare(single: Tensor, several: Tensor, label: str) -> None:
    """Losses of one process with those of two: a sum of gradients is rounded in another order."""
    difference = (several - single).abs().max().item()
    print(f"loss {several[0]:.4f} -> {several[-1]:.4f} under {label}, two processes")
    print(f"largest difference from one process: {difference:.1e}")
    assert several[-1] < 0.5 * several[0]
    assert difference < 5e-3

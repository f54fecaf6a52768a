"""Trains a small transformer whose sequences are spread over processes, under FSDP2.

    python examples/distributed/context_parallel.py

Two processes, over NCCL on two GPUs, else over gloo on the CPU. Each has half of every sequence, by
`flash8.distributed.shard`, and half of every parameter. The model knows nothing of that but its
attention, `flash8.distributed.attention`; norms, MLPs and the loss work on tokens. The losses are
those of one process that has all tokens.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flash8 import distributed
from flash8.varlen import PackedBatch, pack, position_ids_from_cu_seqlens
from packed_model import HEADS, LAYERS, LENGTHS, STEPS, VOCABULARY, WIDTH, compare
from processes import device, run

HEADS_KV = HEADS // 2
HEAD_DIM = WIDTH // HEADS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * HEADS_KV) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x: this rank's tokens, (own tokens, WIDTH). cu_seqlens: of the whole sequences."""
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, HEADS_KV, HEADS_KV), dim=1)
        attended = distributed.attention(
            q,
            k,
            v,
            group=dist.group.WORLD,
            cu_seqlens=cu_seqlens,
            method="all_gather",  # or "ring", or "ulysses"
            causal=True,
            s_aux=self.sinks,
        )
        x = x + self.out(attended.flatten(1))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """The same weights in every process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, cu_seqlens)
        return self.head(x)


def whole_batches() -> list[PackedBatch]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(1)
    return [
        pack([torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths])
        for lengths in LENGTHS
    ]


def loss_of(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Every token is to name the first token of its sequence. FSDP2 takes the mean of gradients
    over ranks, so a rank's loss is the sum over its tokens by the mean number of them."""
    values, cu_seqlens, _ = batch
    first = values[cu_seqlens[:-1]]
    targets = first.repeat_interleave(cu_seqlens.diff(), output_size=len(values))
    positions = position_ids_from_cu_seqlens(cu_seqlens, len(values))
    tokens, positions, targets = (
        distributed.shard(x.to(device()), group=dist.group.WORLD, cu_seqlens=cu_seqlens)
        for x in (values, positions, targets)
    )
    logits = model(tokens, positions, cu_seqlens)
    mean_tokens = len(values) / dist.get_world_size()
    return F.cross_entropy(logits.float(), targets, reduction="sum") / mean_tokens


def main() -> Tensor:
    model = Transformer().to(device())
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches, losses = whole_batches(), []
    for _ in range(STEPS):
        loss = torch.stack([loss_of(model, batch) for batch in batches]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return total.cpu() / dist.get_world_size()


if __name__ == "__main__":
    compare(run(main, 1, gpus=True), run(main, 2, gpus=True), "FSDP2+CP")

"""Trains a small transformer under FSDP2 (`fully_shard`) with flash8 attention on packed batches.

    python examples/distributed/fsdp2.py

Two processes, over NCCL on two GPUs, else over gloo on the CPU. Each holds half of every parameter
in fp32 and its own sequences; parameters are gathered in bf16, so attention sees bf16, and
gradients are reduced in fp32. The losses are those of one process that sees all sequences.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from packed_model import Transformer, compare, train
from processes import device, run


def main() -> Tensor:
    model = Transformer().to(device())
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return train(model, nullcontext())


if __name__ == "__main__":
    compare(run(main, 1, gpus=True), run(main, 2, gpus=True), "FSDP2")

"""Trains a small transformer under DistributedDataParallel with flash8 attention on packed batches.

    python examples/distributed/ddp.py

Two processes, over NCCL on two GPUs, else over gloo on the CPU. Each has the whole model in fp32
and its own sequences; autocast makes bf16 of what is multiplied, attention included. The losses
are those of one process that sees all sequences.
"""

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from packed_model import Transformer, compare, train
from processes import device, run


def main() -> Tensor:
    model = DistributedDataParallel(Transformer().to(device()))
    return train(model, torch.autocast(device().type, dtype=torch.bfloat16))


if __name__ == "__main__":
    compare(run(main, 1, gpus=True), run(main, 2, gpus=True), "DDP")

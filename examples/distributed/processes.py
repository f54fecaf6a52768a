"""Runs a function in several processes of this machine, joined in one group."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

Function = Callable[[], Tensor | None]


def run(function: Function, world_size: int = 2, *, gpus: bool = False) -> Tensor | None:
    """Calls `function` in each process; it finds its rank with torch.distributed. With `gpus` over
    NCCL where there are two, else over gloo. Returns what the first process does."""
    backend = "nccl" if gpus and torch.cuda.device_count() >= 2 else "gloo"
    # Forked processes have torch imported already; with CUDA in use they must be spawned.
    method = "fork" if backend == "gloo" else "spawn"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, world_size, backend, folder)
        mp.start_processes(_worker, arguments, world_size, start_method=method)
        return torch.load(Path(folder) / "result")


def _worker(rank: int, function: Function, world_size: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        result = function()
        if rank == 0:
            torch.save(result, Path(folder) / "result")
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """That of this process."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if on_gpu else torch.device("cpu")


def report(text: str) -> None:
    """Prints once."""
    if dist.get_rank() == 0:
        print(text, flush=True)

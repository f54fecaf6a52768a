"""Runs a function in several processes of this machine, joined in one gloo group."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[[], None], world_size: int = 2) -> None:
    """Calls `function` in each process; it finds its rank with torch.distributed."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, world_size, str(Path(folder) / "store"))
        # Forked processes have torch imported already; with CUDA in use they must be spawned.
        mp.start_processes(_worker, arguments, world_size, start_method="fork")


def _worker(rank: int, function: Callable[[], None], world_size: int, store_path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function()
    finally:
        dist.destroy_process_group()


def report(text: str) -> None:
    """Prints once."""
    if dist.get_rank() == 0:
        print(text, flush=True)

"""Forked processes in one gloo group, which run functions until they are told to stop.

Starting them costs more than most tests, so a module of tests starts four once; a test of two
processes runs on a group of the first two of them.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 240
GRID = "2x2"
ROWS, COLUMNS = ((0, 1), (2, 3)), ((0, 2), (1, 3))


class FailedError(AssertionError):
    """A function raised in some process; the text is its traceback."""


class Processes:
    """`run` calls a function in the first n processes, or in a "2x2" grid of four."""

    def __init__(self, size: int = 4) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        self._ends, self._processes = [], []
        for rank in range(size):
            own, other = context.Pipe()
            arguments = (rank, size, f"{self._folder.name}/store", other)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._ends.append(own)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], ranks: int | str, *arguments: Any) -> list[Any]:
        """What function(group, *arguments) returns in each; a grid is a pair of groups."""
        ends = self._ends[: 4 if ranks == GRID else ranks]
        for end in ends:
            end.send((function, ranks, arguments))
        answers = []
        for rank, end in enumerate(ends):
            assert end.poll(2 * SECONDS), f"process {rank} does not answer"
            answers.append(end.recv())
        failures = [text for failed, text in answers if failed]
        if failures:
            raise FailedError("\n".join(failures))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.send(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, end: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(store)), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    groups: dict[int | str, Any] = {
        n: dist.new_group([*range(n)]) for n in {1, 2, size} if n <= size
    }
    if size == 4:
        rows, columns = ([dist.new_group(x) for x in pairs] for pairs in (ROWS, COLUMNS))
        groups[GRID] = rows[rank // 2], columns[rank % 2]
    with suppress(EOFError):
        while (task := end.recv()) is not None:
            function, ranks, arguments = task
            try:
                end.send((False, function(groups[ranks], *arguments)))
            except Exception:
                end.send((True, traceback.format_exc()))

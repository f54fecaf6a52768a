"""What belongs to a stream: its handle, and the counters of the launches on it."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

COUNTERS = 2  # of SchedulerParams::tile_count
MANY_TICKETS = 256  # a CTA has one, and no GPU of this architecture has so many multiprocessors
_PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD


def current_stream(q: Tensor) -> int:
    """The driver's handle of the stream that work on q goes to."""
    return torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0


def get_tile_count(device: torch.device, stream: int, captured: bool = False) -> Tensor:
    """The counters of one launch, of tiles claimed and of CTAs done: zero before it and after it.
    `stream` is the current one, and `captured` says that a graph is being made of it.

    Launches that run at the same time must not share one. Those of one stream never do, so each
    stream has its own for ever. A captured launch may run again on any stream, next to anything:
    it gets counters of its own, in the graph's memory, that the graph sets to zero every time.
    """
    return new_tile_count(device) if captured else _of_stream(device, stream, COUNTERS)


def get_tickets(device: torch.device, stream: int, count: int, captured: bool = False) -> Tensor:
    """Zeros that a decode launch counts in and leaves zero, at least `count`: whose they are is as
    with `get_tile_count`."""
    if captured:
        return _zeros(device, count)
    return _of_stream(device, stream, max(count, MANY_TICKETS))


def decode_workspace(
    device: torch.device, stream: int, captured: bool, partial_bytes: int
) -> tuple[Tensor, Tensor]:
    """As many tickets as any launch takes, and new memory for partial results, which whoever asks
    keeps for the launches of this stream."""
    tickets = get_tickets(device, stream, MANY_TICKETS, captured)
    if captured:
        return tickets, _scratch(device, partial_bytes)
    return tickets, _outside_of_pools(_scratch, device, stream, partial_bytes)


def new_tile_count(device: torch.device) -> Tensor:
    """Counters for one launch at a time."""
    return _zeros(device, COUNTERS)


def _of_stream(device: torch.device, stream: int, count: int) -> Tensor:
    return _kept_zeros(device, stream, _thread_of(stream), count)


def _thread_of(stream: int) -> int:
    """The handle of the per-thread default stream means another stream in every thread."""
    return threading.get_ident() if stream == _PER_THREAD_STREAM else 0


@functools.cache
def _kept_zeros(device: torch.device, stream: int, thread: int, count: int) -> Tensor:
    return _outside_of_pools(_zeros, device, stream, count)


def _outside_of_pools(
    make: Callable[[torch.device, int], Tensor], device: torch.device, stream: int, count: int
) -> Tensor:
    """Made by another thread: memory pools that torch is told to allocate from, like those of
    torch.compile's CUDA graphs, are those of a thread, and must not keep what outlives them."""
    if _thread_of(stream):
        return make(device, count)  # another thread cannot enqueue on this stream
    where = torch.cuda.current_stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(max_workers=1) as another:
        return another.submit(_make_on, where, make, device, count).result()


def _make_on(
    stream: torch.cuda.Stream | None,
    make: Callable[[torch.device, int], Tensor],
    device: torch.device,
    count: int,
) -> Tensor:
    """In that stream's order."""
    with torch.cuda.stream(stream):
        return make(device, count)


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _scratch(device: torch.device, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)

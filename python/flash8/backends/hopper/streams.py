"""What belongs to a stream: its handle, and the counters of the launches on it."""

import functools
import threading

import torch
from torch import Tensor

COUNTERS = 2  # of SchedulerParams::tile_count
_MANY_TICKETS = 256  # a CTA has one, and no GPU of this architecture has so many multiprocessors
_PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD


def current_stream(q: Tensor) -> int:
    """The driver's handle of the stream that work on q goes to."""
    return torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0


def get_tile_count(device: torch.device, stream: int, captured: bool = False) -> Tensor:
    """The counters of one launch, of tiles claimed and of CTAs done: zero before it and after it.

    Launches that run at the same time must not share one. Those of one stream never do, so each
    stream has its own for ever. A captured launch may run again on any stream, next to anything:
    it gets counters of its own, in the graph's memory, that the graph sets to zero every time.
    """
    if captured:
        return new_tile_count(device)
    # The handle of the per-thread default stream means another stream in every thread.
    thread = threading.get_ident() if stream == _PER_THREAD_STREAM else 0
    return _stream_tile_count(device, stream, thread)


@functools.cache
def _stream_tile_count(device: torch.device, stream: int, thread: int) -> Tensor:
    return new_tile_count(device)


def get_tickets(device: torch.device, stream: int, count: int, captured: bool = False) -> Tensor:
    """Zeros that a decode launch counts in and leaves zero, at least `count`: whose they are is as
    with `get_tile_count`."""
    if captured:
        return torch.zeros(count, dtype=torch.int32, device=device)
    thread = threading.get_ident() if stream == _PER_THREAD_STREAM else 0
    return _stream_tickets(device, stream, thread, max(count, _MANY_TICKETS))


@functools.cache
def _stream_tickets(device: torch.device, stream: int, thread: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def new_tile_count(device: torch.device) -> Tensor:
    """Counters for one launch at a time."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)

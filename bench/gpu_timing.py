"""Timing on a GPU: warmed up, L2 flushed, CUDA events, the median and its spread."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

_L2_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `runs` runs."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def time_call(call: Callable[[], object], *, runs: int = 20, warmup: int = 5) -> Timing:
    """Times `call`, each run with a cold L2."""
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(warmup):
        call()
    events = []
    for _ in range(runs):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    quintiles = statistics.quantiles(times, n=5) if runs > 1 else [times[0]] * 4
    return Timing(statistics.median(times), quintiles[0], quintiles[3], runs)

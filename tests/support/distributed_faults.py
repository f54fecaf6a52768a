"""Faults that are planted into flash8.distributed: what is patched, its attribute, and by what."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from flash8.distributed import collectives, decoding, fp8_ring, layout, merge, plan, ring, ulysses


def _swapped(self: layout.Batch, ranks: int, rank: int) -> list[layout.Span]:
    """The late piece before the early one."""
    found = _spans(self, ranks, rank)
    return [span for pair in zip(found[1::2], found[::2], strict=True) for span in pair]


def _unsummed(x: Tensor, group: Any) -> Tensor:
    count = len(x) // group.size()
    return x[group.rank() * count :][:count].contiguous()


def _unmoved(queries: Any, keys: Any, window: Any, align: int) -> Any:
    """Leaves the window as it is, as if the last key were at the last query."""
    found = _cut(queries, keys, window, align)
    return None if found is None else (*found[:2], window)


def _summed_without_maximum(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() + b.exp()).log()


def _with_sink_twice(self: merge.Merged, s_aux: Any, dtype: torch.dtype) -> Any:
    self.out, self.lse = _finish(self, s_aux, self.out.dtype)
    return _finish(self, s_aux, dtype)


def _averaged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return out.mean(dim=0), lse.logsumexp(dim=0)


def _halved(tokens: Tensor, ranks: Any, interleave: int) -> Tensor:
    return (tokens // ranks.size).int()


class _Kept:
    """What comes is taken, and something else handed on."""

    def __init__(self, kept: Tensor, coming: collectives.Passing) -> None:
        self._kept, self._coming = kept, coming

    def wait(self) -> Tensor:
        self._coming.wait()
        return self._kept


def _without_scales(self: fp8_ring._Ring, keys: Any, step: int) -> Any:
    coming = _pass_on(self, keys, step)
    return None if coming is None else (coming[0], _Kept(keys.scales, coming[1]))


_pass_on = fp8_ring._Ring.pass_on
_finish = merge.Merged.finish
_spans, _cut = layout.Batch.spans, plan.cut
FAULTS = {
    "zigzag order swapped": (layout.Batch, "spans", _swapped),
    "dk not summed": (collectives, "scatter_sum", _unsummed),
    "merged without maximum": (torch, "logaddexp", _summed_without_maximum),
    "sink applied twice": (merge.Merged, "finish", _with_sink_twice),
    "dk does not go home": (ring.Ring, "send_home", lambda self, x: x),
    "tokens by rank": (
        ulysses,
        "joined_order",
        lambda batch, *_: torch.arange(sum(batch.lengths)),
    ),
    "amax not agreed on": (dist, "all_reduce", lambda *_, **__: None),
    "parts not merged by LSE": (decoding, "flash_attn_combine", _averaged),
    "keys counted as if contiguous": (decoding, "_own", _halved),
    "scales stay behind": (fp8_ring._Ring, "pass_on", _without_scales),
    "mean left out of dq": (fp8_ring, "row_sums_of_ds", lambda *given: torch.zeros_like(given[-1])),
    "window not moved": (plan, "cut", _unmoved),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plans that were made without the fault, or with it, are forgotten."""
    forget()
    with mock.patch.object(*FAULTS[name]):
        yield
    forget()


def forget() -> None:
    for module in (layout, plan):
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


#: Those which tests of their own look for.
FP8_FAULTS = ("amax not agreed on", "scales stay behind", "mean left out of dq")
DECODE_FAULTS = ("parts not merged by LSE", "keys counted as if contiguous")

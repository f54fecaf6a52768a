"""A decode kernel that appends against the portable code: O and LSE as of the kernel that does not
(`decode`), over caches whose every bit must be the portable append's."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash8.backends.cpu import append as portable
from flash8.backends.hopper.decode_append import NewRows
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.verify import decode
from flash8.backends.hopper.verify.forward import compare
from flash8.call.request import Appended, Queries
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope

#: New rows of the sequences of `decode.problems`, packed or as many of each.
_COUNTS = (2, 0, 1, 1, 3)
_POSITIONS = 1200


class Problem(NamedTuple):
    """What a launch and the portable code are given."""

    given: decode.Problem  # before the append
    new: NewRows
    caches: tuple[Tensor, Tensor]  # afterwards
    done: decode.Problem  # the attention over them


def find_fault(variant: DecodeVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for given, new, caches, done in problems(variant, device):
        o, lse, left = decode.run(variant, given, new)
        fault = compare(o, lse, *decode.expected(done), decode.bounds(variant))
        if fault is None and left != 0:
            fault = f"its tickets are left at {left}"
        for name, have, want in zip("KV", (given.k, given.v), caches, strict=True):
            words = torch.uint8 if have.element_size() == 1 else torch.int16
            differ = int((have.view(words) != want.view(words)).sum())
            if fault is None and differ:
                fault = f"{differ} of {have.numel()} elements of the {name} cache differ"
        if fault is not None:
            return fault
    return None


def problems(variant: DecodeVariant, device: torch.device) -> Iterator[Problem]:
    """Those of the kernel that does not append: packed new rows with neighbours rotated, and in the
    others one of each sequence with halves rotated and norms."""
    for i, problem in enumerate(decode.problems(replace(variant, append=False), device, False)):
        yield _Draw(problem, i).problem()


class _Draw:
    """The last keys of a problem are new."""

    def __init__(self, problem: decode.Problem, number: int) -> None:
        self._problem, self._number = problem, number
        self._generator = torch.Generator("cpu").manual_seed(7 + number)
        counts = _COUNTS if number == 0 else (1, 0, 1, 1, 1)
        self._lengths = problem.options.seqused_k
        self._counts = self._int32(counts)

    def problem(self) -> Problem:
        problem, new = self._problem, self._new()
        rotated, _ = portable.append(new.k, new.v, queries=new.queries)
        assert rotated is not None
        written = self._written()
        before, after = [], []
        real = [rotated.double()]
        for name, x, stands_for in (
            ("k", new.k, problem.real[1]),
            ("v", new.v, problem.real[2]),
        ):
            old = getattr(problem, name)
            before.append(torch.where(written, math.nan, old.float()).to(old.dtype))
            after.append(torch.where(written, x.cache.float(), old.float()).to(old.dtype))
            real.append(torch.where(written, self._real(name, x.cache), stands_for))
        longer = problem.options._replace(kv_batch_idx=new.k.kv_batch_idx)
        options = longer._replace(seqused_k=new.k.starts)
        given = problem._replace(k=before[0], v=before[1], options=options)
        new = NewRows(new.k._replace(cache=before[0]), new.v._replace(cache=before[1]), new.queries)
        done = problem._replace(q=rotated, real=(real[0], real[1], real[2]), options=longer)
        return Problem(given, new, (after[0], after[1]), done)

    def _new(self) -> NewRows:
        options = self._problem.options
        packed, batch = self._number == 0, len(_COUNTS)
        assert self._lengths is not None
        starts = self._lengths - self._counts
        where: dict[str, Any] = {"page_table": options.page_table}
        shape: tuple[int, ...] = (batch, 1)
        if packed:
            ends = self._counts.cumsum(0).tolist()
            where["cu_seqlens"] = self._int32((0, *ends))
            shape = (ends[-1],)
        else:  # the sequence without keys has no row of the cache
            rows = [-1 if count == 0 else b for b, count in enumerate(self._counts.tolist())]
            where["kv_batch_idx"] = self._int32(rows)
        problem, q = self._problem, self._problem.q
        width = q.shape[-1] // 32 * 16
        angles = 3.0 * self._normal(_POSITIONS, width // 2)
        rope = Rope(angles.cos(), angles.sin(), starts, packed)
        norms = [Norm(1.0 + 0.2 * self._normal(q.shape[-1]), 0.01) for _ in "qk"]
        norm_q, norm_k = (None, None) if packed else norms
        advances = options.causal or options.is_local
        parts = [
            Appended(
                cache.clone(),
                self._normal(*shape, *cache.shape[2:]).to(q.dtype),
                starts,
                descale=getattr(options, f"{name}_descale"),
                mean=getattr(options, f"{name}_mean"),
                rope=rope if name == "k" else None,
                norm=norm_k if name == "k" else None,
                **where,
            )
            for name, cache in (("k", problem.k), ("v", problem.v))
        ]
        return NewRows(parts[0], parts[1], Queries(q, rope, None, advances, norm_q))

    def _written(self) -> Tensor:
        """bool (pages, rows, 1, 1): the places of new keys."""
        options, k = self._problem.options, self._problem.k
        assert self._lengths is not None
        table = None if options.page_table is None else options.page_table.cpu()
        first = (self._lengths - self._counts).cpu()
        written = decode.seen(k.shape[0], k.shape[1], table, self._lengths.cpu(), first)
        return written[..., None, None].to(k.device)

    def _real(self, name: str, cache: Tensor) -> Tensor:
        """What a cache stands for, in fp64. All sequences have the same descales."""
        options = self._problem.options
        real, descale = cache.double(), getattr(options, f"{name}_descale")
        if descale is not None:
            real = real * descale[0].double()[:, None]
        mean = getattr(options, f"{name}_mean")
        return real if mean is None else real + mean.double()

    def _normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return x.to(self._problem.q.device)

    def _int32(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._problem.q.device)

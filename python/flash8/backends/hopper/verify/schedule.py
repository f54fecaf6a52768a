"""The kernel that makes scheduler metadata against counts made one by one."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash8.backends.hopper import schedule
from flash8.backends.hopper.schedule import Step
from flash8.backends.hopper.schedule_variants import ScheduleVariant
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.geometry import Geometry
from flash8.call.options import Options
from flash8.tensors.float8 import E4M3

_VERSION = 1
_MANY = 700  # sequences: more than the kernel has threads


class _Problem(NamedTuple):
    step: Step
    block_m: int
    block_n: int


def find_fault(variant: ScheduleVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for problem in _problems(device):
        step = problem.step
        shape = schedule.shape(step.geometry.batch)
        metadata = torch.full(shape, -1, dtype=torch.int32, device=device)
        watchdog = Watchdog(device)
        schedule.fill(metadata, step)
        watchdog.wait()
        have, want = metadata.tolist(), expected(problem)
        for i, (x, y) in enumerate(zip(have, want, strict=True)):
            if x != y:
                return f"word {i} of {len(want)} is {x}, not {y}"
    return None


def expected(problem: _Problem) -> list[int]:
    """The words of the metadata."""
    step = problem.step
    tag = _VERSION << 16 | problem.block_m << 8 | problem.block_n
    pieces = (_pieces(problem, b) for b in range(step.geometry.batch))
    return [tag, *itertools.accumulate(pieces)]


def _pieces(problem: _Problem, b: int) -> int:
    geometry, options, _, cu_seqlens_k_new, new = problem.step
    ends, rows = options.cu_seqlens_q, options.kv_batch_idx
    queries = options.max_seqlen_q or 0
    if ends is not None:
        queries = min(queries, int(ends[b + 1] - ends[b]))
    if queries == 0 or (rows is not None and rows[b] < 0):
        return 0
    if cu_seqlens_k_new is not None:
        new = int(cu_seqlens_k_new[b + 1] - cu_seqlens_k_new[b])
    assert options.seqused_k is not None
    end = int(options.seqused_k[b]) + new
    padding = 0 if options.leftpad_k is None else int(options.leftpad_k[b])
    first, last = end - padding - queries, end - padding - 1  # positions of the queries
    seen = [0, end - padding]
    if options.window_left >= 0:
        seen[0] = max(0, first - options.window_left)
    if options.window_right >= 0:
        seen[1] = min(seen[1], last + options.window_right + 1)
    if seen[0] >= max(seen[1], 0):
        return 0
    tiles = -(-(padding + seen[1]) // problem.block_n) - (padding + seen[0]) // problem.block_n
    if options.split_keys > 0:
        tiles = -(-tiles // (options.split_keys // problem.block_n))
    m_blocks = -(-queries * (geometry.heads // geometry.heads_kv) // problem.block_m)
    return tiles * m_blocks * geometry.heads_kv


def _problems(device: torch.device) -> Iterator[_Problem]:
    """Of the three sizes of tiles, with every index and mask; the last has more sequences than the
    kernel has threads."""

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    lengths = int32(0, 1, 700, 64, 63, 65)
    packed = Options(
        cu_seqlens_q=int32(0, 1, 1, 4, 6, 9, 10),
        max_seqlen_q=3,
        seqused_k=lengths,
        leftpad_k=int32(0, 1, 130, 0, 60, 5),
        kv_batch_idx=int32(4, 5, 0, -1, 1, 2),
        window_left=200,
        window_right=0,
    )
    new = int32(0, 2, 2, 5, 7, 10, 11)
    heads = Geometry(6, 8, 2, 128, 128, True, False, True)
    yield _Problem(Step(heads, packed, torch.bfloat16, new), 16, 32)
    dense = Options(max_seqlen_q=1, seqused_k=lengths, split_keys=128)
    wide = Geometry(6, 8, 1, 192, 192, False, False, False)
    yield _Problem(Step(wide, dense, torch.float16, None, 3), 8, 16)
    absorbed = Geometry(6, 64, 1, 64, 512, False, False, True)
    yield _Problem(Step(absorbed, dense._replace(split_keys=0), E4M3), 32, 32)
    many = dense._replace(seqused_k=int32(*(37 * b % 997 for b in range(_MANY))), split_keys=0)
    yield _Problem(Step(Geometry(_MANY, 8, 8, 64, 64, False, False, True), many, E4M3), 8, 64)

"""Variants of the forward kernel."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import compare, device, draw, int32, masks, packed, poisoned
from forward_launch import Call, ForwardKernel, Schedule
from fp8_forward_cases import cache_descales, descales

from .runs import Run, by_seed, image_of, launching, loaded_bytes, loading, text_of


@dataclass(frozen=True)
class Problem:
    """A call, how its tiles are handed out, and the seeds of its launches."""

    call: Call
    schedule: Schedule
    seeds: Iterable[int]


def packed_call(variant: ForwardVariant, lengths: tuple[int, ...], heads: int = 1) -> Call:
    """Packed sequences, of which the last two have no keys or not all of them."""
    offsets = packed(lengths)
    total = int(offsets[-1])
    q, k, v = draw(variant, total, total, heads, 1)
    scales = {}
    if variant.dtype == "e4m3":
        blocks = total // 128 + len(lengths)
        scales = descales(variant, len(lengths), heads, 1, blocks, blocks, packed=True)
    elif variant.cache == "e4m3":
        scales = cache_descales(len(lengths))
    used = int32([*lengths[:-2], max(0, lengths[-2] - 3), 0])
    indices = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "seqused_k": used}
    given = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths), "descales": scales}
    given |= {"indices": indices, **masks(variant)}
    if variant.dtype == "e4m3":
        given["k_mean"] = torch.linspace(-1, 1, len(lengths) * variant.head_dim).view(
            len(lengths), 1, variant.head_dim
        )
    return poisoned(Call(q, k, v, variant.head_dim**-0.5, **given))


def dense_call(variant: ForwardVariant, rows: int, keys: int, heads: int) -> Call:
    q, k, v = draw(variant, rows, keys, heads, 1, batch=1)
    scales = {}
    if variant.dtype == "e4m3":
        blocks = -(-rows // 128), -(-keys // 128)
        scales = {"descales": descales(variant, 1, heads, 1, *blocks)}
    elif variant.cache == "e4m3":
        scales = {"descales": cache_descales(1)}
    return Call(q, k, v, variant.head_dim**-0.5, **masks(variant), **scales)


@functools.cache
def problems(variant: ForwardVariant) -> tuple[Problem, ...]:
    """Tiles that are handed out in advance; more CTAs than tiles; sequences that are short, empty
    and without keys; several tiles a CTA; so many of them, in clusters for each of two stages, that
    a barrier that expects one consumer warp too few is a round ahead in the end; many blocks of
    keys, of which a causal mask cuts the second as well."""
    pair = 2 if variant.cluster else 1
    return (
        Problem(packed_call(variant, (20, 7, 3)), Schedule(num_ctas=pair, dynamic=False), (0,)),
        Problem(packed_call(variant, (9, 0, 30, 0, 1)), Schedule(num_ctas=5 * pair), range(6)),
        Problem(packed_call(variant, (5, 0, 200, 20, 64)), Schedule(num_ctas=2 * pair), range(4)),
        Problem(packed_call(variant, (400, 300, 0)), Schedule(num_ctas=pair), range(4)),
        Problem(dense_call(variant, 20, 20, 14 * pair), Schedule(num_ctas=2), range(5 // pair)),
        Problem(dense_call(variant, 150, 1400, 1), Schedule(num_ctas=pair), range(4)),
    )


def load(ptx: str) -> ForwardKernel:
    with loading(device()):
        return ForwardKernel(device().driver, image_of(ptx))


def launch(kernel: ForwardKernel, problem: Problem, seed: int) -> tuple[Tensor, Tensor, int]:
    """O, LSE, and how many bytes have been loaded into shared memory."""
    with launching(device(), seed):
        o, lse = kernel(problem.call, problem.schedule)
    return o, lse, loaded_bytes(device())


@dataclass(frozen=True)
class Forward:
    """A variant of the forward kernel."""

    name: str
    variant: ForwardVariant

    def ptx(self) -> str:
        return text_of(device().ptx(self.variant))

    def cases(self) -> Run:
        """Fails on a text that is not as good as this kernel's."""
        kernel = load(self.ptx())
        given = problems(self.variant)
        wanted = [launch(kernel, problem, 0) for problem in given]
        for problem, (o, lse, _) in zip(given, wanted, strict=True):
            compare(problem.call, o, lse)
        turns = by_seed(given, (problem.seeds for problem in given), wanted)

        def run(ptx: str) -> None:
            mutant = load(ptx)
            for seed, problem, (o, lse, bytes_) in turns:
                found, found_lse, loaded = launch(mutant, problem, seed)
                assert torch.equal(found, o), f"seed {seed}: O differs"
                assert torch.equal(found_lse, lse), f"seed {seed}: LSE differs"
                assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded, not {bytes_}"

        return run

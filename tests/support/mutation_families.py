"""Every family of kernels with the cases that its mutants must fail (flash8_sim.mutate).

A mutant fails where a launch has a finding, where results are not the bits of the unchanged kernel,
and where another number of bytes is loaded: a tile that is computed twice gives the same bits. The
unchanged kernel is held to its reference once. A mutant takes about a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import backward_cases
import decode_cases
import flash8
import gemm_cases
from backward_launch import BackwardKernels, Gradients
from cases import int32
from decode_launch import Call as DecodeCall
from decode_launch import DecodeKernel
from flash8 import _native, fp8
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.kernels import variant_of
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.backends.hopper.schedule_variants import SCHEDULE
from flash8.backends.hopper.variants import ForwardVariant
from flash8.call.scaled_mm import Product
from flash8_sim.mutate import InvalidMutantError
from forward_cases import compare, device, draw, masks, packed, poisoned
from forward_launch import Call, ForwardKernel, Schedule
from fp8_forward_cases import descales
from quantizer_device import device as quantizer_device
from quantizer_device import kernels
from schedule_launch import ScheduleKernel
from tolerances import rel_l2

Run = Callable[[str], None]


def text_of(image: bytes) -> str:
    return image.rstrip(b"\0").decode()


# ------------------------------------------------------------------------------------ forward


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
        Problem(dense_call(variant, 20, 20, 14 * pair), Schedule(num_ctas=2), range(4 // pair)),
        Problem(dense_call(variant, 150, 1400, 1), Schedule(num_ctas=pair), range(4)),
    )


def load(ptx: str) -> ForwardKernel:
    try:
        return ForwardKernel(device().driver, ptx.encode() + b"\0")
    except RuntimeError as error:
        raise InvalidMutantError(f"{error} {device().last_error()}") from error


def launch(kernel: ForwardKernel, problem: Problem, seed: int) -> tuple[Tensor, Tensor, int]:
    """O, LSE, and how many bytes TMA has loaded."""
    device().configure(seed=seed)
    try:
        o, lse = kernel(problem.call, problem.schedule)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {device().last_error()}") from error
    return o, lse, device().report()["statistics"]["bytes"]["tensor load"]


def check_forward(kernel: ForwardKernel, wanted: list, given: Iterable[Problem]) -> None:
    turns = [
        (seed, problem, want)
        for problem, want in zip(given, wanted, strict=True)
        for seed in problem.seeds
    ]
    for seed, problem, (o, lse, loaded) in sorted(turns, key=lambda turn: turn[0]):
        found, found_lse, found_bytes = launch(kernel, problem, seed)
        assert torch.equal(found, o), f"seed {seed}: O differs"
        assert torch.equal(found_lse, lse), f"seed {seed}: LSE differs"
        assert found_bytes == loaded, f"seed {seed}: {found_bytes} bytes loaded, not {loaded}"


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
        return lambda ptx: check_forward(load(ptx), wanted, given)


# ------------------------------------------------------------------------------------ backward


@functools.cache
def backward_problems(variant: BackwardVariant) -> tuple[tuple[backward_cases.Problem, range], ...]:
    """Calls and seeds: a tile with ragged sides; two heads over one block of keys; so many that a
    barrier that expects one warp too few is a round ahead in the end, and K without a mean; short
    and empty sequences, used lengths; blocks of keys that add to the same queries; unmasked tiles.
    """
    offsets = packed((70, 0, 5))
    total = int(offsets[-1])
    indices = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "seqused_k": int32([61, 0, 0])}
    longest = {"max_seqlen_q": 70, "max_seqlen_k": 70}
    many = backward_cases.draw(variant, 20, 20, 16, 1, batch=1)
    return (
        (backward_cases.draw(variant, 20, 20, 1, 1, batch=1), range(1)),
        (backward_cases.draw(variant, 130, 100, 2, 1, batch=1), range(4)),
        (replace(many, k_mean=torch.linspace(-1, 1, variant.head_dim)[None, None]), range(1)),
        (backward_cases.draw(variant, total, total, 1, 1, indices=indices, **longest), range(2)),
        (backward_cases.draw(variant, 100, 200, 1, 1, batch=1), range(4)),
        (backward_cases.draw(variant, 250, 250, 1, 1, batch=1), range(3)),
    )


def load_backward(variant: BackwardVariant, ptx: str) -> BackwardKernels:
    try:
        return backward_cases.kernels(variant).with_kernel(ptx.encode() + b"\0")
    except RuntimeError as error:
        raise InvalidMutantError(f"{error} {device().last_error()}") from error


def launch_backward(
    kernels: BackwardKernels, variant: BackwardVariant, problem: backward_cases.Problem, seed: int
) -> tuple[Gradients, int]:
    """Gradients, and how many bytes have been loaded."""
    device().configure(watch="flash8_backward")
    try:
        given = backward_cases.saved(problem)
        found = backward_cases.launch(variant, given, seed=seed, built=kernels)
        loaded = device().report()["statistics"]["bytes"]
    finally:
        device().configure(watch="")
    return found, sum(n for name, n in loaded.items() if name in ("tensor load", "bulk load"))


@dataclass(frozen=True)
class Backward:
    """The kernel between preprocess and postprocess, which stay what they are."""

    name: str
    variant: BackwardVariant

    def ptx(self) -> str:
        return text_of(backward_cases.images(self.variant)[1])

    def cases(self) -> Run:
        kernels = backward_cases.kernels(self.variant)
        given = backward_problems(self.variant)
        wanted = [launch_backward(kernels, self.variant, problem, 0) for problem, _ in given]
        for (problem, _), (right, _) in zip(given, wanted, strict=True):
            backward_cases.compare(problem, right)
        turns = [
            (seed, problem, want)
            for (problem, seeds), want in zip(given, wanted, strict=True)
            for seed in seeds
        ]
        turns.sort(key=lambda turn: turn[0])

        def run(ptx: str) -> None:
            mutant = load_backward(self.variant, ptx)
            for seed, problem, (right, bytes_) in turns:
                found, loaded = launch_backward(mutant, self.variant, problem, seed)
                for name in ("dk", "dv"):
                    same = torch.equal(getattr(found, name), getattr(right, name))
                    assert same, f"seed {seed}: {name} differs"
                # Blocks of keys add to dQ in any order.
                error = rel_l2(found.dq, right.dq.double())
                assert error <= 1e-3, f"seed {seed}: dQ differs by {error:.1e}"
                assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded, not {bytes_}"

        return run


# ------------------------------------------------------------------------------------- decode


@dataclass(frozen=True)
class DecodeProblem:
    """Calls that are launched one after the other, by how many CTAs, and the seeds."""

    calls: tuple[DecodeCall, ...]
    ctas: int
    seeds: Iterable[int]


@functools.cache
def schedule_kernel() -> ScheduleKernel:
    return ScheduleKernel(device().driver, device().ptx(SCHEDULE))


@functools.cache
def decode_problems(variant: DecodeVariant) -> tuple[DecodeProblem, ...]:
    """Sequences that are short, empty and of several CTAs; one of so many tiles that the rings go
    round; CTAs without work; scheduler metadata that holds, and that does not; two launches, of
    which the second takes the tickets of the first."""

    def call(*lengths: int, **options: object) -> DecodeCall:
        heads = {8: 2, 16: 7, 32: 14}[variant.rows]
        cache = decode_cases.Cache(3 if variant.load == "gather" else 24)
        return decode_cases.draw(
            variant, lengths, seqlen_q=2, heads=heads, cache=cache, causal=True, **options
        )

    ragged = call(300, 0, 1, 63, 65, 257)
    again = call(64, 500, seed=1)
    right = replace(ragged, scheduler_metadata=schedule_kernel()(variant, ragged))
    stale = replace(again, scheduler_metadata=schedule_kernel()(variant, call(70, 400)))
    most = 5000 if variant.head_dim_v <= 256 else 1500
    return (
        DecodeProblem((ragged,), 5, range(4)),
        DecodeProblem((right, again), 3, range(4)),
        DecodeProblem((stale, ragged), 9, range(4)),
        DecodeProblem((call(most, window=(most - 40, 0)),), 1, range(2)),
    )


def load_decode(ptx: str) -> DecodeKernel:
    try:
        return DecodeKernel(device().driver, ptx.encode() + b"\0")
    except RuntimeError as error:
        raise InvalidMutantError(f"{error} {device().last_error()}") from error


def launch_decode(
    kernel: DecodeKernel, problem: DecodeProblem, seed: int
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """O and LSE of each call, and how many bytes the last one has loaded into shared memory."""
    device().configure(seed=seed)
    try:
        found = kernel(*map(decode_cases.poisoned, problem.calls), ctas=problem.ctas)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {device().last_error()}") from error
    loaded = device().report()["statistics"]["bytes"]
    return found, sum(n for name, n in loaded.items() if name in ("tensor load", "cp.async"))


@dataclass(frozen=True)
class Decode:
    """A variant of the decode kernel."""

    name: str
    variant: DecodeVariant

    def ptx(self) -> str:
        return text_of(device().ptx(self.variant))

    def cases(self) -> Run:
        kernel = load_decode(self.ptx())
        given = decode_problems(self.variant)
        wanted = [launch_decode(kernel, problem, 0) for problem in given]
        for problem, (found, _) in zip(given, wanted, strict=True):
            for call, (o, lse) in zip(problem.calls, found, strict=True):
                decode_cases.compare(call, o, lse)
        turns = [
            (seed, problem, want)
            for problem, want in zip(given, wanted, strict=True)
            for seed in problem.seeds
        ]
        turns.sort(key=lambda turn: turn[0])

        def run(ptx: str) -> None:
            mutant = load_decode(ptx)
            for seed, problem, (right, bytes_) in turns:
                found, loaded = launch_decode(mutant, problem, seed)
                for (o, lse), (want, want_lse) in zip(found, right, strict=True):
                    assert torch.equal(o, want), f"seed {seed}: O differs"
                    assert torch.equal(lse, want_lse), f"seed {seed}: LSE differs"
                assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded, not {bytes_}"

        return run


# ---------------------------------------------------------------------------------- quantizers


def rows(*shape: int) -> Tensor:
    """Values whose largest are all over the tensor."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator)
    return x.bfloat16()


Options = dict[str, object]


def amax_of_this_step() -> Options:
    return {"descale": torch.tensor(0.01), "amax": torch.tensor(0.0)}


#: Every call runs the kernel of its row; two CTAs and more have a tensor's amax in common.
QUANTIZER_CALLS: dict[str, list[Callable[[], Options]]] = {
    "amax": [lambda: {"granularity": "tensor"}, lambda: {"granularity": "head", "hadamard": True}],
    "mean": [lambda: {"granularity": "head", "smooth_k": True}],
    "mean_finish": [lambda: {"granularity": "head", "smooth_k": True}],
    "cast": [lambda: {"granularity": "block"}, amax_of_this_step],
    "v_colmajor": [
        lambda: {"granularity": "block", "v_colmajor": True},
        lambda: {**amax_of_this_step(), "v_colmajor": True},
    ],
}
#: Shapes, and the offsets of packed sequences: one is empty; one begins before another's end.
LAYOUTS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((2, 300, 2, 64), ()),
    ((300, 2, 64), (0, 130, 130, 300)),
    ((300, 2, 64), (0, 130, 20, 133, 300)),
)


def quantized(
    options: Options, layout: tuple[tuple[int, ...], tuple[int, ...]], seed: int
) -> list[Tensor]:
    """All that a call fills."""
    shape, offsets = layout
    x = rows(*shape)
    if offsets:
        options = {**options, "cu_seqlens": int32(offsets)}
    tensors = [value for value in options.values() if isinstance(value, Tensor)]
    try:
        with pytest.MonkeyPatch.context() as patch, kernels(patch, x, *tensors, seed=seed):
            result = fp8.quantize(x, **options)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {quantizer_device().last_error()}") from error
    given = [options.get("amax"), result.mean]
    filled = [x for x in (result.data, result.descale, *given) if isinstance(x, Tensor)]
    return [x.clone().reshape(-1).view(torch.uint8) for x in filled]  # NaN is equal to itself


def appended(cache: torch.dtype, seed: int) -> list[Tensor]:
    """The caches after an append of packed rows, one sequence of which begins in another."""
    q, k, v = rows(3, 20, 4, 64), rows(60, 2, 64), rows(60, 2, 64)
    caches = [rows(3, 200, 2, 64).to(cache) for _ in "kv"]
    lengths, offsets = int32((0, 120, 77)), int32((0, 20, 5, 60))
    given = {"cache_seqlens": lengths, "cu_seqlens_k_new": offsets, "causal": True}
    given["num_splits"] = 2  # no kernel attends then: it would read what is made on the way
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            kernels(patch, q, k, v, *caches, lengths, offsets, seed=seed),
        ):
            flash8.flash_attn_with_kvcache(q, *caches, k, v, **given)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {quantizer_device().last_error()}") from error
    return [x.view(torch.uint8).clone() for x in caches]


@dataclass(frozen=True)
class Quantizer:
    """A variant of a quantizer kernel; others that a call takes stay what they are."""

    name: str
    variant: QuantizeVariant | AppendVariant

    def ptx(self) -> str:
        return text_of(quantizer_device().ptx(self.variant))

    def cases(self) -> Run:
        calls = self._calls()
        wanted = [call(0) for call in calls]

        def run(ptx: str) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(quantizer_device(), "_registry", self._registry(ptx))
                for seed in range(12):
                    for call, want in zip(calls, wanted, strict=True):
                        pairs = zip(call(seed), want, strict=True)
                        assert all(torch.equal(a, b) for a, b in pairs), f"seed {seed}"

        return run

    def _calls(self) -> list[Callable[[int], list[Tensor]]]:
        """What is called with a seed and returns all that its launches fill."""
        if isinstance(self.variant, AppendVariant):
            quantizes = self.variant.cache == "e4m3"
            cache = torch.float8_e4m3fn if quantizes else torch.bfloat16
            return [functools.partial(appended, cache)]
        row = QUANTIZER_CALLS["v_colmajor" if self.variant.v_colmajor else self.variant.job]
        return [
            lambda seed, make=make, layout=layout: quantized(make(), layout, seed)
            for make in row
            for layout in LAYOUTS
        ]

    def _registry(self, ptx: str) -> _native.Registry:
        def image(key: str, kind: str) -> bytes:
            variant = variant_of(key)
            is_mutant = variant == self.variant
            return ptx.encode() + b"\0" if is_mutant else quantizer_device().ptx(variant)

        return _native.Registry(quantizer_device().driver, image)


# --------------------------------------------------------------------------------- products


@functools.cache
def products() -> tuple[Product, ...]:
    """Ends of tiles, and tiles in turn; so many blocks of K that a barrier that expects a warp too
    few is a round ahead in the end, and scales that rows share."""
    return (
        gemm_cases.make(20, 30, 16),
        gemm_cases.make(140, 270, 272, bias=torch.bfloat16),
        gemm_cases.make(40, 50, 7184, "128x128", out_dtype=torch.bfloat16),
    )


@dataclass(frozen=True)
class Gemm:
    """A variant of the GEMM kernel with scales of blocks."""

    name: str
    variant: GemmVariant

    def ptx(self) -> str:
        return text_of(gemm_cases.device().ptx(self.variant))

    def cases(self) -> Run:
        wanted = [self._multiply(product, 0) for product in products()]
        for product, (out, _) in zip(products(), wanted, strict=True):
            gemm_cases.assert_same(out, gemm_cases.emulated(product))

        def run(ptx: str) -> None:
            registry = _native.Registry(
                gemm_cases.device().driver, lambda key, kind: ptx.encode() + b"\0"
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gemm_cases.device(), "_registry", registry)
                for seed in range(6):
                    for product, (want, bytes_) in zip(products(), wanted, strict=True):
                        found, loaded = self._multiply(product, seed)
                        gemm_cases.assert_same(found, want)
                        assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded"

        return run

    def _multiply(self, product: Product, seed: int) -> tuple[Tensor, int]:
        with pytest.MonkeyPatch.context() as patch:
            out = gemm_cases.on_kernel(patch, product, self.variant, seed=seed)
        return out, gemm_cases.device().report()["statistics"]["bytes"]["tensor load"]


FAMILIES: tuple[Forward | Backward | Decode | Quantizer | Gemm, ...] = (
    Forward("forward_16bit", ForwardVariant("bf16", 64, 64, mask="causal")),
    Forward("forward_fp8", ForwardVariant("e4m3", 64, 64, mask="causal", scales="head")),
    Forward(
        "forward_fp8_v_colmajor",
        ForwardVariant("e4m3", 64, 64, mask="causal", scales="head", v_colmajor=True),
    ),
    Forward("forward_16bit_cluster", ForwardVariant("bf16", 64, 64, cluster=True)),
    Forward("forward_fp8_cluster", ForwardVariant("e4m3", 64, 64, scales="head", cluster=True)),
    Backward("backward_16bit", BackwardVariant("bf16", 128, 128, mask="causal")),
    Decode("decode_fp8", DecodeVariant("bf16", "e4m3", 128, 128, 8)),
    Quantizer("quantize_cast", QuantizeVariant("cast", "bf16", 64)),
    Quantizer("quantize_cast_v_colmajor", QuantizeVariant("cast", "bf16", 64, v_colmajor=True)),
    Quantizer("quantize_amax", QuantizeVariant("amax", "bf16", 64)),
    Quantizer("quantize_mean", QuantizeVariant("mean", "bf16", 64)),
    Quantizer("quantize_mean_finish", QuantizeVariant("mean_finish", "fp32", 64)),
    Quantizer("append", AppendVariant("bf16")),
    Quantizer("append_to_e4m3", AppendVariant("bf16", "e4m3")),
    Gemm("gemm_block", GemmVariant("block", 128, 128)),
)

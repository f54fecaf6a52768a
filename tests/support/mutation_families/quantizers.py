"""Variants of the quantizer kernels, and of those that append to a cache."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import flash8
from flash8 import _native, fp8
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.kernels import variant_of
from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from forward_cases import int32
from matrix_quantizer_cases import draw, on_kernel, raw, request
from quantizer_device import device, kernels

from .runs import Run, image_of, text_of


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
        raise AssertionError(f"seed {seed}: {device().last_error()}") from error
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
        raise AssertionError(f"seed {seed}: {device().last_error()}") from error
    return [x.view(torch.uint8).clone() for x in caches]


#: Rows of a part of a warp, of several warps of a CTA, and longer than their threads hold.
OPERANDS = ((5, 136), (3, 4096), (2, 16400))


def operand(shape: tuple[int, int], seed: int) -> list[Tensor]:
    """Data, scales and x + residual of a norm by row."""
    given = request("rms_norm", draw(*shape), "row", other=draw(*shape, seed=1))
    try:
        with pytest.MonkeyPatch.context() as patch:
            return [raw(x) for x in on_kernel(patch, given, seed=seed)]
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {device().last_error()}") from error


@dataclass(frozen=True)
class Quantizer:
    """A variant of a quantizer kernel; others that a call takes stay what they are."""

    name: str
    variant: QuantizeVariant | AppendVariant | QuantizeMatrixVariant

    def ptx(self) -> str:
        return text_of(device().ptx(self.variant))

    def cases(self) -> Run:
        calls = self._calls()
        wanted = [call(0) for call in calls]

        def run(ptx: str) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(device(), "_registry", self._registry(ptx))
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
        if isinstance(self.variant, QuantizeMatrixVariant):
            return [functools.partial(operand, shape) for shape in OPERANDS]
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
            return image_of(ptx) if is_mutant else device().ptx(variant)

        return _native.Registry(device().driver, image)

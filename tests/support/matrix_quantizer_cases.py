"""Operands of products on the simulated device, and the float64 oracle of what they are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash8.backends.cpu import quantize_matrix as portable
from flash8.backends.hopper import quantize_matrix as hopper
from flash8.backends.hopper.verify.quantize_matrix import silu_fault
from flash8.call.request import MatrixRequest
from flash8.tensors import rms_norm
from quantizer_device import device

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRANULARITIES = ("row", "1x128")
PROLOGUES = ("none", "rms_norm", "silu_mul")
Make = Callable[..., Tensor]


def draw(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Rows of several powers of two."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    if len(shape) == 2:
        x = x * torch.exp2(torch.arange(shape[0]) % 7 - 3.0)[:, None]
    return x.to(dtype)


def request(
    prologue: str,
    x: Tensor,
    granularity: str = "1x128",
    *,
    other: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> MatrixRequest:
    """`other`: up, which silu_mul has anyway, or the residual, which rms_norm has where given."""
    if prologue == "none":
        return MatrixRequest(x, granularity)  # type: ignore[arg-type]
    if prologue == "silu_mul":
        up = draw(*x.shape, dtype=x.dtype, seed=1) if other is None else other
        return MatrixRequest(x, granularity, up=up)  # type: ignore[arg-type]
    given = draw(x.shape[1], dtype=FP32, seed=2) if weight is None else weight
    norm = rms_norm.Norm(given, eps)
    return MatrixRequest(x, granularity, norm=norm, residual=other)  # type: ignore[arg-type]


def tensors_of(given: MatrixRequest) -> list[Tensor]:
    found = [given.x, given.up, given.residual, given.norm and given.norm.weight]
    return [x for x in found if isinstance(x, Tensor)]


def is_copied(given: MatrixRequest) -> bool:
    """Whether the kernel reads a copy, whose bounds nobody knows here."""
    weight = None if given.norm is None else given.norm.weight
    if weight is not None and weight.dtype not in (given.x.dtype, FP32):
        return True
    return any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in tensors_of(given))


def on_kernel(monkeypatch: Any, given: MatrixRequest, *, seed: int = 0) -> tuple[Tensor, ...]:
    """What the kernel fills. It may touch the tensors of the request, as far as these are not
    copied, and what it fills, no more, and what it fills has guards."""
    assert hopper.refusal(given) is None
    with device().serving_cpu_tensors(monkeypatch, seed=seed):
        device().configure(seed=seed, strict_global=not is_copied(given))
        for x in tensors_of(given):
            device().register(x)
        try:
            return hopper.quantize_matrix(given)
        finally:
            for x in tensors_of(given):
                device().unregister(x)


def raw(x: Tensor) -> Tensor:
    """The bytes; one of e4m3's NaNs for all."""
    words = x.contiguous().view(torch.uint8)
    return torch.where(words & 0x7F == 0x7F, 0x7F, words) if x.element_size() == 1 else words


def check(monkeypatch: Any, given: MatrixRequest, seeds: tuple[int, ...] = (0,)) -> None:
    """The portable code's bits; of SiLU-multiply what fp64 allows."""
    want = portable.quantize_matrix(given)
    for seed in seeds:
        have = on_kernel(monkeypatch, given, seed=seed)
        assert [x.shape for x in have] == [x.shape for x in want]
        assert [x.dtype for x in have] == [x.dtype for x in want]
        if given.up is not None:
            assert silu_fault(given, have[0], have[1]) is None
            continue
        for a, b in zip(have, want, strict=True):
            assert torch.equal(raw(a), raw(b))

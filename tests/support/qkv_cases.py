"""QKV projections on the simulated device, and the bits that they must have."""

from typing import Any

import torch
from torch import Tensor

import gemm_cases
from cases import int32
from flash8 import fp8
from flash8.backends.cpu import qkv_projection as portable
from flash8.backends.hopper import qkv_projection as hopper
from flash8.call.qkv_projection import Projection
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope
from gemm_cases import device
from quantizer_cases import raw, tables

NAMES = ("q", "q_descale", "k", "k_descale", "v", "v_descale")
#: A row for each position that a test has, and none for some.
ROWS = 300


def make(
    tokens: tuple[int, ...],
    k: int = 144,
    heads: tuple[int, int] = (2, 1),
    granularity: str = "1x128",
    *,
    head_dim: int = 128,
    bias: torch.dtype | None = None,
    rope: str | None = None,
    norms: bool = False,
    rotary_dim: int = 128,
    offsets: list[int] | None = None,
    cu_seqlens: list[int] | None = None,
    seqused: list[int] | None = None,
    seed: int = 0,
) -> Projection:
    """tokens: (batch, seqlen), or (total,) with cu_seqlens. rope: "halves" or "interleaved"."""
    n = (heads[0] + 2 * heads[1]) * head_dim
    rows = torch.Size(tokens).numel()
    product = gemm_cases.make(rows, n, k, granularity, bias=bias, seed=seed)
    turned = None
    if rope is not None:
        cos, sin = tables(rotary_dim, ROWS)
        positions = None if offsets is None else int32(offsets)
        turned = Rope(cos, sin, positions, rope == "interleaved")
    weights = (gemm_cases.values(head_dim, seed=seed + i) for i in (5, 6))
    q_norm, k_norm = (Norm(weight, 1e-5) if norms else None for weight in weights)
    return Projection(
        *(product.a.view(*tokens, k), product.b, product.scale_a, product.scale_b, product.bias),
        *(*heads, turned, q_norm, k_norm),
        None if cu_seqlens is None else int32(cu_seqlens),
        None if seqused is None else int32(seqused),
    )


def emulated(projection: Projection) -> tuple[Tensor, ...]:
    """The product of the emulated tensor core, and the portable norm and quantizer."""
    with fp8.study(accumulation="hopper"):
        return portable.qkv_projection(projection)


def on_kernel(monkeypatch: Any, projection: Projection, *, seed: int = 0) -> tuple[Tensor, ...]:
    """The same from the kernel, whose outputs have guards (`guarded.py`)."""
    with device().serving_cpu_tensors(monkeypatch, seed=seed):
        try:
            return hopper.qkv_projection(projection)
        except RuntimeError as error:
            raise AssertionError(f"seed {seed}: {error} {device().last_error()}") from error


def assert_same(have: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(NAMES, have, want, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, f"{name}: {x.shape} for {y.shape}"
        bits = (raw(x), raw(y)) if x.dtype == E4M3 else (x, y)
        differ = bits[0] != bits[1]
        if differ.any():
            place = tuple(int(i) for i in differ.nonzero()[0])
            raise AssertionError(
                f"{int(differ.sum())} of {x.numel()} of {name} differ, the first at {place}: "
                f"{x[place].item()} for {y[place].item()}"
            )

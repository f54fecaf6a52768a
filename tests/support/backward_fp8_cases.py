"""Calls of the backward kernels of an FP8 forward, for `backward_cases.check`: descales and means
that differ everywhere, and the wide tensors that gradients belong to."""

from dataclasses import replace

import torch
from torch import Tensor

import backward_cases
from backward_cases import Problem
from flash8.backends.hopper.backward_variants import BackwardVariant
from forward_cases import real, sequences
from forward_launch import Call

_UNIT = 32.0  # of e4m3 values, which then use the range


def draw(
    variant: BackwardVariant,
    rows_q: int,
    rows_k: int,
    heads: int,
    heads_kv: int,
    *,
    batch: int | None = None,
    scales: str = "head",
    means: bool = True,
    bias: float = 0.0,
    seed: int = 0,
    **options,
) -> Problem:
    """As in backward_cases. scales: of a "tensor", of each "head", or of each "block" of it."""
    problem = backward_cases.draw(
        variant, rows_q, rows_k, heads, heads_kv, batch=batch, seed=seed, **options
    )
    call, generator = problem.call, torch.Generator().manual_seed(100 + seed)
    offsets = {name: call.indices.get(f"cu_seqlens_{name}") for name in "qk"}
    packed = offsets["q"] is not None
    sequences_ = offsets["q"].numel() - 1 if packed else call.q.shape[0]

    def descale(rows: int, heads: int) -> Tensor:
        shape: tuple[int, ...] = () if scales == "tensor" else (sequences_, heads)
        if scales == "block":
            shape = (*shape, max(1, -(-rows // 128)))
            shape = (1, heads, rows // 128 + sequences_) if packed else shape
        return torch.empty(shape).uniform_(0.5, 1.1, generator=generator) / _UNIT

    def normal(width: int) -> Tensor:
        return torch.randn((sequences_, heads_kv, width), generator=generator)

    k = call.k.float() + torch.linspace(-bias, bias, call.k.shape[-1])
    unit = _UNIT / max(1.0, bias / 8)
    eight = {
        "q": (call.q.float() * _UNIT).to(torch.float8_e4m3fn),
        "k": (k * unit).to(torch.float8_e4m3fn),
        "v": (call.v.float() * _UNIT).to(torch.float8_e4m3fn),
    }
    found = {
        "q_descale": descale(rows_q, heads_kv if scales == "head" else heads),
        "k_descale": descale(rows_k, heads_kv) * (_UNIT / unit),
        "v_descale": descale(rows_k, heads_kv),
    }
    given = {"descales": found, "out_dtype": problem.dout.dtype}
    if means:
        given["v_mean"] = 0.3 * normal(variant.head_dim_v)
        given["k_mean"] = None if variant.softcap else 0.5 * normal(variant.head_dim)
    fp8 = replace(call, **eight, **given)
    return replace(problem, call=fp8, wide=widened(fp8))


def widened(call: Call) -> Call:
    """What the tensors of an FP8 call stand for, in float64; zero in rows that are not used."""
    wide = {name: getattr(call, name).double().zero_() for name in "qkv"}
    for used in sequences(call):
        for name, x in wide.items():
            at = used.queries if name == "q" else used.keys
            x[at] = real(call, name, used, torch.float64)
    return replace(call, **wide, descales={}, k_mean=None, v_mean=None)

"""Calls that leave plans, and what their launches were given."""

from collections.abc import Callable

import torch
from torch import Tensor

from fake_driver.cubin import LAYOUT
from flash8 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash8.fp8 import Rotation, ScaledTensor
from flash8.ops import plan_cache
from flash8.tensors.tokens import Tokens
from flash8.tensors.v_colmajor import to_colmajor


def clear() -> None:
    plan_cache._plan_cache().clear()


def draw(seed=0, rows=40, heads=4, heads_kv=2, batch=2, width=128):
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads):
        return torch.randn(batch, rows, heads, width, generator=generator).bfloat16()

    return tensor(heads), tensor(heads_kv), tensor(heads_kv)


def _lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _packed(*tensors: Tensor) -> list[Tensor]:
    return [x.flatten(0, 1) for x in tensors]


def _e4m3(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.float8_e4m3fn) for x in tensors]


def _factors(*shape: int) -> Tensor:
    return torch.linspace(0.5, 1.5, torch.Size(shape).numel()).view(shape)


def _descales(q: tuple[int, ...], k: tuple[int, ...]) -> dict[str, Tensor]:
    return {"q_descale": _factors(*q), "k_descale": _factors(*k), "v_descale": _factors(*k)}


def _scaled(q: Tensor, k: Tensor, v: Tensor) -> list[ScaledTensor]:
    data = _e4m3(q, k, v)
    rotations = (Rotation(128, seed=3), Rotation(128, seed=3), None)
    factors = (_factors(2, 4, 1), _factors(2, 2, 1), _factors(2, 2, 1))
    means = (None, _factors(2, 128), _factors(2, 2, 128))
    return [
        ScaledTensor(x, descale, "block", mean=mean, rotation=rotation)
        for x, descale, mean, rotation in zip(data, factors, means, rotations, strict=True)
    ]


def _colmajor(v: Tensor) -> ScaledTensor:
    data = to_colmajor(v.to(torch.float8_e4m3fn), Tokens())
    return ScaledTensor(data, _factors(2, 2, 128), "channel", v_colmajor_tokens=v.shape[1])


def _pages(x: Tensor) -> Tensor:
    """Of eight keys each, five for a sequence."""
    return x.reshape(10, 8, *x.shape[2:])


def _table() -> Tensor:
    return torch.arange(9, -1, -1, dtype=torch.int32).view(2, 5)


ENDS = _lengths(0, 13, 80)
SINKS = torch.linspace(-1.0, 2.0, 4)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Calls of three bf16 tensors of `draw`, of every kind that leaves a plan.
CALLS: dict[str, Call] = {
    "causal": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
    "no mask": lambda q, k, v: flash_attn_func(q, k, v),
    "window, softcap, scale": lambda q, k, v: flash_attn_func(
        q, k, v, window_size=(7, 2), softcap=3.0, softmax_scale=0.2, sm_margin=3
    ),
    "packed": lambda q, k, v: flash_attn_varlen_func(
        *_packed(q, k, v), ENDS, ENDS, 67, 67, causal=True
    ),
    "packed queries": lambda q, k, v: flash_attn_varlen_func(
        q.flatten(0, 1), k, v, ENDS, None, 67, None
    ),
    "grouped heads in a tile": lambda q, k, v: flash_attn_func(q, k, v, pack_gqa=True),
    "strided": lambda q, k, v: flash_attn_func(q[:, ::2], k[:, 1:], v[:, 1:], causal=True),
    "sinks": lambda q, k, v: flash_attn_func(q, k, v, causal=True, s_aux=SINKS),
    "sinks in bf16": lambda q, k, v: flash_attn_func(q, k, v, causal=True, s_aux=SINKS.bfloat16()),
    "dropout": lambda q, k, v: flash_attn_func(q, k, v, causal=True, dropout_p=0.1),
    "dropout by a seed": lambda q, k, v: flash_attn_func(
        q, k, v, dropout_p=0.1, dropout_seed=torch.tensor([3])
    ),
    "slopes": lambda q, k, v: flash_attn_func(q, k, v, causal=True, alibi_slopes=SINKS),
    "slopes of sequences": lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=_factors(2, 4)),
    "used": lambda q, k, v: flash_attn_varlen_func(
        q, k, v, None, None, None, None, _lengths(17, 40), _lengths(40, 3), causal=True
    ),
    "pages": lambda q, k, v: flash_attn_varlen_func(
        *(q, _pages(k), _pages(v), None, None, None, None),
        seqused_k=_lengths(17, 40),
        page_table=_table(),
        causal=True,
    ),
    "pages of a cache": lambda q, k, v: flash_attn_with_kvcache(
        *(q, _pages(k), _pages(v)),
        cache_seqlens=_lengths(40, 9),
        page_table=_table(),
        cache_batch_idx=_lengths(1, 0),
        cache_leftpad=_lengths(0, 3),
        causal=True,
    ),
    "output": lambda q, k, v: flash_attn_func(q, k, v, causal=True, out=torch.zeros_like(q)),
    "e4m3": lambda q, k, v: flash_attn_func(*_e4m3(q, k, v), causal=True),
    "e4m3, tensor": lambda q, k, v: flash_attn_func(
        *_e4m3(q, k, v), causal=True, **_descales((), ())
    ),
    "e4m3, heads": lambda q, k, v: flash_attn_func(*_e4m3(q, k, v), **_descales((2, 2), (2, 2))),
    "e4m3, blocks": lambda q, k, v: flash_attn_varlen_func(
        *_e4m3(*_packed(q, k, v)),
        ENDS,
        ENDS,
        67,
        67,
        causal=True,
        v_mean=_factors(2, 128),
        **_descales((1, 4, 2), (1, 2, 2)),
    ),
    "e4m3, output": lambda q, k, v: flash_attn_func(
        *_e4m3(q, k, v), out=torch.zeros_like(q).half()
    ),
    "e4m3, channels": lambda q, k, v: flash_attn_func(
        *_e4m3(q, k, v), v_channel_descale=_factors(2, 2, 128), k_mean=_factors(2, 128)
    ),
    "scaled": lambda q, k, v: flash_attn_func(*_scaled(q, k, v), causal=True),
    "scaled, v_colmajor": lambda q, k, v: flash_attn_func(*_scaled(q, k, v)[:2], _colmajor(v)),
}


def addresses(parameters: bytes, *fields: str) -> list[int]:
    """Of a launch: what these fields of ForwardParams, "q" or "scheduler.tile_count", point to."""
    return [int.from_bytes(parameters[at : at + 8], "little") for at in map(_offset, fields)]


_STRUCTS = {
    "sequences": "SequenceParams",
    "scores": "ScoreParams",
    "scheduler": "SchedulerParams",
    "pages": "PageParams",
}


def _offset(field: str) -> int:
    part, _, name = field.partition(".")
    start, _ = LAYOUT["ForwardParams"]["fields"][part]
    return start + (LAYOUT[_STRUCTS[part]]["fields"][name][0] if name else 0)


_ADDRESSES = (
    *("q", "k", "v", "o", "lse", "q_descale", "k_descale", "v_descale"),
    *("k_mean", "v_mean", "v_channel_descale"),
    *("sequences.cu_seqlens_q", "sequences.cu_seqlens_k"),
    *("sequences.seqused_q", "sequences.seqused_k"),
    *("sequences.leftpad_k", "sequences.kv_batch_idx", "pages.page_table"),
    *("scores.sinks", "scores.alibi_slopes", "dropout"),
)


def without_addresses(parameters: bytes) -> bytes:
    """The parameters of a launch with the addresses of its tensors, but whether there are any, and
    what holds them, zeroed."""
    cleared = bytearray(parameters)
    for name in _ADDRESSES:
        given = name != "lse" and addresses(parameters, name) != [0]
        cleared[_offset(name) : _offset(name) + 8] = given.to_bytes(8, "little")
    for name in ("tma_q", "tma_k", "tma_v"):
        at = _offset(name)
        cleared[at + 16 : at + 24] = bytes(8)  # as the fake driver packs a map
    return bytes(cleared)

"""The checks of the tensors that scale or shift float8 inputs (`flash8.tensors.descales`)."""

from typing import Any

import torch
from torch import Tensor

from flash8.call.geometry import Geometry
from flash8.call.options import Options
from flash8.tensors.arguments import require_tensor
from flash8.tensors.descales import (
    BLOCK,
    check_value,
    num_blocks,
    num_packed_blocks,
)
from flash8.tensors.float8 import E4M3


def check(q: Tensor, k: Tensor, geometry: Geometry, options: Options) -> None:
    """Raises TypeError or ValueError on a descale or mean that does not fit the call."""
    g = geometry
    of_cache = [tuple(k.shape[:-1])] if options.is_cache or g.paged else []
    heads = (g.heads_kv,) if g.heads == g.heads_kv else (g.heads_kv, g.heads)
    allowed: dict[str, list[tuple[int, ...]]] = {
        "q_descale": [*((g.batch, h) for h in heads), _blocks(q, g.heads, g.batch, g.q_packed)],
        "k_descale": [(g.batch, g.heads_kv), _key_blocks(k, g), *of_cache],
        "v_descale": [(g.batch, g.heads_kv), _key_blocks(k, g), *of_cache],
    }
    for name, shapes in allowed.items():
        descale = getattr(options, name)
        if descale is None:
            continue
        scaled = q if name == "q_descale" else k
        _require_float8(name, scaled)
        require_tensor(name, descale, torch.float32, q)
        shape = tuple(descale.shape)
        if descale.dim() != 0 and shape not in shapes:
            raise ValueError(_wrong_shape(name, shape, shapes, scaled))
    _check_channels(q, k, geometry, options)


def _require_float8(name: str, scaled: Tensor) -> None:
    if scaled.dtype != E4M3:
        raise ValueError(
            f"{name} needs {E4M3} inputs, got {scaled.dtype} {name[0]}; pass {name}=None"
        )


def _blocks(x: Tensor, heads: int, batch: int, packed: bool) -> tuple[int, int, int]:
    if packed:
        return 1, heads, num_packed_blocks(x.shape[0], batch)
    return x.shape[0], heads, num_blocks(x.shape[1])


def _key_blocks(k: Tensor, geometry: Geometry) -> tuple[int, int, int]:
    if geometry.paged:
        return k.shape[0], geometry.heads_kv, 1
    return _blocks(k, geometry.heads_kv, geometry.batch, geometry.k_packed)


def _wrong_shape(
    name: str, shape: tuple[int, ...], shapes: list[tuple[int, ...]], scaled: Tensor
) -> str:
    listed = " or ".join(str(allowed) for allowed in shapes)
    message = (
        f"{name} must be a scalar or have shape (batch, heads) or that of its blocks of {BLOCK} "
        f"tokens (of its pages for a paged cache, or of the tokens of any cache), here {listed}; "
        f"got {shape}"
    )
    tokens = scaled.shape[-3]
    if name != "q_descale" and tokens in shape and tokens > 1:
        message += (
            f". A descale per token of {name[0]} is for KV caches: elsewhere it would cost a "
            "multiply per score, where block descales cost nothing"
        )
    return message


def _check_channels(q: Tensor, k: Tensor, geometry: Geometry, options: Options) -> None:
    widths = {
        "k_mean": geometry.head_dim,
        "v_mean": geometry.head_dim_v,
        "v_channel_descale": geometry.head_dim_v,
    }
    for name, width in widths.items():
        given: Any = getattr(options, name)
        if given is None:
            continue
        _require_float8(name, k)
        require_tensor(name, given, torch.float32, q)
        shapes = [(geometry.heads_kv, width), (geometry.batch, geometry.heads_kv, width)]
        if tuple(given.shape) not in shapes:
            raise ValueError(
                f"{name} must have shape (heads_kv, head_dim) = {shapes[0]} or "
                f"(batch, heads_kv, head_dim) = {shapes[1]}, got {tuple(given.shape)}"
            )
    if options.k_mean is not None and options.softcap > 0.0:
        raise ValueError(
            f"k_mean (smoothing of K) cannot be combined with softcap = {options.softcap}: a shift "
            "of a row's scores does not cancel once they are capped"
        )
    if options.v_mean is not None and options.dropout_p > 0.0:
        raise ValueError(
            f"v_mean cannot be combined with dropout_p = {options.dropout_p}: the weights that "
            "dropout leaves do not sum to 1"
        )


def check_values(options: Options, pages: Tensor | None = None) -> None:
    """Raises ValueError where a descale holds what is none. Reads them: for CPU tensors.

    pages: of a paged cache, those that some query sees; the descales of others do not count.
    """
    for name in ("q_descale", "k_descale", "v_descale", "v_channel_descale"):
        descale = getattr(options, name)
        if descale is None:
            continue
        if pages is not None and name in ("k_descale", "v_descale") and descale.dim() == 3:
            counts = torch.zeros(descale.shape[0], dtype=torch.bool, device=descale.device)
            counts[pages] = True
            descale = torch.where(counts[:, None, None], descale, 1.0)
        check_value(name, descale)

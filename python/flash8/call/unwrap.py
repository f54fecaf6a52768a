"""Takes the ScaledTensors of a call apart into data and options."""

from typing import Any

import torch
from torch import Tensor

from flash8.call.options import Options
from flash8.tensors.scaled_tensor import ScaledTensor

# `unwrap` takes Options apart by position.
assert Options._fields[:6] == (
    *("q_descale", "k_descale", "v_descale"),
    *("k_mean", "v_mean", "v_channel_descale"),
)
assert Options._fields[-1] == "v_colmajor_tokens"


def unwrap(q: Any, k: Any, v: Any, options: Options) -> tuple[Any, Any, Any, Options]:
    """Takes ScaledTensors apart into data and options; other values pass as they are."""
    if not (
        isinstance(q, ScaledTensor) or isinstance(k, ScaledTensor) or isinstance(v, ScaledTensor)
    ):
        return q, k, v, options
    _check_rotations(q, k, v)
    q_descale, _ = _factors("q", q, options.q_descale, None)
    k_descale, k_mean = _factors("k", k, options.k_descale, options.k_mean)
    v_descale, v_mean = _factors("v", v, options.v_descale, options.v_mean)
    v_channel_descale, v_colmajor_tokens = options.v_channel_descale, options.v_colmajor_tokens
    if isinstance(v, ScaledTensor):
        v_colmajor_tokens = v.v_colmajor_tokens
        if v.granularity == "channel":
            if v_channel_descale is not None:
                raise ValueError(
                    "v_channel_descale must be None where v is a ScaledTensor: it brings its own"
                )
            v_descale, v_channel_descale = None, v_descale
    for name, x in (("q", q), ("k", k)):
        if isinstance(x, ScaledTensor):
            _check_q_or_k(name, x)
    for name, x, ends in (
        ("q", q, options.cu_seqlens_q),
        ("k", k, options.cu_seqlens_k),
        ("v", v, options.cu_seqlens_k),
    ):
        if isinstance(x, ScaledTensor) and x.cu_seqlens is not ends:
            _check_boundaries(name, x, ends)
    # By position, several times as quick as _replace.
    factors = (q_descale, k_descale, v_descale, k_mean, v_mean, v_channel_descale)
    options = Options._make((*factors, *options[len(factors) : -1], v_colmajor_tokens))
    return _data(q), _data(k), _data(v), options


def _check_q_or_k(name: str, x: ScaledTensor) -> None:
    if x.v_colmajor_tokens is not None:
        raise ValueError(f"{name} must not be v_colmajor: only v is read with its keys innermost")
    if x.granularity == "channel":
        raise ValueError(
            f"{name} must not have a descale per channel, which would have to multiply inside "
            "q . k: only v may, whose channels are those of O"
        )


def _check_boundaries(name: str, x: ScaledTensor, ends: Any) -> None:
    """Descales, means and v_colmajor keys belong to the sequences that x was quantized as. Only on
    a CPU is that looked at: elsewhere it would wait for the device."""
    own = x.cu_seqlens
    indifferent = x.granularity == "tensor" and x.v_colmajor_tokens is None and x.mean is None
    comparable = (
        type(own) is type(ends) is Tensor
        and own.device.type == ends.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )
    if own is None or indifferent or not comparable or torch.equal(own.long(), ends.long()):
        return
    raise ValueError(
        f"cu_seqlens_{'q' if name == 'q' else 'k'} must be what {name} was quantized with, "
        f"{own.tolist()}, got {ends.tolist()}"
    )


def _data(x: Any) -> Any:
    return x.data if isinstance(x, ScaledTensor) else x


def _factors(name: str, x: Any, descale: Any, mean: Any) -> tuple[Any, Any]:
    """The descale and the mean of x: its own, or those given for a tensor."""
    if not isinstance(x, ScaledTensor):
        return descale, mean
    if descale is not None:
        raise ValueError(
            f"{name}_descale must be None where {name} is a ScaledTensor: it brings its own"
        )
    if x.mean is None:
        return x.descale, mean
    if name == "q":
        raise ValueError("q must not have had a mean taken from it, got a ScaledTensor with one")
    if mean is not None:
        raise ValueError(f"{name}_mean must be None where {name} is a ScaledTensor with a mean")
    return x.descale, x.mean


def _check_rotations(q: Any, k: Any, v: Any) -> None:
    if isinstance(v, ScaledTensor) and v.rotation is not None:
        raise ValueError(
            "v must not be rotated, O would come out rotated: quantize it with hadamard=None; "
            f"got {v.rotation}"
        )
    q_rotation = q.rotation if isinstance(q, ScaledTensor) else None
    k_rotation = k.rotation if isinstance(k, ScaledTensor) else None
    if q_rotation != k_rotation:
        raise ValueError(
            "q and k must be rotated alike (the same hadamard and seed), "
            f"got {q_rotation} and {k_rotation}"
        )

"""Takes the ScaledTensors of a call apart into data, descales and means."""

from typing import Any

import torch
from torch import Tensor

from flash8.call.options import Arguments
from flash8.tensors.scaled_tensor import ScaledTensor


def unwrap(arguments: Arguments) -> Arguments:
    """What ScaledTensors give in their place: data, descales and means. Empty if there are none."""
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    if not (
        isinstance(q, ScaledTensor) or isinstance(k, ScaledTensor) or isinstance(v, ScaledTensor)
    ):
        return {}
    given: Arguments = {}
    for name, x, boundaries in (
        ("q", q, "cu_seqlens_q"),
        ("k", k, "cu_seqlens_k"),
        ("v", v, "cu_seqlens_k"),
    ):
        if not isinstance(x, ScaledTensor):
            continue
        given[name], descale = x.data, f"{name}_descale"
        if arguments.get(descale) is not None:
            raise ValueError(
                f"{descale} must be None where {name} is a ScaledTensor: it brings its own"
            )
        given[descale] = x.descale
        if x.mean is not None:
            _give_mean(given, arguments, name, x.mean)
        if x.cu_seqlens is not arguments.get(boundaries):
            _check_boundaries(name, x, arguments.get(boundaries))
        if name != "v":
            _check_q_or_k(name, x)
    _check_rotations(q, k, v)
    if isinstance(v, ScaledTensor):
        given["v_colmajor_tokens"] = v.v_colmajor_tokens
        if v.granularity == "channel":
            if arguments.get("v_channel_descale") is not None:
                raise ValueError(
                    "v_channel_descale must be None where v is a ScaledTensor: it brings its own"
                )
            given["v_descale"], given["v_channel_descale"] = None, v.descale
    return given


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


def _give_mean(given: Arguments, arguments: Arguments, name: str, mean: Tensor) -> None:
    if name == "q":
        raise ValueError("q must not have had a mean taken from it, got a ScaledTensor with one")
    if arguments.get(f"{name}_mean") is not None:
        raise ValueError(f"{name}_mean must be None where {name} is a ScaledTensor with a mean")
    given[f"{name}_mean"] = mean


def _check_rotations(q: Any, k: Any, v: Any) -> None:
    if isinstance(v, ScaledTensor) and v.rotation is not None:
        raise ValueError(
            "v must not be rotated, O would come out rotated: quantize it with hadamard=None; "
            f"got {v.rotation}"
        )
    q_rotation = q.rotation if isinstance(q, ScaledTensor) else None
    k_rotation = k.rotation if isinstance(k, ScaledTensor) else None
    if q_rotation is not k_rotation and q_rotation != k_rotation:
        raise ValueError(
            "q and k must be rotated alike (the same hadamard and seed), "
            f"got {q_rotation} and {k_rotation}"
        )

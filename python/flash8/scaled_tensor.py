"""A float8 tensor together with everything that gives its values back."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash8.options import Options

if TYPE_CHECKING:
    from flash8.fp8.hadamard import Rotation


@dataclass(frozen=True)
class ScaledTensor:
    """x = rotation^-1(descale * data + mean): what `flash8.fp8.quantize` returns.

    The attention functions take it in place of q, k and v, with descale and mean: K's mean comes
    back in LSE, V's in O, and q and k must share a rotation, which then cancels.
    """

    data: Tensor  # float8, x's shape
    descale: Tensor  # fp32, a shape of `flash8.descales`
    granularity: str  # "tensor", "head", "block", "page" or "channel"
    mean: Tensor | None = None  # fp32 (heads, d) or (batch, heads, d), rotated as data is
    rotation: "Rotation | None" = None
    cu_seqlens: Tensor | None = None  # of packed data, int32 (batch + 1,)
    keys: int | None = None  # tokens of transposed data (`flash8.fp8.transposed`), else None

    def by_token(self) -> Tensor:
        """The data in (batch, seqlen, heads, d) or (total, heads, d), whatever it is stored as."""
        if self.keys is None:
            return self.data
        from flash8.fp8.tokens import Tokens
        from flash8.fp8.transposed import untranspose

        return untranspose(self.data, self.keys, Tokens(self.cu_seqlens))

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device


Input = Tensor | ScaledTensor


def unwrap(q: Any, k: Any, v: Any, options: Options) -> tuple[Any, Any, Any, Options]:
    """Takes ScaledTensors apart into data and options; other values pass as they are."""
    given = {"q": q, "k": k, "v": v}
    scaled = {name: x for name, x in given.items() if isinstance(x, ScaledTensor)}
    if not scaled:
        return q, k, v, options
    _check_rotations(given, scaled)
    for name, x in scaled.items():
        if getattr(options, f"{name}_descale") is not None:
            raise ValueError(
                f"{name}_descale must be None where {name} is a ScaledTensor: it brings its own"
            )
        field = f"{name}_descale"
        if x.granularity == "channel":
            field = _channel_field(name, options)
        changes: dict[str, Any] = {field: x.descale}
        options = options._replace(**changes)
        if x.mean is not None:
            options = _with_mean(name, x.mean, options)
    for name in ("q", "k"):
        if name in scaled and scaled[name].keys is not None:
            raise ValueError(f"{name} must not be transposed: only v is read by keys")
    if "v" in scaled:
        options = options._replace(v_keys=scaled["v"].keys)
    data = [x.data if isinstance(x, ScaledTensor) else x for x in (q, k, v)]
    return data[0], data[1], data[2], options


def _channel_field(name: str, options: Options) -> str:
    if name != "v":
        raise ValueError(
            f"{name} must not have a descale per channel, which would have to multiply inside "
            "q . k: only v may, whose channels are those of O"
        )
    if options.v_channel_descale is not None:
        raise ValueError(
            "v_channel_descale must be None where v is a ScaledTensor: it brings its own"
        )
    return "v_channel_descale"


def _with_mean(name: str, mean: Tensor, options: Options) -> Options:
    if name == "q":
        raise ValueError("q must not have had a mean taken from it, got a ScaledTensor with one")
    if getattr(options, f"{name}_mean") is not None:
        raise ValueError(f"{name}_mean must be None where {name} is a ScaledTensor with a mean")
    changes: dict[str, Any] = {f"{name}_mean": mean}
    return options._replace(**changes)


def _check_rotations(given: dict[str, Any], scaled: dict[str, ScaledTensor]) -> None:
    if "v" in scaled and scaled["v"].rotation is not None:
        raise ValueError(
            "v must not be rotated, O would come out rotated: quantize it with hadamard=None; "
            f"got {scaled['v'].rotation}"
        )
    rotations = {name: getattr(given[name], "rotation", None) for name in ("q", "k")}
    if rotations["q"] != rotations["k"]:
        raise ValueError(
            "q and k must be rotated alike (the same hadamard and seed), "
            f"got {rotations['q']} and {rotations['k']}"
        )

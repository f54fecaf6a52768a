"""Recipes: how `fp8_attention` finds its scales, and how much of its backward is FP8.

    CurrentScaling   the scale of a tensor or head comes from its own amax
    BlockScaling     the same for every 128 tokens
    DelayedScaling   one scale per tensor, from the amax of past steps

`backward` is one of
    "16bit"          all products in 16 bits on the dequantized operands: the default
    "fp8_scores"     S = QK^T and dP = dO V^T in FP8, the other three in 16 bits
    "fp8_scores_dv"  dV = P^T dO in FP8 too, with P times 448
    "fp8"            dQ and dK as well, dS scaled per 128 x 128 tile
Gradients come out in the inputs' type, and D = rowsum(dO * O) is always made from 16-bit dO and O.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flash8.call.options import Options
from flash8.fp8.quantize import descale_of, quantize
from flash8.tensors.arguments import describe, require_bool, require_int
from flash8.tensors.float8 import E4M3, E5M2
from flash8.tensors.scaled_tensor import ScaledTensor

#: By the number of backward products that are FP8: none, two, three, five.
BACKWARDS = ("16bit", "fp8_scores", "fp8_scores_dv", "fp8")
#: How many they are.
FP8_PRODUCTS = dict(zip(BACKWARDS, (0, 2, 3, 5), strict=True))
_TENSORS = ("q", "k", "v", "do")


class Scaling(NamedTuple):
    """What has a scale of its own, the scale where it is known already, and where amax is
    gathered."""

    granularity: str
    descale: Tensor | None = None
    amax: Tensor | None = None


class Recipe(Protocol):
    """What `fp8_attention` asks of a recipe."""

    @property
    def hadamard(self) -> bool | int: ...

    @property
    def smooth_k(self) -> bool: ...

    @property
    def smooth_v(self) -> bool: ...

    @property
    def backward(self) -> str: ...

    @property
    def gradient_dtype(self) -> torch.dtype: ...

    def scaling(self, name: str) -> Scaling:
        """Of q, k or v (`name`)."""

    def quantize(
        self, name: str, x: Tensor, cu_seqlens: Tensor | None, *, v_colmajor: bool = False
    ) -> ScaledTensor:
        """q, k or v (`name`) in FP8; q and k rotated if the recipe says so, v with its keys
        innermost if `v_colmajor`."""

    def gradient_descale(self) -> Tensor | None:
        """The scalar descale of dO; None: from its own amax, by head or by 128 tokens."""

    def gradient_amax(self) -> Tensor | None:
        """Where the amax of dO is gathered, fp32 (), if it is."""


@dataclass(frozen=True, kw_only=True)
class _FromItself:
    """What the recipes share whose scales come from the tensor itself."""

    hadamard: bool | int = False
    smooth_k: bool = False
    smooth_v: bool = False
    backward: str = "16bit"
    gradient_dtype: torch.dtype = E4M3

    def __post_init__(self) -> None:
        _check(self)

    def scaling(self, name: str) -> Scaling:
        raise NotImplementedError

    def quantize(
        self, name: str, x: Tensor, cu_seqlens: Tensor | None, *, v_colmajor: bool = False
    ) -> ScaledTensor:
        return _quantize(self, name, x, cu_seqlens, v_colmajor)

    def gradient_descale(self) -> Tensor | None:
        return None

    def gradient_amax(self) -> Tensor | None:
        return None


@dataclass(frozen=True, kw_only=True)
class CurrentScaling(_FromItself):
    """Scales from the amax of the tensor itself, per "tensor" or per "head" of a sequence.

    hadamard: rotate q and k (True, or a seed of the signs). smooth_k, smooth_v: take the mean of
    k or v over the tokens off before quantization. backward: see the module. gradient_dtype: of dO
    and dS in an FP8 backward; float8_e5m2 about doubles their error.
    """

    granularity: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in ("tensor", "head"):
            raise ValueError(
                "granularity must be 'tensor' or 'head' (BlockScaling scales by 128 tokens), got "
                f"{self.granularity!r}"
            )

    def scaling(self, name: str) -> Scaling:
        return Scaling(self.granularity)


@dataclass(frozen=True, kw_only=True)
class BlockScaling(_FromItself):
    """Scales from the amax of every 128 tokens of a head. Fields as in `CurrentScaling`."""

    def scaling(self, name: str) -> Scaling:
        return Scaling("block")


class DelayedScaling(torch.nn.Module):
    """One scale per tensor, from the largest amax of the last `history` steps.

        descale = 2^margin * max(history) / max_of_dtype

    Every forward and backward gathers amax; `step()`, once per optimizer step, moves what was
    gathered into the history and sets the scales. A forward that runs twice (activation
    checkpointing) so sees the same scales twice. In eval mode nothing is gathered. Until the
    first step the descales are 1. One recipe per attention layer; its state is in state_dict().

    Args:
        history: steps that are remembered, at least 1.
        margin: head room in powers of two, at least 0.
        amax_compute: "max" of the history, or its "most_recent" entry.
        process_group: where given, `step()` takes the maximum over its processes, so that
            replicas keep the same scales.
        hadamard, smooth_k, smooth_v, backward: as in `CurrentScaling`. Gradients are
            float8_e5m2: a scale from the past needs the range more than the precision.
    """

    amax_history: Tensor  # fp32 (history, 4): q, k, v, dO, the most recent step first
    amax: Tensor  # fp32 (4,): of this step
    descale: Tensor  # fp32 (4,)

    def __init__(
        self,
        history: int = 16,
        margin: int = 0,
        amax_compute: str = "max",
        process_group: Any = None,
        hadamard: bool | int = False,
        smooth_k: bool = False,
        smooth_v: bool = False,
        backward: str = "16bit",
        gradient_dtype: torch.dtype = E5M2,
    ) -> None:
        super().__init__()
        require_int("history", history, minimum=1)
        require_int("margin", margin, minimum=0, maximum=64)
        if amax_compute not in ("max", "most_recent"):
            raise ValueError(f"amax_compute must be 'max' or 'most_recent', got {amax_compute!r}")
        if gradient_dtype != E5M2:
            raise ValueError(
                f"gradient_dtype must be {E5M2} under delayed scaling, got {gradient_dtype}: the "
                "amax of a gradient jumps between steps, beyond what e4m3's range forgives"
            )
        self.margin, self.amax_compute, self.process_group = margin, amax_compute, process_group
        self.hadamard, self.smooth_k, self.smooth_v = hadamard, smooth_k, smooth_v
        self.backward, self.gradient_dtype = backward, gradient_dtype
        _check(self)
        self.register_buffer("amax_history", torch.zeros(history, len(_TENSORS)))
        self.register_buffer("amax", torch.zeros(len(_TENSORS)))
        self.register_buffer("descale", torch.ones(len(_TENSORS)))

    def scaling(self, name: str) -> Scaling:
        index = _TENSORS.index(name)
        # A copy: what backward saves must not change with step().
        descale = self.descale[index].clone()
        return Scaling("tensor", descale, self.amax[index] if self.training else None)

    def quantize(
        self, name: str, x: Tensor, cu_seqlens: Tensor | None, *, v_colmajor: bool = False
    ) -> ScaledTensor:
        return _quantize(self, name, x, cu_seqlens, v_colmajor)

    def gradient_descale(self) -> Tensor | None:
        return self.descale[_TENSORS.index("do")].clone()

    def gradient_amax(self) -> Tensor | None:
        return self.amax[_TENSORS.index("do")] if self.training else None

    @torch.no_grad()
    def step(self) -> None:
        """Sets the scales of the next step from what was gathered since the last call."""
        if self.process_group is not None:
            torch.distributed.all_reduce(
                self.amax, op=torch.distributed.ReduceOp.MAX, group=self.process_group
            )
        self.amax_history.copy_(torch.cat((self.amax[None], self.amax_history[:-1])))
        self.amax.zero_()
        recent = self.amax_history[0]
        amax = recent if self.amax_compute == "most_recent" else self.amax_history.amax(dim=0)
        amax = amax * 2.0**self.margin
        forward, gradient = descale_of(amax[:-1]), descale_of(amax[-1:], self.gradient_dtype)
        self.descale.copy_(torch.cat((forward, gradient)))

    def extra_repr(self) -> str:
        return f"history={len(self.amax_history)}, margin={self.margin}, backward={self.backward!r}"


def check_call(recipe: Any, options: Options) -> None:
    """Raises where a recipe does not fit a call."""
    if not all(hasattr(recipe, name) for name in ("quantize", "gradient_descale", "backward")):
        raise TypeError(
            "recipe must be a flash8.fp8 CurrentScaling, BlockScaling or DelayedScaling, got "
            f"{describe(recipe)}"
        )
    if recipe.smooth_k and options.softcap > 0.0:
        raise ValueError(
            f"recipe with smooth_k cannot be combined with softcap = {options.softcap}: a shift of "
            "a row's scores does not cancel once they are capped"
        )
    if recipe.smooth_v and options.dropout_p > 0.0:
        raise ValueError(
            f"recipe with smooth_v cannot be combined with dropout_p = {options.dropout_p}: the "
            "weights that dropout leaves do not sum to 1"
        )


def _check(recipe: "_FromItself | DelayedScaling") -> None:
    """The fields that all recipes share."""
    if isinstance(recipe.hadamard, int) and not isinstance(recipe.hadamard, bool):
        require_int("hadamard", recipe.hadamard, minimum=0, maximum=2**63 - 1)
    else:
        require_bool("hadamard", recipe.hadamard)
    require_bool("smooth_k", recipe.smooth_k)
    require_bool("smooth_v", recipe.smooth_v)
    if recipe.backward in ("original", "unquantized"):
        raise ValueError(
            f"backward must be one of {BACKWARDS}, got {recipe.backward!r}: with the original "
            "operands and the LSE of the FP8 forward the rows of P no longer sum to 1, which costs "
            "up to 0.19 of the gradient where attention is peaked"
        )
    if recipe.backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {BACKWARDS}, got {recipe.backward!r}")
    if recipe.gradient_dtype not in (E4M3, E5M2):
        raise TypeError(f"gradient_dtype must be {E4M3} or {E5M2}, got {recipe.gradient_dtype}")


def _quantize(
    recipe: Recipe,
    name: str,
    x: Tensor,
    cu_seqlens: Tensor | None,
    v_colmajor: bool,
) -> ScaledTensor:
    granularity, descale, amax = recipe.scaling(name)
    return quantize(
        x,
        granularity,
        hadamard=recipe.hadamard if name in ("q", "k") else None,
        smooth_k=recipe.smooth_k and name == "k",
        smooth_v=recipe.smooth_v and name == "v",
        cu_seqlens=cu_seqlens,
        descale=descale,
        amax=amax,
        v_colmajor=v_colmajor,
    )

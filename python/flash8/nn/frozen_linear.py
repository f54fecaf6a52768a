"""A linear layer of e4m3 weights, for inference."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flash8 import gemm
from flash8.call.autocast import cast_for_autocast
from flash8.call.observed import is_autocast_on
from flash8.call.scaled_mm import UNIT_K, WIDE, blocks_of
from flash8.tensors.arguments import (
    describe,
    require_int,
    require_shape,
    require_tensor,
)
from flash8.tensors.float8 import E4M3

WeightScaling = Literal["tensor", "row", "block"]
_GRANULARITY: dict[WeightScaling, Any] = {"tensor": "tensor", "row": "row", "block": "128x128"}
_KEPT = ("weight", "weight_scale")
#: What other checkpoints call the scales: DeepSeek-V3's, whose blocks are 128x128.
_OTHER_NAME = "weight_scale_inv"


class FrozenFp8Linear(nn.Module):
    """out = x8 @ weight^T + bias, of a weight that is e4m3 for good: half the memory of bf16.

    x is quantized in every call, rows of it by 1x128 beside a "block" weight, else by row; up to 64
    rows of 16 bits beside a "block" weight are quantized inside the product. Or x comes as data and
    scales, from `gemm.quantize_rms_norm`, say. There are no gradients: `Fp8Linear` trains.

    Attributes:
        weight: e4m3 (out_features, in_features).
        weight_scale: fp32; weight ~ weight_scale * its e4m3. "block": (ceil(out_features / 128),
            ceil(in_features / 128)); "row": (out_features, 1); "tensor": (1, 1).
        bias: (out_features,) of `dtype`, or None.

    Casts of the layer leave weight and scales as they are. A state_dict may have the scales as
    `weight_scale_inv`, which is DeepSeek-V3's name of the same, and a weight that is not quantized
    yet: it is, when it is loaded.

    Args:
        in_features: a multiple of 16.
        out_features, bias, device: as in nn.Linear.
        dtype: bf16, fp16 or fp32, of the bias, and of the output where x is quantized already.
        scaling: what of the weight has a scale of its own.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        scaling: WeightScaling = "block",
    ) -> None:
        super().__init__()
        if scaling not in get_args(WeightScaling):
            raise ValueError(f"scaling must be one of {get_args(WeightScaling)}, got {scaling!r}")
        require_int("in_features", in_features, minimum=UNIT_K)
        require_int("out_features", out_features, minimum=1)
        if in_features % UNIT_K != 0:
            raise ValueError(f"in_features must be a multiple of {UNIT_K}, got {in_features}")
        if dtype not in WIDE:
            raise TypeError(f"dtype must be one of {WIDE}, got {describe(dtype)}")
        self.in_features, self.out_features = in_features, out_features
        self.scaling, self.dtype = scaling, dtype
        weight = torch.zeros(out_features, in_features, dtype=torch.uint8, device=device)
        self.register_buffer("weight", weight.view(E4M3))
        self.register_buffer("weight_scale", torch.ones(self._scale_shape(), device=device))
        given = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", given)
        self.register_load_state_dict_pre_hook(_as_it_is_kept)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, scaling: WeightScaling = "block"
    ) -> "FrozenFp8Linear":
        """The layer with its weight quantized; `Fp8Linear` is an nn.Linear. The bias is shared."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {describe(linear)}")
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            "meta",
            linear.weight.dtype,
            scaling=scaling,
        )
        weight = linear.weight.detach()
        if weight.is_meta:
            return made.train(linear.training)
        made.weight, made.weight_scale = gemm.quantize(weight, _GRANULARITY[scaling])
        if linear.bias is not None:
            made.bias = linear.bias.detach()
        return made.train(linear.training)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x: (..., in_features), bf16, fp16 or fp32, or its e4m3 and scales, as `flash8.gemm`'s
        quantizers give them: by 1x128 (..., ceil(in_features / 128)) for a "block" weight, else by
        row (..., 1) or by tensor. Returns (..., out_features) in x's dtype, or autocast's; in
        `dtype` where x is quantized already."""
        data, scale = x if isinstance(x, tuple) else (x, None)
        if scale is None and is_autocast_on():
            (data,) = cast_for_autocast(data)
        require_tensor("x", data, WIDE if scale is None else E4M3, self.weight)
        if data.dim() == 0 or data.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have shape (..., in_features) = (..., {self.in_features}), got "
                f"{tuple(data.shape)}"
            )
        if torch.is_grad_enabled() and data.requires_grad:
            raise RuntimeError(
                "flash8.nn.FrozenFp8Linear has no derivative: call it under torch.no_grad(), or "
                "train with flash8.nn.Fp8Linear"
            )
        self._check_buffers()
        rows = data.reshape(data.shape[:-1].numel(), self.in_features)
        if scale is None:
            out = self._of_wide(rows)
        else:
            require_tensor("x's scale", scale, torch.float32, self.weight)
            by_row = scale if scale.numel() == 1 else scale.reshape(rows.shape[0], -1)
            out = self._multiplied(rows, by_row, self.dtype)
        return out.view(*data.shape[:-1], self.out_features)

    def _of_wide(self, rows: Tensor) -> Tensor:
        if self.scaling != "block":
            return self._multiplied(*gemm.quantize(rows, "row"), rows.dtype)
        if rows.dtype == torch.float32:
            return self._multiplied(*gemm.quantize(rows, "1x128"), rows.dtype)
        return self._multiplied(rows, None, rows.dtype)

    def _multiplied(self, rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        of_weight = self.weight_scale.t()
        return gemm.scaled_mm(
            rows, self.weight.t(), scale, of_weight, bias=self.bias, out_dtype=dtype
        )

    def _scale_shape(self) -> tuple[int, int]:
        n, k = self.out_features, self.in_features
        return {"tensor": (1, 1), "row": (n, 1), "block": (blocks_of(n), blocks_of(k))}[
            self.scaling
        ]

    def _check_buffers(self) -> None:
        """They may have been replaced since, and kernels read what the sizes promise."""
        n, k = self.out_features, self.in_features
        require_tensor("weight", self.weight, E4M3)
        require_shape("weight", self.weight, (n, k), "(out_features, in_features)")
        require_tensor("weight_scale", self.weight_scale, torch.float32, self.weight)
        require_shape("weight_scale", self.weight_scale, self._scale_shape(), "that of its scaling")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FrozenFp8Linear":
        """A cast of the layer leaves the weight e4m3 and its scales fp32."""
        kept = {name: self.get_buffer(name) for name in _KEPT}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            made = self.get_buffer(name)
            if made.dtype != x.dtype:
                self._buffers[name] = x.to(made.device)
        bias = fn(torch.empty(0, dtype=self.dtype)) if self.bias is None else self.bias
        self.dtype = bias.dtype
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scaling={self.scaling!r}"
        )


def _as_it_is_kept(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state_dict is loaded: scales by their other name, and a weight that has none."""
    assert isinstance(module, FrozenFp8Linear)
    weight, scale, other = (f"{prefix}{name}" for name in (*_KEPT, _OTHER_NAME))
    if other in state_dict and scale not in state_dict:
        state_dict[scale] = state_dict.pop(other)
    given = state_dict.get(weight)
    if isinstance(given, Tensor) and given.dtype in WIDE and scale not in state_dict:
        quantized = gemm.quantize(given.detach(), _GRANULARITY[module.scaling])
        state_dict[weight], state_dict[scale] = quantized
    found = state_dict.get(scale)
    if isinstance(found, Tensor) and module.scaling == "tensor" and found.numel() == 1:
        state_dict[scale] = found.reshape(1, 1)

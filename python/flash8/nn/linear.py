"""Linear layers in FP8."""

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from flash8.call.autocast import cast_for_autocast
from flash8.call.observed import is_autocast_on
from flash8.fp8 import descale_of
from flash8.nn.frozen_linear import FrozenFp8Linear
from flash8.ops.fp8_linear import fp8_linear
from flash8.ops.quantize_matrix import quantize_matrix
from flash8.tensors.arguments import (
    describe,
    require_bool,
    require_int,
    require_shape,
    require_tensor,
)
from flash8.tensors.float8 import E4M3

Scaling = Literal["tensor", "delayed", "block"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BUFFERS = ("amax_history", "amax", "descale")


class Fp8Linear(nn.Linear):
    """`torch.nn.Linear` whose product is of e4m3: out = x8 @ weight8^T + bias.

    The parameters stay bf16, fp16 or fp32, and are quantized in every forward; so is x. With
    "tensor" and "block" the state_dict is that of nn.Linear. With "delayed" it has three tensors
    more, which stay fp32 in every cast of the layer, and loads that of nn.Linear too. Gradients
    pass straight through the rounding.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear. Any sizes: what the product
            needs as a multiple of 16 is filled up with zeros.
        scaling: where the scales come from.
            "tensor": amax of x and of the weight now.
            "delayed": amax of both in the last `history` steps, see `step`. As "tensor" before the
                first one.
            "block": amax of every 128 channels of a row of x, and of 128 by 128 of the weight, as
                in DeepSeek-V3 (arXiv 2412.19437).
        grad_dtype: None: dx = dout @ weight and dw = dout^T @ x in x's dtype. float8_e4m3fn: both
            are products of e4m3, with scales by tensor, or for "block" by 1x128 along the sum by
            128x128. dout is always scaled by its own amax.
        history: steps that "delayed" remembers, at least 1.

    x is bf16, fp16 or fp32, and so is the output; under torch.autocast it is cast to its dtype
    first. With e4m3 gradients x is kept for the backward in e4m3.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """

    amax_history: Tensor  # fp32 (history, 2): x, weight, the most recent step first
    amax: Tensor  # fp32 (2,): since the last step
    descale: Tensor  # fp32 (2,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scaling: Scaling = "tensor",
        grad_dtype: torch.dtype | None = None,
        history: int = 16,
    ) -> None:
        if scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {get_args(Scaling)}, got {scaling!r}")
        if grad_dtype not in (None, E4M3):
            raise TypeError(f"grad_dtype must be None or {E4M3}, got {describe(grad_dtype)}")
        require_int("history", history, minimum=1)
        super().__init__(in_features, out_features, bias, device, dtype)
        if self.weight.dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {_DTYPES}, got {self.weight.dtype}")
        self.scaling, self.grad_dtype = scaling, grad_dtype
        self._has_history = False
        if scaling == "delayed":
            self.register_buffer("amax_history", torch.zeros(history, 2, device=device))
            self.register_buffer("amax", torch.zeros(2, device=device))
            self.register_buffer("descale", torch.ones(2, device=device))
            self.register_load_state_dict_pre_hook(_find_history)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        scaling: Scaling = "tensor",
        grad_dtype: torch.dtype | None = None,
        history: int = 16,
    ) -> "Fp8Linear":
        """The layer in FP8, with the same parameters, not copies, and in the same mode."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {describe(linear)}")
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            "meta",
            linear.weight.dtype,
            scaling=scaling,
            grad_dtype=grad_dtype,
            history=history,
        )
        made.weight, made.bias = linear.weight, linear.bias
        if scaling == "delayed" and linear.weight.device.type != "meta":
            for name in _BUFFERS:
                setattr(
                    made, name, torch.zeros_like(made.get_buffer(name), device=linear.weight.device)
                )
            made.reset_scales()
        return made.train(linear.training)

    def reset_parameters(self) -> None:
        """The initial values of nn.Linear, and no history."""
        super().reset_parameters()
        self.reset_scales()

    @torch.no_grad()
    def reset_scales(self) -> None:
        """Forgets what "delayed" has gathered."""
        self._has_history = False
        for name in _BUFFERS:
            if name in self._buffers:
                self.get_buffer(name).fill_(1.0 if name == "descale" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features) in x's dtype, or autocast's."""
        if is_autocast_on():
            (x,) = cast_for_autocast(x)
        require_tensor("x", x, _DTYPES, self.weight)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have shape (..., in_features) = (..., {self.in_features}), got "
                f"{tuple(x.shape)}"
            )
        self._check_parameters()
        rows = x.reshape(x.shape[:-1].numel(), self.in_features)
        by_blocks = self.scaling == "block"
        if by_blocks:
            x8, w8 = quantize_matrix(rows, "1x128"), quantize_matrix(self.weight, "128x128")
        else:
            x8, w8 = self._by_tensor(0, rows), self._by_tensor(1, self.weight)
        kept8 = None
        if self.grad_dtype is not None:
            keeps = by_blocks and torch.is_grad_enabled()
            kept8 = quantize_matrix(rows, "128x128") if keeps else x8
        out = fp8_linear(rows, self.weight, self.bias, x8, w8, kept8, by_blocks)
        return out.view(*x.shape[:-1], self.out_features)

    def _check_parameters(self) -> None:
        """They may have been cast or replaced since, and kernels read what the sizes promise."""
        n, k = self.out_features, self.in_features
        require_tensor("weight", self.weight, _DTYPES)
        require_shape("weight", self.weight, (n, k), "(out_features, in_features)")
        if self.bias is not None:
            require_tensor("bias", self.bias, _DTYPES, self.weight)
            require_shape("bias", self.bias, (n,), "(out_features,)")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Fp8Linear":
        """A cast of the layer leaves the scales fp32, as which kernels read and write them."""
        kept = {name: self.get_buffer(name) for name in _BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, x in kept.items():
            made = self.get_buffer(name)
            if made.dtype != torch.float32:
                self._buffers[name] = x.to(made.device)
        return self

    def _by_tensor(self, index: int, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """x (0) or the weight (1). What is delayed is gathered in training mode only."""
        if self.scaling == "tensor":
            return quantize_matrix(matrix, "tensor")
        # A copy: what backward saves must not change with step().
        scale = self.descale[index].clone().view(1, 1) if self._has_history else None
        amax = self.amax[index] if self.training else None
        return quantize_matrix(matrix, "tensor", scale, amax)

    @torch.no_grad()
    def step(self) -> None:
        """For "delayed", once per optimizer step: the scales of the next step, from the largest
        amax of the last `history` steps. With other scalings it does nothing.

        A forward that runs twice (activation checkpointing) so sees the same scales twice.
        """
        if self.scaling != "delayed":
            return
        self.amax_history.copy_(torch.cat((self.amax[None], self.amax_history[:-1])))
        self.amax.zero_()
        self.descale.copy_(descale_of(self.amax_history.amax(0)))
        self._has_history = True

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scaling={self.scaling!r}, grad_dtype={self.grad_dtype}"


def to_fp8_linears(
    module: nn.Module,
    module_filter: Callable[[str, nn.Linear], bool] | None = None,
    *,
    frozen: bool = False,
    **options: Any,
) -> nn.Module:
    """Puts an `Fp8Linear` of the same parameters in the place of every nn.Linear of a module, or
    for inference a `FrozenFp8Linear`, which keeps its weight in e4m3 only.

    Args:
        module: changed in place. Subclasses of nn.Linear are left alone.
        module_filter: (name, linear) -> whether it is replaced; usually not the last layer.
        frozen: a `FrozenFp8Linear`, in the place of every `Fp8Linear` too.
        options: of `from_linear` of the layer.

    Returns:
        The module, or the new layer where it is an nn.Linear itself.
    """
    require_bool("frozen", frozen)
    replaced = (nn.Linear, Fp8Linear) if frozen else (nn.Linear,)
    make = FrozenFp8Linear.from_linear if frozen else Fp8Linear.from_linear
    if type(module) in replaced:
        return make(cast(nn.Linear, module), **options)
    made: dict[nn.Linear, nn.Module] = {}  # a layer that is shared stays shared
    for prefix, parent in [*module.named_modules()]:
        for name, child in [*parent._modules.items()]:
            full = f"{prefix}.{name}" if prefix else name
            if type(child) not in replaced:
                continue
            linear = cast(nn.Linear, child)
            if module_filter is None or module_filter(full, linear):
                if linear not in made:
                    made[linear] = make(linear, **options)
                setattr(parent, name, made[linear])
    return module


def _find_history(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before a state_dict is loaded: that of nn.Linear has none, and the layer begins anew. With
    assign=True what is in it becomes the buffers, which are fp32."""
    assert isinstance(module, Fp8Linear)
    names = [f"{prefix}{name}" for name in _BUFFERS]
    if not any(name in state_dict for name in names):
        module.reset_scales()
        for name, own in zip(names, _BUFFERS, strict=True):
            state_dict[name] = module.get_buffer(own).clone()
        return
    for name in names:
        if name in state_dict:
            state_dict[name] = state_dict[name].float()
    history = state_dict.get(names[0])
    module._has_history = history is not None and not history.is_meta and bool(history.any())

"""Layer and RMS normalisation with a residual, by torch's own functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """The norm of dropout(rowscale * x) + residual, computed in fp32.

    Args:
        prenorm: also return the sum before the norm, in residual's dtype; without a residual in
            x's, or in fp32 with residual_in_fp32.
        zero_centered_weight: the factor is 1 + weight.
        out_dtype: of the result; x's by default.
    """
    unsupported: dict[str, Any] = {"x1": x1, "weight1": weight1, "bias1": bias1, "out": out}
    unsupported |= {"residual_out": residual_out, "return_dropout_mask": return_dropout_mask}
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported by flash8.compat's layer_norm_fn")
    compute = torch.promote_types(x.dtype, torch.float32)
    summed = x if rowscale is None else x * rowscale[..., None]
    summed = F.dropout(summed, dropout_p).to(compute)
    if residual is not None:
        summed = summed + residual
    factor = weight.to(compute) + 1.0 if zero_centered_weight else weight.to(compute)
    shape = (x.shape[-1],)
    if is_rms_norm:
        normed = F.rms_norm(summed, shape, factor, eps)
        normed = normed if bias is None else normed + bias
    else:
        shift = None if bias is None else bias.to(compute)
        normed = F.layer_norm(summed, shape, factor, shift, eps)
    normed = normed.to(x.dtype if out_dtype is None else out_dtype)
    if not prenorm:
        return normed
    if residual is not None:
        return normed, summed.to(residual.dtype)
    return normed, summed.to(compute if residual_in_fp32 else x.dtype)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` without the mean."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with a residual that is added first."""

    weight: nn.Parameter
    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dropout_p = dropout_p
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )

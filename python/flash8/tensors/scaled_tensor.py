"""A float8 tensor together with everything that gives its values back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flash8.tensors.hadamard import Rotation
from flash8.tensors.tokens import Tokens
from flash8.tensors.v_colmajor import from_colmajor


@dataclass(frozen=True)
class ScaledTensor:
    """x = rotation^-1(descale * data + mean): what `flash8.fp8.quantize` returns.

    The attention functions take it in place of q, k and v, with descale and mean: K's mean comes
    back in LSE, V's in O, and q and k must share a rotation, which then cancels.
    """

    data: Tensor  # float8, x's shape unless `v_colmajor_tokens` is given
    descale: Tensor  # fp32, a shape of `flash8.tensors.descales`
    granularity: str  # "tensor", "head", "block", "page" or "channel"
    mean: Tensor | None = None  # fp32 (heads, d) or (batch, heads, d), rotated as data is
    rotation: Rotation | None = None
    cu_seqlens: Tensor | None = None  # of packed data, int32 (batch + 1,)
    v_colmajor_tokens: int | None = None  # of data as `flash8.tensors.v_colmajor` has it

    def __repr__(self) -> str:
        """One line: shapes, not values."""
        data, descale = self.data, self.descale
        extras = {
            "mean": self.mean is not None,
            "rotated": self.rotation is not None,
            "packed": self.cu_seqlens is not None,
            "v_colmajor": self.v_colmajor_tokens is not None,
        }
        parts = [
            f"{str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}",
            f"descale {tuple(descale.shape)} by {self.granularity}",
            *(name for name, has in extras.items() if has),
            str(data.device),
        ]
        return f"ScaledTensor({', '.join(parts)})"

    def by_token(self) -> Tensor:
        """The data in (batch, seqlen, heads, d) or (total, heads, d), whatever it is stored as."""
        if self.v_colmajor_tokens is None:
            return self.data
        return from_colmajor(self.data, self.v_colmajor_tokens, Tokens(self.cu_seqlens))

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

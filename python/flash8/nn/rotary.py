"""Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864)."""

import torch
from torch import Tensor, nn

from flash8.tensors.rotary import rotate


class RotaryEmbedding(nn.Module):
    """Rotates pairs of the first ``dim`` channels by ``position * base ** (-2 i / dim)``.

    Args:
        dim: channels to rotate, even; the others pass through.
        base: the longest wavelength is about 2 pi * base.
        interleaved: channels 2i and 2i + 1 make a pair (GPT-J) instead of i and i + dim / 2
            (GPT-NeoX, Llama).
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim <= 0 or dim % 2 != 0:
            raise ValueError(f"dim must be positive and even, got {dim}")
        if base <= 0:
            raise ValueError(f"base must be positive, got {base}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved
        self._tables: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}"

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Rotate ``x``.

        Args:
            x: (..., heads, head_dim) with head_dim >= dim, any floating dtype.
            position_ids: integers that broadcast to the leading dimensions (...) of ``x``.

        Returns:
            As ``x``; angles in fp64, the rotation in fp32 (fp64 for fp64 inputs), rounded once.
        """
        if x.shape[-1] < self.dim:
            raise ValueError(
                f"x must have at least {self.dim} channels to rotate, got {x.shape[-1]}"
            )
        cos, sin = self._cos_sin(position_ids)
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def tables(
        self, seqlen: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (seqlen, dim / 2): what `flash_attn_with_kvcache` takes. Kept."""
        kept = self._tables
        if kept is None or not _fits(kept[0], seqlen, dtype, device):
            cos, sin = self._cos_sin(torch.arange(seqlen, device=device))
            kept = self._tables = (cos.to(dtype), sin.to(dtype))
        return kept[0][:seqlen], kept[1][:seqlen]

    def _cos_sin(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """float64: in fp32 the angle of position 100,000 is off by 0.004.

        Frequencies are computed, not stored: a buffer would be rounded by `module.half()`.
        """
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64, device=position_ids.device)
        angles = position_ids.unsqueeze(-1) * self.base ** (-exponents / self.dim)
        return angles.cos(), angles.sin()


def _fits(table: Tensor, seqlen: int, dtype: torch.dtype, device: torch.device) -> bool:
    return table.shape[0] >= seqlen and table.dtype == dtype and table.device == device

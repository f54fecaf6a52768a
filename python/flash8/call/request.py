"""What is asked of a quantizer, and the shapes of what it returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash8.call.scaled_mm import UNIT_K, Granularity, blocks_of
from flash8.tensors.descales import num_blocks, num_packed_blocks
from flash8.tensors.float8 import E4M3
from flash8.tensors.hadamard import Rotation
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope
from flash8.tensors.tokens import Tokens
from flash8.tensors.v_colmajor import colmajor_shape


class Request(NamedTuple):
    """One checked call of `flash8.fp8.quantize`: who serves it returns data, descale and mean."""

    x: Tensor
    granularity: str
    dtype: torch.dtype = E4M3
    rotation: Rotation | None = None
    smooth: bool = False  # take the mean of x itself off
    mean: Tensor | None = None  # or this one
    rope: Rope | None = None
    cu_seqlens: Tensor | None = None
    seqused: Tensor | None = None
    descale: Tensor | None = None
    amax: Tensor | None = None
    v_colmajor: bool = False

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.cu_seqlens, self.seqused)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def batch(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def blocks(self) -> int:
        """Blocks of a sequence of a dense tensor, of all sequences of a packed one."""
        if self.packed:
            return num_packed_blocks(self.x.shape[0], self.batch)
        return num_blocks(self.x.shape[1])

    def descale_shape(self) -> tuple[int, ...]:
        heads = self.x.shape[-2]
        if self.granularity == "tensor":
            return ()
        if self.granularity == "head":
            return self.batch, heads
        if self.granularity == "channel":
            return self.batch, heads, self.x.shape[-1]
        if self.granularity == "page":
            return self.batch, heads, 1
        return (1 if self.packed else self.batch), heads, self.blocks

    def data_shape(self) -> tuple[int, ...]:
        if self.v_colmajor:
            return colmajor_shape(self.x.shape, self.batch, self.packed)
        return tuple(self.x.shape)

    def mean_shape(self) -> tuple[int, ...]:
        """Of the mean that comes back; (0,) where the caller has it already, or there is none."""
        if self.smooth:
            return self.batch, *self.x.shape[-2:]
        if self.mean is None or self.rotation is None:
            return (0,)
        return tuple(self.mean.shape)


class MatrixRequest(NamedTuple):
    """One checked call that makes an operand of `gemm.scaled_mm`: who serves it returns its data,
    its scales, and x + residual, empty without a residual."""

    x: Tensor  # (M, K)
    granularity: Granularity
    scale: Tensor | None = None  # a given one of the tensor
    amax: Tensor | None = None  # fp32 (), raised to the largest finite |x|
    up: Tensor | None = None  # as x: silu(x) * up is quantized
    norm: Norm | None = None  # RMSNorm of x, or of x + residual, is
    residual: Tensor | None = None  # as x, with a norm

    @property
    def data_shape(self) -> tuple[int, int]:
        """(M, K filled up)."""
        m, k = self.x.shape
        return m, k + -k % UNIT_K

    @property
    def scale_shape(self) -> tuple[int, int]:
        """By row, or by 128 of a row."""
        m, k = self.x.shape
        return m, 1 if self.granularity == "row" else blocks_of(k)

    @property
    def row_threads(self) -> int:
        """Threads of the kernel that share a row: as few as hold it, at 64 columns each, from 8 to
        256. Each adds up squares by 16 columns at a time: that is the order of a norm's sum."""
        threads = 8
        while threads < 256 and 64 * threads < self.x.shape[1]:
            threads *= 2
        return threads


class Appended(NamedTuple):
    """New rows x, (batch, seqlen_new, heads, d) or packed, and where they go in `cache`.

    cache: (rows, seqlen, heads, d) or (pages, page_size, heads, d), of x's dtype or e4m3. Sequence
    b's rows go to positions starts[b] and up. descale, mean: as an e4m3 cache has them.
    """

    cache: Tensor
    x: Tensor
    starts: Tensor  # int32 (batch,)
    cu_seqlens: Tensor | None = None
    page_table: Tensor | None = None
    kv_batch_idx: Tensor | None = None
    descale: Tensor | None = None
    mean: Tensor | None = None
    rope: Rope | None = None
    norm: Norm | None = None  # before the rotation

    @property
    def quantizes(self) -> bool:
        return self.cache.dtype == E4M3 and self.x.dtype != E4M3


class Queries(NamedTuple):
    """The queries of a call that appends, which are rotated with its keys, or normalised."""

    x: Tensor
    rope: Rope | None
    cu_seqlens: Tensor | None = None
    advances: bool = True  # by a position a token; otherwise all of a sequence have its first
    norm: Norm | None = None  # before the rotation

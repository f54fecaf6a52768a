"""FlashAttention-3's kernels by which the model is calibrated, and what its paper says of them.

The figures are the bars of the paper's charts of the forward without a mask (arXiv 2407.08608):
TFLOP/s on an H100 SXM5 at 16k keys, one sequence, 2048 channels over all heads. The paper's 16-bit
figures are of fp16, which differs from bf16 in one conversion of P. Its kernels were of July 2024,
of an older compiler; the machine code here is of the commit below. Later figures for 16 bits at
head_dim 128 are higher, up to 734.
"""

import math
from dataclasses import dataclass

COMMIT = "0251105a2fb19d2957484b7f023cd8c115286ced"

_MULTIPROCESSORS = 132
#: TFLOP/s of NVIDIA's data sheet for the H100 SXM5, without sparsity.
_NOMINAL = {"bf16": 989.4, "e4m3": 1978.9}
_KEYS, _CHANNELS = 16384, 2048


@dataclass(frozen=True)
class Peer:
    """One of FlashAttention-3's kernels, without a mask.

    Attributes:
        block_m: Rows of a tile, of which a warpgroup has 64.
        block_n: Keys of a tile.
        tflops: The published speed.
    """

    dtype: str
    head_dim: int
    block_m: int
    block_n: int
    tflops: float

    @property
    def name(self) -> str:
        return f"fa3_{self.dtype}_d{self.head_dim}"

    @property
    def warpgroups(self) -> int:
        return self.block_m // 64

    @property
    def published_share(self) -> float:
        """Of the nominal speed, while the multiprocessors have a tile: the last wave of tiles does
        not fill them all."""
        tiles = _CHANNELS // self.head_dim * math.ceil(_KEYS / self.block_m)
        waves = math.ceil(tiles / _MULTIPROCESSORS)
        return self.tflops / _NOMINAL[self.dtype] * waves * _MULTIPROCESSORS / tiles


PEERS = (
    Peer("bf16", 64, 192, 192, 497),
    Peer("bf16", 128, 128, 176, 648),
    Peer("bf16", 256, 128, 80, 756),
    Peer("e4m3", 64, 192, 160, 613),
    Peer("e4m3", 128, 128, 224, 1008),
    Peer("e4m3", 256, 128, 128, 1171),
)

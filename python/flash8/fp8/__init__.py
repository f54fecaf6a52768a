"""FP8: scales, quantization, recipes, and differentiable attention. See docs/fp8.md.

The convention everywhere: x ~ descale * x_fp8, fp32 descales, e4m3 but for gradients.
"""

from flash8.backends.cpu.study import study
from flash8.fp8.attention import fp8_attention
from flash8.fp8.quantize import Rope, dequantize, descale_of, quantize
from flash8.fp8.recipes import BlockScaling, CurrentScaling, DelayedScaling
from flash8.tensors.descales import block_offsets
from flash8.tensors.hadamard import Rotation
from flash8.tensors.scaled_tensor import ScaledTensor

__all__ = [
    "BlockScaling",
    "CurrentScaling",
    "DelayedScaling",
    "Rope",
    "Rotation",
    "ScaledTensor",
    "block_offsets",
    "dequantize",
    "descale_of",
    "fp8_attention",
    "quantize",
    "study",
]

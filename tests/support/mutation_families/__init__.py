"""Every family of kernels with the cases that its mutants must fail (flash8_sim.mutate).

A mutant fails where a launch has a finding, where results are not the bits of the unchanged kernel,
and where another number of bytes is loaded: a tile that is computed twice gives the same bits. The
unchanged kernel is held to its reference once. A mutant takes about a second.
"""

from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.qkv_variants import QkvVariant
from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8_sim.mutate import Mutation, mutations

from .backward import Backward
from .decode import Decode
from .forward import Forward
from .gemm import Gemm
from .qkv import Qkv
from .quantizers import Quantizer

Family = Forward | Backward | Decode | Quantizer | Gemm | Qkv

FAMILIES: tuple[Family, ...] = (
    Forward("forward_16bit", ForwardVariant("bf16", 64, 64, mask="causal")),
    Forward("forward_fp8", ForwardVariant("e4m3", 64, 64, mask="causal", scales="head")),
    Forward(
        "forward_fp8_v_colmajor",
        ForwardVariant("e4m3", 64, 64, mask="causal", scales="head", v_colmajor=True),
    ),
    Forward("forward_16bit_cluster", ForwardVariant("bf16", 64, 64, cluster=True)),
    Forward("forward_fp8_cluster", ForwardVariant("e4m3", 64, 64, scales="head", cluster=True)),
    Forward("forward_widened", ForwardVariant("bf16", 64, 64, mask="causal", cache="e4m3")),
    Backward("backward_16bit", BackwardVariant("bf16", 128, 128, mask="causal")),
    Decode("decode_fp8", DecodeVariant("bf16", "e4m3", 128, 128, 8)),
    Decode("decode_16bit", DecodeVariant("bf16", "same", 128, 128, 8)),
    Decode("decode_gather", DecodeVariant("bf16", "e4m3", 128, 128, 8, load="gather")),
    Decode("decode_append", DecodeVariant("bf16", "same", 128, 128, 8, append=True)),
    Decode("decode_team", DecodeVariant("bf16", "e4m3", 64, 512, 16, qv=True)),
    Decode("decode_key_scales", DecodeVariant("bf16", "e4m3", 128, 128, 8, scales="key")),
    Quantizer("quantize_cast", QuantizeVariant("cast", "bf16", 64)),
    Quantizer("quantize_cast_v_colmajor", QuantizeVariant("cast", "bf16", 64, v_colmajor=True)),
    Quantizer("quantize_amax", QuantizeVariant("amax", "bf16", 64)),
    Quantizer("quantize_mean", QuantizeVariant("mean", "bf16", 64)),
    Quantizer("quantize_mean_finish", QuantizeVariant("mean_finish", "fp32", 64)),
    Quantizer("append", AppendVariant("bf16")),
    Quantizer("append_to_e4m3", AppendVariant("bf16", "e4m3")),
    Quantizer("quantize_matrix", QuantizeMatrixVariant("bf16", "rms_norm")),
    Gemm("gemm_block", GemmVariant("block", 128, 128)),
    Gemm("gemm_grouped", GemmVariant("block", 128, 128, grouped=True)),
    Gemm("gemm_grouped_k", GemmVariant("block", 128, 128, grouped_k=True)),
    Gemm("gemm_cluster", GemmVariant("block", 128, 128, cluster=True)),
    Gemm("gemm_small_m", GemmVariant("block", 16, 64, small_m=True)),
    Gemm("gemm_quantizing", GemmVariant("block", 16, 64, small_m=True, a="bf16")),
    Qkv("qkv_projection", QkvVariant("block")),
)

#: Families of the same kernel. A mutant of both has the same synchronizing statements around it,
#: and where it survives both lists would say the same: the reason stands in that of the first.
FOUNDED_ON = {
    "forward_widened": ("forward_16bit",),
    "decode_16bit": ("decode_fp8",),
    "decode_gather": ("decode_fp8",),
    "decode_append": ("decode_fp8",),
    "decode_team": ("decode_fp8",),
    "decode_key_scales": ("decode_fp8", "decode_gather"),
    "gemm_grouped": ("gemm_block",),
    "gemm_grouped_k": ("gemm_block", "gemm_grouped"),
    "gemm_cluster": ("gemm_block",),
    "gemm_quantizing": ("gemm_small_m",),
}


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def own_mutants(of: Family) -> list[Mutation]:
    """Those that no family has which this one is founded on."""
    others = {m.id for name in FOUNDED_ON.get(of.name, ()) for m in mutations(family(name).ptx())}
    return [m for m in mutations(of.ptx()) if m.id not in others]

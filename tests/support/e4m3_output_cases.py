"""Forward kernels whose output is e4m3, on the simulated device, and what is right for them."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import gemm
from flash8.backends.hopper.variants import ForwardVariant
from flash8.compiler import Unit, compile_unit
from forward_cases import device, poisoned, reference
from forward_launch import Call, ForwardKernel, Launch, Schedule
from fp8_forward_cases import changed_sources

E4M3 = torch.float8_e4m3fn
CHANNELS = 128  # that share a scale
FP8 = ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", out="e4m3")
BF16 = ForwardVariant("bf16", 128, 128, mask="causal", out="e4m3")
ROW = "forward/e4m3_row.cuh"
EPILOGUE = "forward/epilogue.cuh"

#: An edit of the PTX: the last maximum of a quad, from which the scale is made.
LARGEST_OF_TWO_LANES = (
    rb"max\.u32\s+(%r\d+), (%r\d+), %r\d+;(\s+mov\.b32\s+%f\d+, \1;)",
    rb"mov.u32 \1, \2;\3",
)
#: A kernel that writes O in fp32 to where its scales would be, (rows, heads, head_dim_v).
IN_FP32 = (
    (EPILOGUE, "head * E4m3Row<Config>::kScales;", "head * Config::kHeadDimV;"),
    (
        ROW,
        "        bool const finds_scales = out_scale.ptr != nullptr;\n",
        """#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
#pragma unroll
            for (int j = 0; j < kValues; ++j) {
                int const half = 8 * (j / 2) + 2 * lane + j % 2;
                if (inside) {
                    scales[kChunk * i + (Config::kFp8 ? kValues * lane + j : half)] =
                        o(index(i, r, j));
                }
            }
        }
        return;
        bool const finds_scales = true;
""",
    ),
)


class Quantized(NamedTuple):
    """Bytes of O (..., heads, head_dim_v), scales (tokens, heads * head_dim_v / 128), LSE."""

    data: Tensor
    scale: Tensor
    lse: Tensor

    def real(self) -> Tensor:
        """What data and scales stand for, in data's shape."""
        values = self.data.view(E4M3).float()
        return (values.reshape(-1, CHANNELS) * self.scale.reshape(-1, 1)).view(values.shape)


class E4m3Kernel(ForwardKernel):
    """A compiled variant with an e4m3 output, loaded by a driver."""

    def quantize(
        self,
        call: Call,
        schedule: Schedule | None = None,
        *,
        out_scale: float | None = None,
        gap: int = 0,
        channels: int = CHANNELS,
    ) -> Quantized:
        """Every byte of data and scales was NaN before the launch. gap: bytes between heads of O,
        and twice as many between rows, a multiple of 16. channels: that share a scale."""
        given = Launch(self._driver)
        params = self.describe(given, call)
        *lead, heads, _ = call.q.shape
        width = call.v.shape[-1]
        row = heads * (width + gap) + 2 * gap
        tokens = torch.Size(lead).numel()
        memory = torch.full((tokens * row,), 0x7F, dtype=torch.uint8)
        batch_strides = (lead[-1] * row,) * (len(lead) - 1)
        strides = (*batch_strides, row, width + gap, 1)
        data = memory.as_strided((*lead, heads, width), strides)
        data_memory = given.upload(memory)
        params.o = (data_memory.address, *((0,) if len(lead) == 1 else ()), *strides[:-1])
        params.o_type = type(params.o_type).UINT8
        scale = torch.full((tokens, heads * width // channels), float("nan"))
        scale_memory = given.upload(scale)
        if out_scale is None:
            params.out_scale = (scale_memory.address, 0, scale.shape[1])
        else:
            params.out_scale = (0, given.upload(torch.tensor([out_scale])).address, 0)
        lse, lse_memory = self.lse(given, params, call)
        self.run(given, params, schedule or Schedule())
        found = data_memory.read(memory)
        between = torch.ones_like(memory, dtype=torch.bool)
        between.as_strided(data.shape, strides).fill_(False)
        assert (found[between] == 0x7F).all(), "written between rows"
        return Quantized(
            found.as_strided(data.shape, strides).contiguous(),
            scale_memory.read(scale),
            lse_memory.read(lse),
        )


@functools.cache
def kernel(variant: ForwardVariant) -> E4m3Kernel:
    return E4m3Kernel(device().driver, device().ptx(variant))


def launch(variant: ForwardVariant, call: Call, *, seed: int = 0, **given) -> Quantized:
    device().configure(seed=seed)
    try:
        return kernel(variant).quantize(call, **given)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error


def changed(folder: Path, variant: ForwardVariant, *edits: tuple[str, str, str]) -> E4m3Kernel:
    """The kernel compiled from sources with (file, old, new) edits."""
    root = changed_sources(folder, *edits)
    unit = Unit(root / "forward" / "kernel.cu", variant.defines, "changed")
    return E4m3Kernel(device().driver, compile_unit(unit).ptx.read_bytes() + b"\0")


def compare(call: Call, found: Quantized, *, finds_scales: bool = True) -> None:
    """Half a step of e4m3 beside float64, where P and V are exact; what kernels differ by, too."""
    exact, exact_lse = reference(call)
    o = found.real()
    assert not o.isnan().any(), "a row was not written, or NaN leaked"
    empty = (exact_lse == -torch.inf).transpose(-1, -2)
    assert torch.equal(found.lse == -torch.inf, exact_lse == -torch.inf)
    assert not found.data[empty].any(), "a row without keys is not zero"
    error = (o.double() - exact).norm(dim=-1)[~empty] / exact.norm(dim=-1)[~empty]
    assert error.numel() == 0 or error.max() < 0.09, f"a row is off by {float(error.max())}"
    if finds_scales:
        check_scales(found)


def check_scales(found: Quantized) -> None:
    """A scale is the largest magnitude by 448, and that of zeros is 1."""
    groups = found.data.view(E4M3).float().reshape(*found.scale.shape, CHANNELS).abs().amax(-1)
    assert torch.equal(groups == 448.0, groups > 0.0)
    assert (found.scale[groups == 0.0] == 1.0).all()


def check(variant: ForwardVariant, call: Call, *, seeds=(0, 1, 2), **given) -> Quantized:
    """Of a correct call: the same bits under every schedule, close to float64."""
    call = poisoned(call)
    found = launch(variant, call, seed=seeds[0], **given)
    out_scale = given.get("out_scale")
    if out_scale is None:
        compare(call, found)
    else:
        compare(call, spread(found, out_scale), finds_scales=False)
    for seed in seeds[1:]:
        again = launch(variant, call, seed=seed, **given)
        assert all(same(a, b) for a, b in zip(found, again, strict=True)), f"seed {seed}"
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, of NaN too."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def spread(found: Quantized, out_scale: float) -> Quantized:
    """With the given scale in the place of those that a kernel has not written."""
    assert found.scale.isnan().all(), "a scale was written beside the given one"
    return found._replace(scale=torch.full_like(found.scale, out_scale))


def as_bits(data: Tensor) -> Tensor:
    return data.view(torch.uint8)


def quantized(o: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and scales of O (..., heads, head_dim_v) in fp32, by the portable quantizer."""
    data, scale = gemm.quantize(o.reshape(-1, o.shape[-2] * o.shape[-1]), "1x128")
    return as_bits(data).view(o.shape), scale


def in_fp32(writes_fp32: E4m3Kernel, call: Call) -> Tensor:
    """O in fp32, by a kernel changed by IN_FP32."""
    device().configure(seed=0)
    found = writes_fp32.quantize(call, channels=1)
    return found.scale.view(*call.q.shape[:-1], call.v.shape[-1])


def wide(variant: ForwardVariant) -> ForwardVariant:
    """The same kernel with an output of 16 bits."""
    return replace(variant, out="wide")

"""Which backend serves which call on this machine, and why: what `flash8 info` prints."""

from dataclasses import dataclass

import torch

from flash8.backends import torch_gemm
from flash8.backends.hopper import mode


@dataclass(frozen=True)
class Service:
    """One row of `flash8 info`: a kind of call, the backend that serves it, and why."""

    call: str
    backend: str
    reason: str


def describe_mode() -> str:
    """What FLASH8_KERNELS is here, and what follows from it."""
    chosen = mode.kernels_mode()
    meaning = {
        "require": "as with auto; a call that no kernel can serve is an error",
        "auto": "on devices of compute capability 9.0, each once it has passed its check there",
        "on": "on every CUDA device, unchecked",
        "off": "never",
    }
    return f"{chosen} (FLASH8_KERNELS): {meaning[chosen]}"


def describe() -> list[Service]:
    """Which backend serves training, prefill and decode on this machine, and why."""
    portable = "tiled PyTorch, memory linear in seqlen"
    compiled = "torch's compiled attention where it can, else tiled PyTorch"
    rows = [
        Service("CPU tensors, training, fp32 / fp16 / bf16", "cpu", compiled),
        Service("CPU tensors, training, fp64, FP8 (fp8_attention)", "cpu", portable),
        Service("CPU tensors, prefill and decode over 16-bit caches", "cpu", compiled),
        Service("CPU tensors, prefill and decode over e4m3 caches", "cpu", portable),
        Service(
            "CPU tensors, gemm.scaled_mm of e4m3, grouped too, and gemm.qkv_projection",
            "cpu",
            "products of torch in fp32",
        ),
    ]
    if torch_gemm.choice() == "torch":
        reason = "FLASH8_GEMM=torch: torch._scaled_mm, checked once per process"
        rows.append(Service("CPU tensors, gemm.scaled_mm by tensor or row", "torch", reason))
    if torch.cuda.is_available():
        rows += _describe_cuda(torch.cuda.get_device_name())
    else:
        reason = "torch sees no CUDA device"
        rows.append(Service("CUDA tensors, every call", "none", reason))
    return rows


def serving() -> list[str]:
    """The kernels that have served calls of this process, in the order in which calls first wanted
    them: forward_bf16_d128_causal, backward_bf16_d128_causal. Empty where the portable code alone
    serves; a call of attention of which no kernel is listed went there."""
    from flash8.backends.hopper import kernels
    from flash8.backends.hopper.verify import trust

    return [variant.name for variant in kernels.wanted() if trust.has_passed(variant)]


def _describe_cuda(name: str) -> list[Service]:
    portable = f"{name}: the tiled PyTorch code runs there too"
    index, chosen = torch.cuda.current_device(), mode.kernels_mode()
    reason = mode.why_not(index)
    if reason is not None:
        every = Service("CUDA tensors, every call", "cpu", f"{portable}; {reason}")
        return [*_describe_torch_gemm(index), every]
    if chosen == "require" and (missing := mode.unfit(index)) is not None:
        needs = f"FLASH8_KERNELS=require: an error, since {missing}"
        return [Service("CUDA tensors, training, prefill and decode", "none", needs)]
    checked = "unchecked" if chosen == "on" else "checked once per process"
    kernel = f"{name}: FLASH8_KERNELS={chosen}; compiled when first used, {checked}"
    return [
        Service("CUDA tensors, training, fp16 / bf16", "hopper", kernel),
        Service("CUDA tensors, training, FP8 (fp8_attention)", "hopper", kernel),
        Service("CUDA tensors, prefill, fp16 / bf16 / e4m3, pages", "hopper", kernel),
        Service("CUDA tensors, decode over 16-bit and e4m3 caches", "hopper", kernel),
        Service("CUDA tensors, fp8.quantize, append to a KV cache", "hopper", kernel),
        Service(
            "CUDA tensors, gemm.scaled_mm of e4m3, grouped too, operands, gemm.qkv_projection",
            "hopper",
            kernel,
        ),
        *_describe_torch_gemm(index),
        Service("CUDA tensors, every other call", "cpu", portable),
    ]


def _describe_torch_gemm(index: int) -> list[Service]:
    reason = torch_gemm.describe(index)
    call = "CUDA tensors, gemm.scaled_mm by tensor or row"
    return [] if reason is None else [Service(call, "torch", reason)]

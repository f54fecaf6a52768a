"""The quantizer on CUDA tensors against the CPU, bit by bit. Needs a GPU: `pytest -m gpu`.

With FLASH8_KERNELS=off torch operations serve it, with on the kernels; with auto the kernels do
where they pass their check.
"""

import pytest
import torch
from torch import Tensor

import flash8
from flash8 import fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LENGTHS = (130, 0, 1, 256, 0, 200)


def draw(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    x.view(-1)[seed % 7 :: 1001] *= 100.0
    return x


def tables(rotary_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(400)[:, None] * torch.rand(rotary_dim // 2)
    return angles.cos(), angles.sin()


def to_gpu(value):
    if isinstance(value, Tensor):
        return value.cuda()
    return type(value)(*map(to_gpu, value)) if isinstance(value, fp8.Rope) else value


def raw(x: Tensor) -> Tensor:
    return torch.where(x.float().isnan(), 0x7F, x.view(torch.uint8)).cpu()


def check(x: Tensor, granularity: str, **options) -> None:
    want = fp8.quantize(x, granularity, **options)
    on_gpu = {name: to_gpu(value) for name, value in options.items()}
    have = fp8.quantize(x.cuda(), granularity, **on_gpu)
    assert torch.equal(have.descale.cpu(), want.descale)
    assert torch.equal(raw(have.data), raw(want.data))
    if want.mean is not None:
        assert torch.equal(have.mean.cpu(), want.mean)


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("granularity", ["tensor", "head", "block", "page"])
@pytest.mark.parametrize("hadamard", [None, 3])
def test_dense(granularity: str, d: int, hadamard: int | None) -> None:
    x = draw(2, 300, 3, d)
    check(x, granularity, hadamard=hadamard)
    if granularity != "page":
        used = torch.tensor([300, 20], dtype=torch.int32)
        check(x, granularity, hadamard=hadamard, v_colmajor=True, seqused=used)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("v_colmajor", [True, False])
def test_packed_with_every_step(interleaved: bool, v_colmajor: bool) -> None:
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    check(
        draw(int(offsets[-1]) + 9, 2, 128),
        "block",
        cu_seqlens=offsets,
        rope=fp8.Rope(*tables(64), torch.arange(6).int() * 10, interleaved),
        smooth_k=torch.randn(6, 2, 128),
        hadamard=5,
        v_colmajor=v_colmajor,
    )


def test_special_values() -> None:
    given = torch.tensor([1.0, -2.0, float("inf"), float("nan"), 1e-40, 3e38, 0.0])
    x = given[torch.randint(len(given), (1, 300, 2, 64))]
    for granularity in ("tensor", "block"):
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            check(x, granularity, dtype=dtype)
            check(torch.full_like(x, 1e-38), granularity, dtype=dtype)


def test_a_mean_of_its_own() -> None:
    x = draw(2, 1000, 3, 128) + 5.0
    want = fp8.quantize(x, "block", smooth_k=True, hadamard=1)
    have = fp8.quantize(x.cuda(), "block", smooth_k=True, hadamard=1)
    torch.testing.assert_close(have.mean.cpu(), want.mean, rtol=1e-5, atol=1e-4)
    error = fp8.dequantize(have).cpu() - fp8.dequantize(want)
    assert error.norm() / fp8.dequantize(want).norm() < 1e-3


def test_delayed_scaling_gathers_amax() -> None:
    x, descale = draw(2, 200, 2, 128), torch.tensor(0.003)
    amax = torch.zeros(())
    want = fp8.quantize(x, descale=descale, amax=amax)
    on_gpu = torch.zeros((), device="cuda")
    have = fp8.quantize(x.cuda(), descale=descale.cuda(), amax=on_gpu)
    assert torch.equal(raw(have.data), raw(want.data))
    assert on_gpu.item() == amax.item()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_append_into_pages(dtype: torch.dtype) -> None:
    q, k, v = draw(2, 20, 4, 64), draw(2, 20, 2, 64, seed=1), draw(2, 20, 2, 64, seed=2)
    caches = [torch.zeros(16, 16, 2, 64).to(dtype) for _ in range(2)]
    on_gpu = [x.cuda() for x in caches]
    cos, sin = tables(32)
    options = {
        "cache_seqlens": torch.tensor([13, 90], dtype=torch.int32),
        "page_table": torch.randperm(16).view(2, 8).int(),
        "rotary_cos": cos,
        "rotary_sin": sin,
    }
    if dtype == torch.float8_e4m3fn:
        options |= {
            "k_descale": torch.rand(16, 2, 1) * 0.05 + 0.01,
            "v_descale": torch.rand(16, 2, 1) * 0.05 + 0.01,
            "k_mean": torch.randn(2, 64),
        }
    flash8.flash_attn_with_kvcache(q, *caches, k, v, causal=True, **options)
    given = {name: x.cuda() for name, x in options.items()}
    flash8.flash_attn_with_kvcache(q.cuda(), *on_gpu, k.cuda(), v.cuda(), causal=True, **given)
    for have, want in zip(on_gpu, caches, strict=True):
        assert torch.equal(have.cpu().view(torch.uint8), want.view(torch.uint8))

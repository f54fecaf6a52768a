"""The public API on CUDA tensors, whatever serves it there. Needs a GPU: `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor

import flash8
from flash8 import fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (113, 203), (128, 128), (257, 127)])
def test_dense_matches_the_cpu(
    seqlen_q: int, seqlen_k: int, causal: bool, dtype: torch.dtype, bound: float
) -> None:
    q, k, v = draw(2, seqlen_q, 6, 64, seed=0), *(draw(2, seqlen_k, 2, 64, seed=s) for s in (1, 2))
    exact = [x.to(dtype).double().requires_grad_() for x in (q, k, v)]
    expected = flash8.flash_attn_func(*exact, causal=causal)
    dout = draw(*expected.shape, seed=3).to(dtype)
    expected_gradients = torch.autograd.grad(expected, exact, dout.double())
    given = [x.to(dtype).cuda().requires_grad_() for x in (q, k, v)]
    actual = flash8.flash_attn_func(*given, causal=causal)
    gradients = torch.autograd.grad(actual, given, dout.cuda())
    assert relative_error(actual.detach(), expected.detach()) < bound
    for name, have, want in zip("qkv", gradients, expected_gradients, strict=True):
        if want.norm() > 0:
            assert relative_error(have, want) < 2 * bound, f"d{name}"


def test_packed_sequences_match_the_cpu() -> None:
    lengths = [5, 0, 130, 1, 64]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q, k, v = (draw(200, 4, 128, seed=s).to(torch.bfloat16) for s in range(3))
    arguments = {"max_seqlen_q": 130, "max_seqlen_k": 130, "causal": True}
    packed = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    expected = flash8.flash_attn_varlen_func(
        q.double(), k.double(), v.double(), **packed, **arguments
    )
    on_gpu = {name: x.cuda() for name, x in packed.items()}
    actual = flash8.flash_attn_varlen_func(q.cuda(), k.cuda(), v.cuda(), **on_gpu, **arguments)
    assert relative_error(actual, expected) < 1e-2


@pytest.mark.parametrize("v_colmajor", [False, True])
@pytest.mark.parametrize("granularity", ["head", "block"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fp8_matches_the_cpu(head_dim: int, granularity: str, v_colmajor: bool) -> None:
    q, k, v = (draw(2, 300, heads, head_dim, seed=s).float() for s, heads in enumerate((4, 2, 2)))
    choices = ({}, {"smooth_k": True}, {"smooth_v": True, "v_colmajor": v_colmajor})
    inputs = list(zip((q, k, v), choices, strict=True))
    scaled = [fp8.quantize(x, granularity, **chosen) for x, chosen in inputs]
    expected, expected_lse = flash8.flash_attn_func(*scaled, causal=True, return_attn_probs=True)
    on_gpu = [fp8.quantize(x.cuda(), granularity, **chosen) for x, chosen in inputs]
    actual, lse = flash8.flash_attn_func(*on_gpu, causal=True, return_attn_probs=True)
    assert relative_error(actual, expected) < 0.035
    assert (lse.cpu() - expected_lse).abs().max() < 1e-3


def test_fp8_stays_accurate_over_many_keys() -> None:
    """V of mean 0.5: an accumulator that is never promoted is off by 0.46 at 131,072 keys."""
    q, k, v = (draw(1, n, 1, 128, seed=s).float() for s, n in enumerate((128, 131072, 131072)))
    scaled = [fp8.quantize(x.cuda(), "head") for x in (q, k, v + 0.5)]
    actual = flash8.flash_attn_func(*scaled)
    exact = [fp8.dequantize(x).double() for x in scaled]
    s = exact[0][0, :, 0] @ exact[1][0, :, 0].T * 128**-0.5
    expected = s.softmax(dim=-1) @ exact[2][0, :, 0]
    assert relative_error(actual[0, :, 0], expected.cpu()) < 0.005

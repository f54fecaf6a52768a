"""The public API on CUDA tensors, whatever serves it there. Needs a GPU: `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor

import flash8

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

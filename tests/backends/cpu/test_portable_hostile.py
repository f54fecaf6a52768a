"""The portable code on indices that nobody has looked at (on CUDA): it reads nothing outside."""

import pytest
import torch

from cases import int32
from flash8.backends.cpu import append as portable_append
from flash8.backends.cpu import quantize as portable
from flash8.call.request import Appended, Request
from flash8.tensors import v_colmajor
from flash8.tensors.float8 import E4M3
from flash8.tensors.rotary import Rope
from flash8.tensors.tokens import Tokens

MOST, LEAST = 2**31 - 1, -(2**31)
OFFSETS = [[0, 130, 20, 133], [200, 133, 20, 0], [0, MOST, LEAST, MOST], [60, 70, 133, 190]]


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 2, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_v_colmajor_values(offsets):
    data = rows(200).to(E4M3)
    tokens = Tokens(int32(offsets))
    transposed = v_colmajor.to_colmajor(data, tokens)
    assert v_colmajor.from_colmajor(transposed, 200, tokens).shape == data.shape


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_quantization(offsets, granularity):
    tables = torch.ones(50, 16)
    rope = Rope(tables, tables, int32([MOST, LEAST, -3]), True)
    request = Request(rows(200), granularity, E4M3, rope=rope, cu_seqlens=int32(offsets))
    data, descale, _ = portable.quantize(request)
    assert data.shape == (200, 2, 32) and descale.isfinite().all()


@pytest.mark.parametrize("values", [[MOST, LEAST, -1], [-3, 7, 99]], ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_appended_rows(values, paged):
    cache = rows(3, 16 if paged else 140).to(E4M3)
    descale = torch.ones(3, 2, 1 if paged else 2)
    table = torch.tensor([[0, MOST], [LEAST, 1], [2, -1]]).int() if paged else None
    appended = Appended(
        cache, rows(3, 4), int32(values), None, table, int32(values[::-1]), descale, None, None
    )
    assert portable_append.quantize(appended).shape == (3, 4, 2, 32)

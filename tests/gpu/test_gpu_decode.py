"""A KV cache on a GPU, whatever serves it there: decoding, pages, graphs that are replayed."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flash8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
E4M3 = torch.float8_e4m3fn
LENGTHS = (1, 0, 64, 1000, 77)
LONGEST = 1024
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


class Step:
    """Queries and a cache, dense or in pages in a mixed order, with NaN where no key is."""

    def __init__(
        self, dtype: torch.dtype, cache: torch.dtype, page_size: int, queries: int, heads: int
    ) -> None:
        batch, head_dim = len(LENGTHS), 128
        self.q = draw(batch, queries, heads, head_dim, seed=0).to(dtype)
        self.caches = [draw(batch, LONGEST, 2, head_dim, seed=s).to(cache) for s in (1, 2)]
        self.given: dict[str, Any] = {"cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32)}
        self.given["causal"] = True
        if cache == E4M3:
            self.given["k_descale"] = torch.full((batch, 2), 0.5)
            self.given["v_descale"] = torch.full((batch, 2), 2.0)
        self.page_size = page_size

    def expected(self) -> tuple[Tensor, Tensor]:
        """Of float64 tensors, by the portable code."""
        k, v = (x.double() for x in self.caches)
        if "k_descale" in self.given:
            k, v = k * 0.5, v * 2.0
        options = {name: self.given[name] for name in ("cache_seqlens", "causal")}
        found = flash8.flash_attn_with_kvcache(
            self.q.double(), k, v, **options, return_softmax_lse=True
        )
        return found[0], found[1]

    def on_gpu(self) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        caches = [self._unused_is_nan(x) for x in self.caches]
        given = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in self.given.items()}
        if self.page_size:
            pages = LONGEST // self.page_size
            order = torch.randperm(len(LENGTHS) * pages, generator=torch.Generator().manual_seed(3))
            split = [x.reshape(-1, self.page_size, *x.shape[2:]) for x in caches]
            caches = [torch.empty_like(x) for x in split]
            for mixed, x in zip(caches, split, strict=True):
                mixed.view(torch.uint8)[order] = x.view(torch.uint8)
            table = order.view(len(LENGTHS), pages).to(torch.int32)
            given["page_table"] = table.cuda()
        return self.q.cuda(), [x.cuda() for x in caches], given

    def _unused_is_nan(self, x: Tensor) -> Tensor:
        wide = x.float()
        for b, length in enumerate(LENGTHS):
            wide[b, length:] = torch.nan
        return wide.to(x.dtype)


@pytest.mark.parametrize("page_size", [0, 64, 16, 1])
@pytest.mark.parametrize("cache", [None, E4M3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "heads"), [(1, 16), (4, 8), (40, 14)])
def test_a_cache_matches_the_cpu(
    queries: int, heads: int, dtype: torch.dtype, cache: torch.dtype | None, page_size: int
) -> None:
    """Up to 16 rows of a KV head, and 280: by decoding, or by the forward kernel."""
    step = Step(dtype, cache or dtype, page_size, queries, heads)
    expected, expected_lse = step.expected()
    q, caches, given = step.on_gpu()
    actual, lse = flash8.flash_attn_with_kvcache(q, *caches, **given, return_softmax_lse=True)[:2]
    assert relative_error(actual, expected) < BOUND[dtype]
    seen = expected_lse.isfinite()
    assert (lse.cpu()[seen] - expected_lse[seen]).abs().max() < 1e-2
    assert torch.equal(lse.cpu().isfinite(), seen)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("cache", [torch.bfloat16, E4M3])
def test_a_replayed_graph_takes_the_lengths_of_its_day(cache: torch.dtype, planned: bool) -> None:
    """With the scheduler metadata of each, too."""
    step = Step(torch.bfloat16, cache, 16, 1, 16)
    q, caches, given = step.on_gpu()
    lengths = given["cache_seqlens"]
    sizes = (len(LENGTHS), 1, LONGEST, 16, 2, 128, lengths, cache)
    if planned:
        given["scheduler_metadata"] = flash8.get_scheduler_metadata(
            *sizes, page_size=16, causal=True
        )
    if q.device.type != "cuda":  # recorded on the CPU
        flash8.flash_attn_with_kvcache(q, *caches, **given)
        return
    lengths.fill_(1)
    for _ in range(2):  # compiled, checked, planned
        flash8.flash_attn_with_kvcache(q, *caches, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if planned:
            metadata = given["scheduler_metadata"]
            flash8.get_scheduler_metadata(*sizes, page_size=16, causal=True, out=metadata)
        out = flash8.flash_attn_with_kvcache(q, *caches, **given)
    lengths.copy_(torch.tensor(LENGTHS))
    for _ in range(2):  # counters are zero again
        graph.replay()
        assert relative_error(out, step.expected()[0]) < 1e-2

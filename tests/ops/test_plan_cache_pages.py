"""The plan caches of calls over pages and over a cache that the forward kernel serves."""

import pytest
import torch

from flash8 import flash_attn_varlen_func, flash_attn_with_kvcache
from plan_cache_cases import addresses, clear, draw
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]


def test_lengths_that_are_an_int_are_made_for_each_launch(fake, on_fake_driver, misses):
    q, k, v = draw()
    held = []
    for length in (40, 40, 9):
        flash_attn_with_kvcache(q, k, v, cache_seqlens=length, causal=True)
        held += addresses(fake.parameter(len(fake.launches) - 1), "sequences.seqused_k")
    assert len(misses) == 3 and 0 not in held


@pytest.mark.parametrize("rows", [3, 40])
def test_a_call_over_pages_is_a_hit_of_its_kernel(rows, fake, on_fake_driver, misses):
    """flash_attn_varlen_func, as vLLM calls it: decode or forward, as many rows as there are."""
    for seed in range(3):
        q, k, v = draw(seed)
        q = q[:, :rows].flatten(0, 1)
        pages = (x.reshape(10, 8, 2, 128) for x in (k, v))
        table = torch.randperm(10).view(2, 5).int()
        ends = torch.tensor([0, rows, 2 * rows], dtype=torch.int32)
        lengths = torch.tensor([40, 3 + seed], dtype=torch.int32)
        given = dict(seqused_k=lengths, page_table=table, causal=True)
        flash_attn_varlen_func(q, *pages, ends, None, rows, 40, **given)
    assert misses == ["launch"]
    assert {launch.split()[0] for launch in fake.launches} == {"decode" if rows == 3 else "forward"}
    assert len(fake.launches) == 3


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
def test_gradients_over_pages_are_those_of_a_miss(on_simulated_device, misses):
    """No kernel makes them: the portable backward does, of what a launch by a plan has saved."""

    def gradients(seed):
        q, k, v = draw(seed)
        leaves = [q, *(x.reshape(10, 8, 2, 128) for x in (k, v))]
        leaves = [x.requires_grad_() for x in leaves]
        out = flash_attn_varlen_func(
            *(*leaves, None, None, None, None),
            seqused_k=torch.tensor([40, 9], dtype=torch.int32),
            page_table=torch.arange(10, dtype=torch.int32).view(2, 5),
            causal=True,
        )
        return torch.autograd.grad(out.float().square().sum(), leaves)

    gradients(0)
    found = gradients(1)
    assert misses == ["launch"]
    clear()
    for a, b in zip(found, gradients(1), strict=True):
        assert torch.equal(a, b) and a.any()

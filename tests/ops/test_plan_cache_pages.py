"""The plan caches of calls over pages and over a cache that the forward kernel serves."""

import pytest
import torch

from flash8 import _native, flash_attn_varlen_func, flash_attn_with_kvcache
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


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [3, 40])
def test_a_call_over_pages_is_a_hit_of_its_kernel(rows, cache, fake, on_fake_driver, misses):
    """flash_attn_varlen_func, as vLLM calls it: decode or forward, as many rows as there are."""
    for seed in range(3):
        q, k, v = draw(seed)
        q = q[:, :rows].flatten(0, 1)
        pages = (x.reshape(10, 8, 2, 128).to(cache) for x in (k, v))
        table = torch.randperm(10).view(2, 5).int()
        ends = torch.tensor([0, rows, 2 * rows], dtype=torch.int32)
        lengths = torch.tensor([40, 3 + seed], dtype=torch.int32)
        given = dict(seqused_k=lengths, page_table=table, causal=True)
        if cache != q.dtype:
            given |= {f"{x}_descale": torch.rand(2, 2) for x in "kv"}
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


@pytest.mark.parametrize("lengths", [torch.tensor([40, 9]), 17])
def test_a_backward_reads_the_lengths_that_the_forward_read(lengths, on_fake_driver):
    """Which are made of those that are int64, or an int."""
    q, k, v = (x.requires_grad_() for x in draw(rows=80))
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
    indices = [x for x in out.grad_fn.saved_tensors if x is not None and x.shape == (2,)]
    assert [x.dtype for x in indices] == [torch.int32]
    assert indices[0].tolist() == ([17, 17] if isinstance(lengths, int) else [40, 9])


@pytest.mark.parametrize("rows", [1, 40])
def test_an_output_that_was_saved_is_not_overwritten_unseen(rows, on_fake_driver):
    q, k, v = draw()
    out, factor = torch.zeros(2, rows, 4, 128).bfloat16(), torch.ones(1, requires_grad=True)
    lengths = torch.tensor([40, 9], dtype=torch.int32)
    given = dict(cache_seqlens=lengths, causal=True, out=out)
    for again in range(3):  # a miss, and hits
        loss = (factor * out).sum()
        flash_attn_with_kvcache(q[:, :rows], k, v, **given)
        assert out._version == again + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_dense_e4m3_cache_under_a_16_bit_q_is_a_hit(fake, on_fake_driver, misses):
    for seed in range(3):
        q, k, v = draw(seed)
        cache = (x.to(torch.float8_e4m3fn) for x in (k, v))
        given = {f"{x}_descale": torch.rand(2, 2) for x in "kv"}
        lengths = torch.tensor([40, seed], dtype=torch.int32)
        flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths, causal=True, **given)
        found = addresses(fake.parameter(seed), "k_descale", "v_descale")
        assert found == [given["k_descale"].data_ptr(), given["v_descale"].data_ptr()]
    assert misses == ["launch"]


def test_errors_of_a_hit_have_the_types_of_a_miss(fake, on_fake_driver):
    q, k, v = draw()
    given = dict(cache_seqlens=torch.tensor([40, 9], dtype=torch.int32))
    flash_attn_with_kvcache(q[:, :1], k, v, **given)
    fake.fail("cuLaunchKernelEx", 700)
    with pytest.raises(_native.DriverError) as caught:
        flash_attn_with_kvcache(q[:, :1], k, v, **given)
    assert caught.value.code == 700

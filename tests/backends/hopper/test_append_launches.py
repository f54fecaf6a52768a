"""What a call with new keys asks of the device: two launches, and nothing of torch."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import cumulative, int32
from flash8 import backends, flash_attn_with_kvcache
from flash8.append import NewKeys
from flash8.ops import attention as ops
from flash8.tensors.float8 import E4M3
from quantizer_cases import draw, tables

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

HEADS, HEADS_KV, WIDTH = 8, 2, 64


class Seen(TorchDispatchMode):
    """What torch is asked for that runs on a device: no allocations, and no views."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if not func.is_view and "empty" not in name:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unread(monkeypatch):
    """CPU tensors whose values are as far away as those of a GPU."""
    monkeypatch.setattr(NewKeys, "_check_positions", lambda *_: None)
    monkeypatch.setattr(ops, "check_indices", lambda *_: None)


def inputs(dtype=torch.bfloat16, cache=None, packed=False):
    q = draw(3, 2, HEADS, WIDTH, seed=1).to(dtype)
    k, v = (draw(3, 2, HEADS_KV, WIDTH, seed=s).to(dtype) for s in (2, 3))
    held = [draw(12, 16, HEADS_KV, WIDTH, seed=s).to(cache or dtype) for s in (4, 5)]
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return q, *held, k, v


def rotary(dtype=torch.float32):
    """As one tensor with cosines beside sines, which vLLM has."""
    both = torch.cat(tables(32), 1).to(dtype)
    return {"rotary_cos": both[:, :16], "rotary_sin": both[:, 16:]}


PAGED = {"page_table": int32(range(12)).view(3, 4), "cache_batch_idx": int32((2, 0, 1))}
DENSE = {"cache_batch_idx": int32((11, 0, 5)), "cache_leftpad": int32((2, 0, 9))}
PACKED = {
    "cu_seqlens_q": cumulative((1, 0, 5)),
    "cu_seqlens_k_new": cumulative((1, 0, 5)),
    "max_seqlen_q": 5,
}
SCALES = {f"{x}_descale": torch.full((3, HEADS_KV), 0.5) for x in "kv"}
CALLS = {
    "16 bits": (inputs(), {**PAGED, **rotary()}),
    "fp16, tables of its own": (inputs(torch.float16), {**DENSE, **rotary(torch.float16)}),
    "packed": (inputs(packed=True), {**PAGED, **PACKED, **rotary()}),
    "no rotary": (inputs(), PAGED),
    "e4m3": (inputs(cache=E4M3), {**PAGED, **SCALES, **rotary()}),
}


@pytest.mark.usefixtures("on_fake_driver", "unread")
@pytest.mark.parametrize("name", CALLS)
def test_an_append_is_one_launch_and_no_operation_of_torch(fake, name):
    given, options = CALLS[name]
    with Seen() as seen:
        flash_attn_with_kvcache(*given, cache_seqlens=int32((10, 0, 9)), causal=True, **options)
    assert [launch.split()[0] for launch in fake.launches] == ["append", "decode"]
    assert seen.operations == ["flash8.append.default", "flash8.forward.default"]
    copies = ("cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2", "cuStreamSynchronize")
    assert sum(fake.count(copy) for copy in copies) == 0


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_what_is_copied_is_seen(fake):
    """Operations that docs/decode.md names."""
    given, options = CALLS["16 bits"]
    with Seen() as seen:
        flash_attn_with_kvcache(*given, cache_seqlens=10, causal=True, **options)
    assert len(seen.operations) > 2


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_an_append_may_be_captured(fake):
    given, options = CALLS["16 bits"]
    options = {**options, "cache_seqlens": int32((10, 0, 9)), "causal": True}
    flash_attn_with_kvcache(*given, **options)
    before = len(fake.launches)
    fake.capture(True)
    flash_attn_with_kvcache(*given, **options)
    assert len(fake.launches) == 2 * before


LENGTHS = int32((10, 0, 9))


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_a_table_without_pages_is_not_for_kernels(fake):
    """Its address is null, as that of no table is."""
    given, options = CALLS["no rotary"]
    options = {**options, "page_table": options["page_table"][:, :0], "cache_seqlens": LENGTHS}
    backends._warn_of_refusal.cache_clear()
    with (
        pytest.warns(UserWarning, match="the page table lists nothing"),
        pytest.raises(ValueError, match="must leave room for 2 new rows in a cache of 0"),
    ):
        flash_attn_with_kvcache(*given, **options)
    assert [launch for launch in fake.launches if launch.startswith("append")] == []


@pytest.mark.usefixtures("on_fake_driver")
def test_a_cache_at_an_odd_address_is_not_for_kernels(fake):
    """Which a trace cannot see: the op finds it."""
    (q, k_cache, v_cache, k, v), options = CALLS["16 bits"]
    given = {**options, "cache_seqlens": LENGTHS, "causal": True}
    odd = torch.empty(k_cache.numel() + 4, dtype=k_cache.dtype)[4:].view(k_cache.shape)
    odd.copy_(k_cache)
    backends._warn_of_refusal.cache_clear()
    with pytest.warns(UserWarning, match="address is not a multiple of 16"):
        flash_attn_with_kvcache(q, odd, v_cache.clone(), k, v, **given)
    assert [launch for launch in fake.launches if launch.startswith("append")] == []
    assert (odd != k_cache).any()


@pytest.mark.usefixtures("on_fake_driver", "unread")
def test_tables_of_a_type_that_kernels_lack_are_converted(fake):
    (q, *others), options = CALLS["e4m3"]
    given = {**options, **rotary(torch.float64), "cache_seqlens": LENGTHS, "causal": True}
    with contextlib.suppress(ValueError):  # nothing has run, so lengths are anything
        flash_attn_with_kvcache(q.double(), *others, **given)
    assert fake.launches[0].startswith("append")

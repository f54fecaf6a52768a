"""Keys and values that share memory have no tensor map, so the kernel gets a copy of them."""

import pytest
import torch

from flash8 import flash_attn_func, flash_attn_varlen_func
from plan_cache_cases import ENDS, addresses, draw
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

EXPANDED = {
    "a head": lambda x: x[:, :, :1].expand_as(x),
    "a sequence": lambda x: x[:1].expand_as(x),
    "a token": lambda x: x[:, :1].expand_as(x),
    "rows that overlap": lambda x: x.as_strided(x.shape, (x.stride(0), 64, x.stride(1), 1)),
}


@pytest.mark.parametrize("name", EXPANDED)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_kernel_gets_a_copy_of_it_alone(name, place, fake, on_fake_driver):
    tensors = list(draw())
    tensors[place] = EXPANDED[name](tensors[place])
    for launch in range(2):
        flash_attn_func(*tensors)
        pointers = addresses(fake.parameter(launch), "q", "k", "v")
        kept = [p == x.data_ptr() for p, x in zip(pointers, tensors, strict=True)]
        assert kept == [i != place for i in range(3)]


@pytest.mark.parametrize("shape", [(1, 40, 2, 128), (2, 1, 2, 128), (2, 40, 1, 128)])
def test_a_dimension_of_one_needs_no_copy(shape, fake, on_fake_driver):
    """However it was made: expanding such a dimension leaves a stride of zero."""
    q, k, v = draw()
    q = q[: shape[0], :, : 2 * shape[2]]
    step = [0 if n == 1 else s for n, s in zip(shape, k.stride(), strict=True)]
    k, v = (x.as_strided(shape, step) for x in (k, v))
    flash_attn_func(q, k, v)
    assert addresses(fake.parameter(0), "k", "v") == [k.data_ptr(), v.data_ptr()]


#: Of e4m3 under a 16-bit q, which no TMA loads.
WIDENED = {
    **EXPANDED,
    "rows that overlap": lambda x: x.as_strided(x.shape, (x.stride(0), 64, 16, 1)),
}


@pytest.mark.parametrize("name", WIDENED)
def test_keys_that_are_widened_are_read_where_they_lie(name, on_fake_driver, monkeypatch):
    q, k, v = draw()
    k, v = (WIDENED[name](x.to(torch.float8_e4m3fn)) for x in (k, v))
    launched = []
    monkeypatch.setattr("flash8._native.launch_forward", lambda *args: launched.append(args[3]))
    flash_attn_func(q, k, v, pack_gqa=False)
    (call,) = launched
    assert (call.k[0], call.v[0]) == (k.data_ptr(), v.data_ptr())


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("name", WIDENED)
def test_the_kernel_widens_it(name, on_simulated_device):
    q, k, v = draw()
    k, v = (WIDENED[name](x.to(torch.float8_e4m3fn)) for x in (k, v))
    have = flash_attn_func(q, k, v, causal=True)
    want = flash_attn_func(q, k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(have, want)


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("name", EXPANDED)
def test_the_kernel_attends_to_it(name, on_simulated_device):
    q, k, v = draw()
    k, v = EXPANDED[name](k), EXPANDED[name](v)
    have = flash_attn_func(q, k, v, causal=True)
    want = flash_attn_func(q, k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(have, want)


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_packed_keys_of_one_head_too(on_simulated_device):
    q, k, v = (x.flatten(0, 1) for x in draw())
    k = k[:, :1].expand_as(k)
    call = (ENDS, ENDS, 67, 67)
    have = flash_attn_varlen_func(q, k, v, *call, causal=True)
    assert torch.equal(have, flash_attn_varlen_func(q, k.contiguous(), v, *call, causal=True))


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
def test_a_stride_that_no_map_holds_is_left_to_the_portable_code(fake, on_fake_driver):
    """2^40 bytes and more: nothing is there, but between the two sequences."""
    q = draw()[0]
    far = torch.empty(0).bfloat16().as_strided((2, 0, 2, 128), (2**40, 256, 128, 1))
    assert flash_attn_func(q, far, far).shape == q.shape  # no keys, so nothing is read
    assert fake.launches == []

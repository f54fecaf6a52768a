"""The plan cache of `grouped_scaled_mm`: hits launch what a miss does, with any sizes of groups."""

import pytest
import torch

from fake_driver.cubin import LAYOUT
from flash8 import gemm
from flash8.ops import gemm_plans, grouped_gemm_plans
from grouped_gemm_cases import GRANULARITIES, assert_same, emulated, make, make_along_k
from simulated_device import SimulatedDevice, missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [20, 0, 45, 5]
_ADDRESSES = ("a", "b", "out", "scale_a", "scale_b", "group_rows")


def given(product):
    index = "masked_m" if product.is_apart else "offs"
    names = ("a", "b", "scale_a", "scale_b")
    return {name: getattr(product, name) for name in names} | {index: product.group_rows}


def _offset(name):
    return LAYOUT["GemmParams"]["fields"][name][0]


def addresses(parameters):
    return [int.from_bytes(parameters[_offset(x) : _offset(x) + 8], "little") for x in _ADDRESSES]


def without_addresses(parameters):
    cleared = bytearray(parameters)
    for name in _ADDRESSES:
        cleared[_offset(name) : _offset(name) + 8] = bytes(8)
    for name in ("tma_a", "tma_b"):
        cleared[_offset(name) + 16 : _offset(name) + 24] = bytes(8)
    return bytes(cleared)


@pytest.fixture
def misses(monkeypatch):
    """A list that grows with every call that has no plan: "plan" where one was kept or might have
    been, "op" where the torch op served it."""
    seen = []
    launch, serve = grouped_gemm_plans.launch, gemm.grouped_ops.grouped_scaled_mm

    def counted(*args):
        found = launch(*args)
        seen.extend(["plan"] * (found is not None))
        return found

    monkeypatch.setattr(grouped_gemm_plans, "launch", counted)
    name = "grouped_scaled_mm"
    monkeypatch.setattr(gemm.grouped_ops, name, lambda *args: seen.append("op") or serve(*args))
    return seen


@pytest.mark.parametrize("room", [None, 50])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_hit_launches_what_a_miss_does(name, room, fake, on_fake_driver, misses):
    """With other sizes of the groups, too."""
    found = []
    for seed, sizes in enumerate((SIZES, [0, 50, 20, 0])):
        product = make(sizes, 40, 400, name, room=room, seed=seed)
        out = gemm.grouped_scaled_mm(**given(product))
        found.append(out)
        tensors = product.a, product.b, out, product.scale_a, product.scale_b, product.group_rows
        assert addresses(fake.parameter(seed)) == [x.data_ptr() for x in tensors]
        assert out.shape == product.out_shape and out.dtype == BF16
    assert misses == ["plan"] and len(fake.launches) == 2 and len(gemm_plans.cache()) == 1
    assert fake.launches[0] == fake.launches[1]
    assert without_addresses(fake.parameter(0)) == without_addresses(fake.parameter(1))


@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_hit_along_k(name, fake, on_fake_driver, misses):
    for seed, sizes in enumerate((SIZES, [0, 50, 20, 0])):
        product = make_along_k(sizes, 40, 48, name, seed=seed)
        out = gemm.grouped_scaled_mm(**given(product))
        tensors = product.a, product.b, out, product.scale_a, product.scale_b, product.group_rows
        assert addresses(fake.parameter(seed)) == [x.data_ptr() for x in tensors]
        assert out.shape == (4, 40, 48)
    assert misses == ["plan"] and len(fake.launches) == 2


CHANGES = {
    "size": lambda p: {"a": p.a[:69], "scale_a": p.scale_a[:69]},
    "groups": lambda p: {"b": p.b[:3], "scale_b": p.scale_b[:3], "offs": p.group_rows[:3]},
    "granularity": lambda p: {"scale_a": p.scale_a[:1]},
    "type": lambda p: {"out_dtype": FP16},
    "accumulation": lambda p: {"use_fast_accum": True},
    "out": lambda p: {"out": torch.zeros(70, 40, dtype=BF16)},
    "strides of the groups": lambda p: {"b": p.b[:1].expand(4, -1, -1)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_call_is_a_miss(name, on_fake_driver, misses):
    product = make(SIZES, 40, 400, "row")
    gemm.grouped_scaled_mm(**given(product))
    gemm.grouped_scaled_mm(**{**given(product), **CHANGES[name](product)})
    assert misses == ["plan", "plan"]


def test_what_is_converted_or_copied_leaves_no_plan(on_fake_driver, misses):
    product = make(SIZES, 40, 400, "row")
    held = torch.zeros(70, 403).to(torch.float8_e4m3fn)[:, :400]
    for changes in ({"offs": product.group_rows.long()}, {"a": held}):
        for _ in range(2):
            gemm.grouped_scaled_mm(**{**given(product), **changes})
    assert misses == ["plan"] * 4 and len(gemm_plans.cache()) == 0


def test_torchs_names_are_the_same_call(on_fake_driver, misses):
    product = make(SIZES, 40, 400, "row")
    a, b, scale_a, scale_b, offs, *_ = product
    gemm.grouped_scaled_mm(a, b, scale_a, scale_b, offs, out_dtype=BF16)
    gemm.grouped_scaled_mm(
        mat_a=a, mat_b=b, scale_a=scale_a, scale_b=scale_b, offs=offs, output_dtype=BF16
    )
    assert misses == ["plan"]


def test_bad_calls_are_refused_behind_a_good_one(fake, on_fake_driver):
    product = make(SIZES, 40, 400, "row")
    good, out = given(product), torch.zeros(70, 40, dtype=BF16)
    for _ in range(2):
        assert gemm.grouped_scaled_mm(**good, out=out) is out
    assert out._version == 2
    with pytest.raises(ValueError, match="one of them is needed"):
        gemm.grouped_scaled_mm(**good, masked_m=product.group_rows)
    with pytest.raises(ValueError, match="one of them is needed"):
        gemm.grouped_scaled_mm(**{**good, "offs": None})
    with pytest.raises(ValueError, match="offs goes with a of 2 dimensions and masked_m"):
        gemm.grouped_scaled_mm(**{**good, "offs": None}, masked_m=product.group_rows)
    with pytest.raises(TypeError, match=r"out_dtype must be .*, got torch.float8"):
        gemm.grouped_scaled_mm(**good, out_dtype=torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="has no derivative"):
        gemm.grouped_scaled_mm(**{**good, "scale_a": product.scale_a.clone().requires_grad_()})
    shared = torch.zeros(3000, dtype=torch.int32)
    offs = shared[10:14]
    with pytest.raises(ValueError, match="out must not share memory with an input"):
        gemm.grouped_scaled_mm(**{**good, "offs": offs}, out=shared[:1400].view(BF16).view(70, 40))
    assert len(fake.launches) == 2


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("granularity", ["row", "block"])
def test_hits_on_the_simulated_device(granularity, own_cache, monkeypatch, misses):
    """A plan serves any indices, those that mean nothing too."""
    with SimulatedDevice().serving_cpu_tensors(monkeypatch, seed=5):
        for sizes in (SIZES, [70, 0, 0, 0], [0, 9, 0, 0]):
            product = make(sizes, 40, 144, granularity, beyond=70 - sum(sizes), out_dtype=BF16)
            assert_same(gemm.grouped_scaled_mm(**given(product)), emulated(product))
        index = torch.tensor([-9, 30, 2, 2**31 - 1], dtype=torch.int32)
        product = make(SIZES, 40, 144, granularity, out_dtype=BF16)._replace(group_rows=index)
        assert_same(gemm.grouped_scaled_mm(**given(product)), emulated(product))
    assert misses == ["plan"]

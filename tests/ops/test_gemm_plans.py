"""The plan cache of `scaled_mm`: which calls are hits, and that they launch what a miss does."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grouped_gemm_cases
from fake_driver.cubin import LAYOUT
from flash8 import flash_attn_func, gemm
from flash8.ops import gemm_plans, planned
from gemm_cases import assert_same, emulated, make
from simulated_device import SimulatedDevice, missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn

#: What `make` is asked for, and the options of the call.
CALLS = {
    "tensor": ("tensor", {}),
    "row": ("row", {}),
    "1x128": ("1x128", {"out_dtype": FP32}),
    "128x128": ("128x128", {"out_dtype": FP16}),
    "fast": ("row", {"use_fast_accum": True}),
    "bias": ("row", {"bias": torch.ones(40)}),
    "bias of 16 bits": ("1x128", {"bias": torch.ones(40, dtype=FP16)}),
    "e4m3": ("row", {"out_dtype": E4M3}),
    "e4m3, scaled": ("1x128", {"out_dtype": E4M3, "scale_result": torch.ones(1)}),
    "into a given one": ("row", {"out": torch.zeros(70, 48, dtype=BF16)[:, 3:43]}),
}
_ADDRESSES = ("a", "b", "out", "bias", "scale_a", "scale_b", "scale_result")


def call(name, seed=0):
    granularity, options = CALLS[name]
    product = make(70, 40, 400, granularity, seed=seed)
    out = gemm.scaled_mm(product.a, product.b, product.scale_a, product.scale_b, **options)
    return out, product


def _offset(name):
    return LAYOUT["GemmParams"]["fields"][name][0]


def addresses(parameters, *names):
    return [int.from_bytes(parameters[_offset(x) : _offset(x) + 8], "little") for x in names]


def without_addresses(parameters):
    cleared = bytearray(parameters)
    for name in _ADDRESSES:
        given = addresses(parameters, name) != [0]
        cleared[_offset(name) : _offset(name) + 8] = given.to_bytes(8, "little")
    for name in ("tma_a", "tma_b"):
        cleared[_offset(name) + 16 : _offset(name) + 24] = bytes(8)
    return bytes(cleared)


@pytest.fixture
def misses(monkeypatch):
    """A list that grows with every call that has no plan: "plan" where one was kept or might have
    been, "op" where the torch op served it."""
    seen = []
    launch, serve = gemm_plans.launch, gemm.ops.scaled_mm

    def counted(*args):
        found = launch(*args)
        seen.extend(["plan"] * (found is not None))
        return found

    monkeypatch.setattr(gemm_plans, "launch", counted)
    monkeypatch.setattr(gemm.ops, "scaled_mm", lambda *args: seen.append("op") or serve(*args))
    return seen


@pytest.mark.parametrize("name", CALLS)
def test_a_hit_launches_what_a_miss_does(name, fake, on_fake_driver, misses):
    first, one = call(name)
    again, other = call(name, seed=9)
    assert misses == ["plan"] and len(fake.launches) == 2 and len(gemm_plans.cache()) == 1
    assert fake.launches[0] == fake.launches[1]
    assert without_addresses(fake.parameter(0)) == without_addresses(fake.parameter(1))
    for index, (out, product) in enumerate(((first, one), (again, other))):
        tensors = out, product.a, product.b, product.scale_a, product.scale_b
        found = addresses(fake.parameter(index), "out", "a", "b", "scale_a", "scale_b")
        assert found == [x.data_ptr() for x in tensors]
    assert (first.shape, first.dtype, first.stride()) == (again.shape, again.dtype, again.stride())


def test_a_hit_of_a_that_is_quantized(fake, on_fake_driver, misses):
    """Few rows of 16 bits: one kernel, and a plan. Many are quantized before, without one."""
    for seed in range(2):
        product = make(9, 40, 400, "1x128", seed=seed)
        a = product.a.to(BF16)
        out = gemm.scaled_mm(a, product.b, scale_b=product.scale_b)
        found = addresses(fake.parameter(seed), "out", "a", "b", "scale_a", "scale_b")
        want = [out.data_ptr(), a.data_ptr(), product.b.data_ptr(), 0, product.scale_b.data_ptr()]
        assert found == want
    assert misses == ["plan"] and len(fake.launches) == 2 and len(gemm_plans.cache()) == 1
    product = make(70, 40, 400, "1x128")
    gemm.scaled_mm(product.a.to(BF16), product.b, scale_b=product.scale_b)
    assert misses == ["plan", "op"] and len(gemm_plans.cache()) == 1


def test_a_hit_of_a_split_product(fake, on_fake_driver, misses):
    for seed in range(2):
        for splits in (1, 4):
            product = make(9, 40, 1024, "1x128", seed=seed)
            gemm.scaled_mm(**given(product), split_k=splits)
    assert misses == ["plan", "plan"] and len(gemm_plans.cache()) == 2
    assert [" cluster=4,1,1 " in launch for launch in fake.launches] == [False, True] * 2
    shares = [fake.parameter(i)[_offset("splits")] for i in range(4)]
    assert shares == [1, 4, 1, 4]


CHANGES = {
    "size": lambda p: {"a": p.a[:69], "scale_a": p.scale_a[:69]},
    "strides": lambda p: {"a": p.a.repeat(1, 2)[:, :400]},
    "strides of scales": lambda p: {"scale_b": p.scale_b.contiguous()},
    "granularity": lambda p: {"scale_a": p.scale_a[:1]},
    "type": lambda p: {"out_dtype": FP16},
    "type, named": lambda p: {"out_dtype": BF16},
    "bias": lambda p: {"bias": torch.zeros(40)},
    "accumulation": lambda p: {"use_fast_accum": True},
    "split": lambda p: {"split_k": 2},
    "out": lambda p: {"out": torch.zeros(70, 40, dtype=BF16)},
}


def given(product):
    return {name: getattr(product, name) for name in ("a", "b", "scale_a", "scale_b")}


@pytest.mark.parametrize("name", CHANGES)
def test_another_call_is_a_miss(name, on_fake_driver, misses):
    product = make(70, 40, 400, "row")
    gemm.scaled_mm(**given(product))
    gemm.scaled_mm(**{**given(product), **CHANGES[name](product)})
    assert misses == ["plan", "plan"]


def test_names_of_torch_are_the_same_call(on_fake_driver, misses):
    product = make(70, 40, 400, "row")
    scales = {"scale_a": product.scale_a, "scale_b": product.scale_b}
    gemm.scaled_mm(product.a, product.b, out_dtype=BF16, **scales)
    gemm.scaled_mm(input=product.a, mat2=product.b, output_dtype=BF16, **scales)
    assert misses == ["plan"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_parameter_is_a_hit_where_no_gradient_is_recorded(on_fake_driver, misses, context):
    product, bias = make(70, 40, 400, "row"), torch.nn.Parameter(torch.ones(40))
    for _ in range(2):
        with context():
            gemm.scaled_mm(**given(product), bias=bias)
    assert misses == ["plan"]
    with pytest.raises(RuntimeError, match="has no derivative"):
        gemm.scaled_mm(**given(product), bias=bias)


def test_copies_leave_no_plan(on_fake_driver, misses):
    """The copy is of this call."""
    product = make(70, 40, 400, "row")
    a = torch.zeros(70, 403).to(E4M3)[:, :400]
    for _ in range(2):
        gemm.scaled_mm(**{**given(product), "a": a})
    assert misses == ["plan"] * 2 and len(gemm_plans.cache()) == 0


def test_an_address_that_tma_cannot_read_is_a_miss(fake, on_fake_driver, misses):
    product = make(70, 40, 400, "row")
    held = torch.zeros(70 * 400 + 3).to(E4M3)
    gemm.scaled_mm(**given(product))
    gemm.scaled_mm(**{**given(product), "a": held[3:].view(70, 400)})
    assert misses == ["plan"] * 2


def test_bad_calls_are_refused_behind_a_good_one(fake, on_fake_driver):
    product = make(70, 40, 400, "row")
    out = torch.zeros(70, 40, dtype=BF16)
    gemm.scaled_mm(**given(product))
    gemm.scaled_mm(**given(product), out=out)
    shared = torch.zeros(2900, dtype=BF16)
    beside = {"out": shared[:2800].view(70, 40), "bias": shared[2800:2840]}
    for _ in range(2):
        gemm.scaled_mm(**given(product), **beside)
    with pytest.raises(ValueError, match="out must not share memory with an input"):
        gemm.scaled_mm(**given(product), **{**beside, "bias": shared[2799:2839]})
    with pytest.raises(RuntimeError, match="has no derivative"):
        gemm.scaled_mm(**{**given(product), "scale_a": product.scale_a.clone().requires_grad_()})
    with pytest.raises(TypeError, match=r"out_dtype must be .*, got \[1\]"):
        gemm.scaled_mm(**given(product), out_dtype=[1])
    with pytest.raises(TypeError, match="use_fast_accum must be a bool"):
        gemm.scaled_mm(**given(product), use_fast_accum=0)
    assert len(fake.launches) == 4


def test_a_version_counts_what_is_written(on_fake_driver):
    product, out = make(70, 40, 400, "row"), torch.zeros(70, 40, dtype=BF16)
    for count in (1, 2, 3):
        assert gemm.scaled_mm(**given(product), out=out) is out
        assert out._version == count


class PassesOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_version_counts_what_an_op_writes(on_fake_driver, misses):
    """Whoever has saved `out` for a backward is told, where there is no plan too."""
    product, out = make(70, 40, 400, "row"), torch.zeros(70, 40, dtype=BF16)
    with PassesOn():
        gemm.scaled_mm(**given(product), out=out)
    assert misses == ["op"] and out._version == 1
    grouped = grouped_gemm_cases.make([30, 40], 40, 144, "row")
    scales = grouped.scale_a, grouped.scale_b
    gemm.grouped_scaled_mm(grouped.a, grouped.b, *scales, grouped.group_rows, out=out)
    assert out._version == 2
    q, out = torch.zeros(1, 9, 2, 64, dtype=BF16), torch.zeros(1, 9, 2, 64, dtype=BF16)
    with PassesOn():
        flash_attn_func(q, q, q, out=out)
    assert out._version == 1


def test_a_mode_sees_the_op(on_fake_driver, misses):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    product, seen = make(70, 40, 400, "row"), []
    gemm.scaled_mm(**given(product))
    with Mode():
        gemm.scaled_mm(**given(product))
    assert "flash8::scaled_mm" in seen and misses == ["plan", "op"]


def test_a_plan_keeps_no_tensor(on_fake_driver):
    product = make(70, 40, 400, "row")
    out = gemm.scaled_mm(**given(product))
    storages = [x.untyped_storage()._cdata for x in (*given(product).values(), out)]
    del product, out
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    alive = [x for x in found if x.layout is torch.strided and x.device.type == "cpu"]
    assert not {x.untyped_storage()._cdata for x in alive if x.numel()} & {*storages}


def test_a_full_cache_begins_anew(on_fake_driver, misses, monkeypatch):
    monkeypatch.setattr(planned, "MOST_PLANS", 3)
    product, sizes = make(70, 40, 400, "row"), []
    for m in (1, 2, 3, 4, 5, 4):
        gemm.scaled_mm(product.a[:m], product.b, product.scale_a[:1], product.scale_b)
        sizes.append(len(gemm_plans.cache()))
    assert sizes == [1, 2, 3, 1, 2, 2] and misses == ["plan"] * 5


def test_calls_of_threads_while_others_forget_everything(fake, on_fake_driver):
    fake.record(False)
    products = [make(70, 40, 400, "row", seed=thread) for thread in range(4)]

    def work(thread):
        for m in range(1, 61):
            product = products[thread]
            out = gemm.scaled_mm(product.a[:m], product.b, product.scale_a[:1], product.scale_b)
            if m % 10 == thread:
                gemm_plans.cache().clear()
        return out.shape

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(work, range(4))] == [(60, 40)] * 4


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("granularity", ["row", "1x128"])
def test_hits_on_the_simulated_device(granularity, own_cache, monkeypatch, misses):
    with SimulatedDevice().serving_cpu_tensors(monkeypatch, seed=5):
        for seed in range(3):
            product = make(70, 40, 400, granularity, out_dtype=BF16, seed=seed)
            assert_same(gemm.scaled_mm(**given(product)), emulated(product))
    assert misses == ["plan"]

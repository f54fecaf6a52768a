"""When a kernel is checked, and what a check leaves alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flash8
from flash8 import flash_attn_func, fp8
from flash8.backends.hopper import forward as hopper
from flash8.backends.hopper import mode
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import trust
from flash8.backends.hopper.verify.watchdog import KernelHangsError
from flash8.compiler import CompilerNotFoundError, MissingVariantError
from flash8.ops import plan_cache
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")


def draw(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 40, heads, 128, generator=g).bfloat16() for heads in (4, 2, 2)]


def attend(seed=0):
    return flash_attn_func(*draw(seed), causal=True)


def quantize():
    return fp8.quantize(draw()[0], "block")


@pytest.fixture
def checks(monkeypatch):
    """The names of the variants that are checked, in order; every one is found sound."""
    seen = []
    monkeypatch.setattr(trust, "find_fault", lambda variant, device: seen.append(variant.name))
    return seen


def ran() -> str:
    return device().report()["kernel"]


# ------------------------------------------------------------------ kernels that cannot be had


def failing(error):
    def image(variant):
        raise error

    return image


ERRORS = {
    "no compiler": CompilerNotFoundError("there is no nvcc"),
    "forbidden": MissingVariantError("it is not in the cache"),
    "no room": OSError("No space left on device"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("call", [attend, lambda: quantize().data], ids=["forward", "quantizer"])
def test_without_a_kernel_the_portable_code_serves_and_says_so(error, call, checked):
    want = call()
    with checked(failing(error)):
        have, said = told(call)
        _, again = told(call)
    assert torch.equal(have.view(torch.uint8), want.view(torch.uint8))
    assert len(said) == 1 and not again
    assert str(error) in said[0] and type(error).__name__ in said[0] and "on cpu" in said[0]


def test_on_raises_what_goes_wrong_and_checks_nothing(checked, checks, monkeypatch):
    with checked(failing(ERRORS["no compiler"])), monkeypatch.context() as patch:
        patch.setattr(mode, "kernels_mode", lambda: "on")
        with pytest.raises(CompilerNotFoundError, match="there is no nvcc"):
            attend()
        with pytest.raises(CompilerNotFoundError, match="there is no nvcc"):
            quantize()
    assert checks == []


def test_memory_that_runs_out_is_no_verdict(checked, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("no memory")

    with checked(), monkeypatch.context() as patch:
        patch.setattr(hopper, "plan", run_out)
        with pytest.warns(UserWarning, match=r"cannot check its kernel .* no memory"):
            attend()
        assert trust._findings == {}


def test_an_interrupted_check_is_no_verdict(checked, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with checked():
        with monkeypatch.context() as patch:
            patch.setattr(hopper, "plan", interrupt)
            with pytest.raises(KeyboardInterrupt):
                attend()
        attend()
        assert list(trust._findings.values()) == [None]


# --------------------------------------------------------------------------------------- when


def test_a_variant_is_checked_once(checked, checks):
    with checked():
        for seed in range(3):
            attend(seed)
            flash_attn_func(*draw(seed), pack_gqa=False)
            plan_cache._plan_cache().clear()
    assert checks == ["forward_bf16_d128_causal_packgqa", "forward_bf16_d128"]


def test_a_quantization_has_all_its_kernels_checked(checked, checks):
    with checked():
        fp8.quantize(draw()[0], "head", smooth_k=True)
    jobs = ("mean_bf16", "mean_finish_fp32", "amax_bf16", "cast_bf16")
    assert checks == [f"quantize_{job}_d128" for job in jobs]


def test_a_capture_wants_a_call_before_it(checked, monkeypatch):
    with checked():
        monkeypatch.setattr(trust, "is_captured", lambda device: True)
        with pytest.raises(
            RuntimeError, match=r"d128_causal_packgqa has not .* once before capturing"
        ):
            attend()
        monkeypatch.setattr(trust, "is_captured", lambda device: False)
        attend()
        monkeypatch.setattr(trust, "is_captured", lambda device: True)
        plan_cache._plan_cache().clear()
        attend()
        assert ran() == "flash8_forward"


def test_nothing_in_a_check_asks_for_one(checked, monkeypatch):
    variants = [
        ForwardVariant("e4m3", 128, 128, scales="head"),
        QuantizeVariant("amax", "bf16", 128),
        AppendVariant("bf16", "e4m3"),
    ]
    with checked():
        monkeypatch.setattr(trust, "is_trusted", lambda *_: pytest.fail("asked"))
        assert [trust.find_fault(variant, CPU) for variant in variants] == [None] * 3


def test_two_threads_share_a_check(checked, monkeypatch):
    began, seen = threading.Barrier(2), []

    def find_fault(variant, device):
        seen.append(variant)
        time.sleep(0.2)

    def call(seed):
        began.wait()
        return attend(seed)

    with checked(), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(trust, "find_fault", find_fault)
        list(pool.map(call, range(2)))
    assert len(seen) == 1


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_call_and_not_the_check(checked):
    with checked():
        with Watching() as watching:
            attend()
        assert [name for name in watching.seen if "flash8" in name] == ["flash8.forward.default"]
        assert len(watching.seen) < 10
        assert list(trust._findings.values()) == [None]


def test_within_a_mode_nothing_is_checked(checked, checks):
    variant = hopper.choose(*draw(), flash8.call.options.Options())
    with checked(), Watching():
        assert not trust.is_trusted(variant, CPU)
    assert checks == []


def test_fake_tensors_are_not_checked(checked, checks):
    with checked(), FakeTensorMode():
        q = torch.empty(2, 40, 4, 128, dtype=torch.bfloat16)
        assert flash_attn_func(q, q, q).shape == q.shape
        assert fp8.quantize(q).data.shape == q.shape
    assert checks == []


def test_a_trace_checks_nothing_and_its_run_does(checked, checks):
    with checked():
        exported = torch.export.export(Attention(), tuple(draw()))
        assert checks == []
        exported.module()(*draw())
    assert checks == ["forward_bf16_d128_packgqa"]


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return flash_attn_func(q, k, v)


# --------------------------------------------------------------------- what it leaves as it was


def test_random_numbers_go_on(checked):
    want = torch.random.get_rng_state()
    with checked():
        attend()
        quantize()
    assert torch.equal(torch.random.get_rng_state(), want)


@pytest.fixture
def odd_defaults():
    """A default dtype, a default device and determinism that nobody expects."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_defaults_do_not_matter_and_stay(checked, odd_defaults):
    tensors = [torch.ones(2, 40, 4, 128, dtype=torch.bfloat16, device="cpu") for _ in range(3)]
    with checked(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, said = told(lambda: flash_attn_func(*tensors, causal=True))
        assert ran() == "flash8_forward"
        scaled, more = told(
            lambda: [fp8.quantize(x, "head", smooth_k=n == 1) for n, x in enumerate(tensors)]
        )
        assert ran() == "flash8_quantize_cast"
        _, last = told(lambda: flash_attn_func(*scaled, causal=True))
        assert torch.is_autocast_enabled("cpu")
    assert [*said, *more, *last] == []
    assert torch.get_default_dtype() == torch.float64 and torch.ones(1).is_meta
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("inference", [False, True])
def test_gradients_are_not_recorded(checked, inference):
    tensors = [x.requires_grad_(not inference) for x in draw()]
    with checked(), torch.inference_mode(inference):
        out = flash_attn_func(*tensors, causal=True)
    if not inference:
        out.sum().backward()
        assert all(x.grad is not None for x in tensors)


# --------------------------------------------------------------------------------- quantizers


def test_quantizers_without_kernels_are_portable_bit_by_bit(checked):
    x = draw()[0]
    mean = torch.randn(2, 4, 128)
    calls = {
        "mean": {"smooth_k": mean},
        "mean, rotated": {"smooth_k": mean, "hadamard": 3},
        "its own mean": {"smooth_k": True},
        "descale": {"granularity": "tensor", "descale": torch.tensor(0.02)},
        "v_colmajor": {"v_colmajor": True},
    }
    for options in calls.values():
        want = fp8.quantize(x, **{"granularity": "block", **options})
        with checked(failing(ERRORS["no compiler"])):
            have, _ = told(lambda o=options: fp8.quantize(x, **{"granularity": "block", **o}))
        for part in ("data", "descale", "mean"):
            a, b = getattr(have, part), getattr(want, part)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(
                a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)
            )


APPEND_ERRORS = {
    "a hang": KernelHangsError("no end"),
    "a capture": RuntimeError("has not been checked"),
    "no kernel, where one is required": mode.KernelRequiredError("wrong"),
}


@pytest.mark.parametrize("name", APPEND_ERRORS)
def test_keys_are_not_appended_where_values_are_refused(name, checked, monkeypatch):
    """The kernel of the values is another one: they are of another type."""

    def is_trusted(variant, device):
        if variant.dtype == "fp16":
            raise APPEND_ERRORS[name]
        return True

    q, k, v = draw()
    caches = [torch.ones(2, 128, 2, 128).to(torch.float8_e4m3fn) for _ in "kv"]
    lengths = torch.tensor([3, 70], dtype=torch.int32)
    with checked():
        monkeypatch.setattr(trust, "is_trusted", is_trusted)
        with pytest.raises(type(APPEND_ERRORS[name]), match=str(APPEND_ERRORS[name])):
            flash8.flash_attn_with_kvcache(q, *caches, k, v.half(), cache_seqlens=lengths)
    assert all((cache.float() == 1.0).all() for cache in caches)


def test_an_append_without_a_kernel_is_portable(checked):
    def call():
        q, k, v = draw()
        caches = [torch.zeros(2, 128, 2, 128).to(torch.float8_e4m3fn) for _ in range(2)]
        flash8.flash_attn_with_kvcache(
            q,
            *caches,
            k,
            v,
            cache_seqlens=torch.tensor([3, 70], dtype=torch.int32),
            k_descale=torch.full((2, 2), 0.01),
            v_descale=torch.full((2, 2), 0.02),
        )
        return torch.stack(caches).view(torch.uint8)

    want = call()
    with checked(failing(ERRORS["no compiler"])):
        have, said = told(call)
    assert torch.equal(have, want) and want.any()
    assert any("append_bf16_to_e4m3" in text for text in said)

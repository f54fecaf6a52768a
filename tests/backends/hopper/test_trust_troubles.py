"""A trouble that passes ends no kernel: what is kept of a check, and for how long."""

import subprocess
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fake_driver.cubin import any_cubin
from flash8 import _native, backends, flash_attn_func, fp8
from flash8.backends.hopper import kernels, mode
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import forward as check_forward
from flash8.backends.hopper.verify import trust, watchdog
from flash8.backends.hopper.verify.watchdog import KernelHangsError
from flash8.compiler import CompileError, CompilerNotFoundError, MissingVariantError
from flash8.ops import plan_cache
from plan_cache_cases import draw
from trust_cases import told

pytest_plugins = ["driver_fixtures"]

CPU = torch.device("cpu")
VARIANT = ForwardVariant("bf16", 128, 128)


class Checks:
    """In the place of checks: what each of them does, in turn; at last every kernel is sound."""

    def __init__(self):
        self.outcomes = []
        self.made = 0
        self.now = 1000.0  # seconds

    def find_fault(self, variant, device):
        self.made += 1
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if callable(outcome):
            outcome = outcome()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.fixture
def checks(driver, monkeypatch):
    """CPU tensors take the Hopper backend as with FLASH8_KERNELS=auto."""
    made = Checks()
    registry = _native.Registry(driver, any_cubin)
    cache = plan_cache.new_plan_cache(None)
    monkeypatch.setattr(backends, "kernels_wanted", lambda tensor: True)
    monkeypatch.setattr(kernels, "registry", lambda: registry)
    monkeypatch.setattr(plan_cache, "_plan_cache", lambda: cache)
    monkeypatch.setattr(mode, "kernels_mode", lambda: "auto")
    monkeypatch.setattr(check_forward, "find_fault", made.find_fault)
    for kept in ("_findings", "_troubles", "_locks"):
        monkeypatch.setattr(trust, kept, {})
    monkeypatch.setattr(watchdog, "hung", {})
    monkeypatch.setattr(trust.time, "monotonic", lambda: made.now)
    return made


@pytest.fixture
def required(checks, monkeypatch):
    monkeypatch.setattr(mode, "kernels_mode", lambda: "require")
    return checks


def attend():
    return flash_attn_func(*draw(), causal=True)


def driver_error(fake, code):
    """What the driver's own answer becomes."""

    def outcome():
        driver = _native.Driver(str(fake.path))
        fake.fail("cuMemAlloc_v2", code)
        try:
            _native.DeviceMemory(driver, 8)
        except _native.DriverError as error:
            return error
        finally:
            fake.fail("cuMemAlloc_v2", 0)

    return outcome


PASSING = {
    "driver out of memory": 2,
    "device in use": 46,
    "a capture in another thread": 900,
    "torch out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "MemoryError": MemoryError("no room"),
    "no room for the cache": OSError(28, "No space left on device"),
    "permission": PermissionError(13, "denied"),
    "a compiler that takes too long": subprocess.TimeoutExpired("nvcc", 600),
    "anything else": RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
}
LASTING = {
    "an illegal address": 700,
    "a launch that failed": 719,
    "an invalid image": 200,
    "too many resources": 701,
    "the compiler refuses it": CompileError("spills", "log"),
    "no compiler": CompilerNotFoundError("there is no nvcc"),
    "not in the cache": MissingVariantError("never"),
    "a shape that it cannot have": ValueError("grid is (0, 1, 1)"),
    "a fault that torch was told of": RuntimeError("CUDA error: an illegal memory access"),
}


def outcome_of(fake, kind):
    return driver_error(fake, kind) if isinstance(kind, int) else kind


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(name, fake, checks):
    checks.outcomes = [outcome_of(fake, PASSING[name])]
    _, said = told(attend)
    assert len(said) == 1 and "cannot check its kernel" in said[0]
    assert fake.launches == [] and checks.made == 1
    _, said = told(attend)  # at once: the portable code, without a check or a warning
    assert said == [] and checks.made == 1
    checks.now += 1.5
    _, said = told(attend)
    assert said == [] and checks.made == 2 and len(fake.launches) == 1
    attend()
    assert checks.made == 2 and len(fake.launches) == 2


@pytest.mark.parametrize("name", LASTING)
def test_a_real_fault_stays(name, fake, checks):
    checks.outcomes = [outcome_of(fake, LASTING[name])]
    _, said = told(attend)
    assert len(said) == 1 and "does not use its kernel" in said[0]
    checks.now += 1e6
    _, said = told(attend)
    assert said == [] and checks.made == 1 and fake.launches == []


def test_wrong_results_stay(fake, checks):
    checks.outcomes = ["O is off by 0.5"]
    _, said = told(attend)
    assert len(said) == 1 and "O is off by 0.5" in said[0]
    checks.now += 1e6
    attend()
    assert checks.made == 1 and fake.launches == []


def test_pauses_grow_and_have_an_end(fake, checks):
    checks.outcomes = [MemoryError("no room")] * 40
    tried = []
    while len(tried) < 20:
        made = checks.made
        told(attend)
        if checks.made > made:
            tried.append(checks.now)
        checks.now += 0.5 if len(tried) < 5 else 600.0
    pauses = [b - a for a, b in zip(tried, tried[1:], strict=False)]
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0] and max(pauses) <= 3600.0 + 600.0
    assert pauses[-1] >= 3600.0


def test_a_trouble_that_takes_long_is_tried_seldom(fake, checks):
    """However often the call is made: a compiler that fails after a minute costs 2% of the time."""

    def slow():
        checks.now += 60.0
        return subprocess.TimeoutExpired("nvcc", 60)

    checks.outcomes = [slow] * 40
    start = checks.now
    for _ in range(200):
        told(attend)
        checks.now += 100.0
    spent, all_of_it = 60.0 * checks.made, checks.now - start
    assert spent < 0.03 * all_of_it


def test_another_trouble_is_told_the_same_one_is_not(checks):
    checks.outcomes = [MemoryError("a"), MemoryError("a"), OSError("b")]
    texts = []
    for _ in range(3):
        texts.append(told(attend)[1])
        checks.now += 100.0
    assert [len(said) for said in texts] == [1, 0, 1] and "OSError: b" in texts[2][0]


def test_an_interrupt_ends_nothing(fake, checks):
    checks.outcomes = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        attend()
    _, said = told(attend)
    assert said == [] and checks.made == 2 and len(fake.launches) == 1


def test_a_failed_load_ends_nothing(fake, checks, monkeypatch):
    """The driver has no memory for the cubin."""

    def find_fault(variant, device):
        kernels.kernel(variant)

    monkeypatch.setattr(check_forward, "find_fault", find_fault)
    fake.fail("cuLibraryLoadData", 2)
    _, said = told(attend)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in said[0] and fake.launches == []
    fake.fail("cuLibraryLoadData", 0)
    checks.now += 2.0
    attend()
    assert len(fake.launches) == 1


def test_nobody_waits_for_a_second_try(checks, monkeypatch):
    checks.outcomes = [MemoryError("no room")]
    told(attend)
    checks.now += 2.0
    began, go_on = threading.Event(), threading.Event()
    checks.outcomes = [lambda: (began.set(), go_on.wait(10), None)[2]]
    trying = threading.Thread(target=attend)
    trying.start()
    assert began.wait(10)
    start = time.perf_counter()
    told(attend)  # the portable code, although another thread tries
    assert time.perf_counter() - start < 5.0
    go_on.set()
    trying.join()
    assert checks.made == 2 and trust._findings


def test_a_finalizer_may_call_while_its_thread_checks(fake, checks):
    checks.outcomes = [lambda: (attend(), None)[1]]
    attend()
    assert checks.made == 2 and len(fake.launches) == 2


def test_a_device_that_hangs_is_not_waited_for_again(checks):
    """Nothing that is enqueued behind the kernel ends, not even what a watchdog waits for first."""
    checks.outcomes = [KernelHangsError("did not end")]
    for _ in range(2):
        with pytest.raises(KernelHangsError, match="did not end"):
            attend()
    with pytest.raises(KernelHangsError, match="did not end"):
        flash_attn_func(*draw())  # another kernel
    assert checks.made == 1


def test_whoever_waited_for_a_check_that_hangs_does_not_make_it_again(checks):
    checking, go_on = threading.Event(), threading.Event()
    hanging = KernelHangsError("did not end")
    checks.outcomes = [lambda: (checking.set(), go_on.wait(10), hanging)[2]]

    def call(errors):
        try:
            attend()
        except KernelHangsError as error:
            errors.append(str(error))

    errors = []
    threads = [threading.Thread(target=call, args=(errors,)) for _ in range(2)]
    threads[0].start()
    assert checking.wait(10)
    threads[1].start()
    threads[1].join(0.2)  # it waits for the first
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert errors == ["did not end"] * 2 and checks.made == 1


@pytest.mark.parametrize(
    "text, lasts",
    [
        ("CUDA error: out of memory", False),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", False),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("CUDA error: an illegal memory access was encountered", True),
    ],
)
def test_an_older_torch_says_in_words_what_passes(checks, text, lasts):
    checks.outcomes = [RuntimeError(text)]
    told(attend)
    assert bool(trust._findings) == lasts


# ------------------------------------------------------------------------------------ require


def test_required_kernels_serve(fake, required):
    attend()
    assert required.made == 1 and len(fake.launches) == 1


@pytest.mark.filterwarnings("ignore:flash8 does not use its kernel")
@pytest.mark.parametrize("name", LASTING)
def test_a_required_kernel_that_fails_is_an_error(name, fake, required):
    required.outcomes = [outcome_of(fake, LASTING[name])]
    message = r"FLASH8_KERNELS is 'require', .* forward_bf16_d128_causal_packgqa on cpu: "
    for _ in range(2):
        with pytest.raises(mode.KernelRequiredError, match=message):
            attend()
    assert required.made == 1 and fake.launches == []


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_trouble_is_raised_as_it_is_and_tried_again(name, fake, required):
    required.outcomes = [outcome_of(fake, PASSING[name])]
    with pytest.raises((RuntimeError, MemoryError, OSError, subprocess.SubprocessError)) as raised:
        attend()
    assert not isinstance(raised.value, mode.KernelRequiredError)
    attend()  # at once
    assert required.made == 2 and len(fake.launches) == 1


REFUSED = {
    "splits": lambda q, k, v: flash_attn_func(q, k, v, num_splits=2),
    "qv": lambda q, k, v: flash_attn_func(q, k, v, qv=torch.zeros_like(q)),
    "an unaligned tensor": lambda q, k, v: flash_attn_func(unaligned(q), k, v),
    "an unaligned output": lambda q, k, v: flash_attn_func(q, k, v, out=unaligned(q)),
    "a dtype": lambda q, k, v: flash_attn_func(q.float(), k.float(), v.float()),
    "a quantization": lambda q, k, v: fp8.quantize(q.double()),
}


def unaligned(x):
    return torch.empty(x.numel() + 1).bfloat16()[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_no_kernel_takes_is_an_error(name, fake, required):
    for _ in range(2):
        with pytest.raises(mode.KernelRequiredError, match="'require', and no kernel serves"):
            REFUSED[name](*draw())
    assert fake.launches == []


def test_an_output_is_untouched_by_that(required):
    q, k, v = draw()
    out = torch.full_like(q, 7.0)
    with pytest.raises(mode.KernelRequiredError):
        flash_attn_func(q, k, v, num_splits=2, out=out)
    assert (out == 7.0).all()


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_would_see_the_check_is_an_error(required):
    with Watching(), pytest.raises(mode.KernelRequiredError, match="would see the check"):
        trust.is_trusted(VARIANT, CPU)
    assert required.made == 0 and trust.is_trusted(VARIANT, CPU)
    with Watching():
        assert trust.is_trusted(VARIANT, CPU)


def test_a_device_that_is_not_for_kernels_is_an_error(required, monkeypatch):
    monkeypatch.setattr(mode, "unfit", lambda index: "GPU 0 has 8.0")
    with pytest.raises(mode.KernelRequiredError, match=r"GPU 0 has 8\.0"):
        trust.is_trusted(VARIANT, torch.device("cuda", 0))

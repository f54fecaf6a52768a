"""Arguments that nobody should pass: refused by their name, and nothing is read outside."""

import subprocess

import numpy as np
import pytest
import torch

import light_process
from flash8 import (
    _native,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from flash8.backends.hopper import forward as hopper
from flash8.backends.hopper import kernels
from flash8.call.options import Options
from flash8.ops import plan_cache
from plan_cache_cases import ENDS, draw
from repository import SUPPORT

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]


class Index:
    """An __index__ that does something."""

    def __init__(self, action):
        self._action = action

    def __index__(self):
        return self._action()


def raising():
    raise ZeroDivisionError("index")


WINDOWS = {
    "a tensor": torch.tensor([3, 4]),
    "a tensor of floats": torch.tensor([3.0, 4.0]),
    "a scalar tensor": torch.tensor(3),
    "a parameter": torch.nn.Parameter(torch.ones(2)),
    "a tensor of many dimensions": torch.zeros((1,) * 12),
    "a subclass": torch.zeros(2).as_subclass(type("Odd", (torch.Tensor,), {})),
    "an array": np.array([3, 4]),
    "a range": range(2),
    "a set": {3, 4},
    "a dict": {3: 4, 5: 6},
    "text": "34",
    "bytes": b"34",
    "nothing": None,
    "a number": 7,
    "one": (3,),
    "three": (3, 4, 5),
    "many": (3,) * 1000,
    "none at all": (),
    "floats": (3.0, 4.0),
    "bools": (True, False),
    "huge": (2**63, 1),
    "huger": (10**5000, 1),
    "below": (-2, 1),
    "nested": ((3, 4), 5),
    "tensors": (torch.tensor([1, 2]), 3),
    "no ints": (object(), 3),
}
CALLS = {
    "dense": lambda window: flash_attn_func(*draw(), window_size=window),
    "varlen": lambda window: flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in draw()), ENDS, ENDS, 67, 67, window_size=window
    ),
    "cache": lambda window: flash_attn_with_kvcache(*draw(), window_size=window),
    "scheduler": lambda window: get_scheduler_metadata(
        2, 1, 64, 4, 2, 128, torch.tensor([3, 4], dtype=torch.int32), window_size=window
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_is_no_pair_of_ints_is_refused(name, call, fake, on_fake_driver):
    flash_attn_func(*draw())
    before = len(fake.launches)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="window_size"):
            CALLS[call](WINDOWS[name])
    assert len(fake.launches) == before


def test_a_generator_is_no_window(on_fake_driver):
    with pytest.raises(TypeError, match=r"window_size must be a pair .* \(generator\)"):
        flash_attn_func(*draw(), window_size=(x for x in (3, 4)))


def test_what_an_index_raises_comes_through(fake, on_fake_driver):
    with pytest.raises(ZeroDivisionError):
        flash_attn_func(*draw(), window_size=(Index(raising), 3))
    assert fake.launches == []


def test_an_index_that_forgets_every_plan(fake, on_fake_driver, misses):
    """While the call that it is an argument of is under way."""
    window = (Index(lambda: plan_cache._plan_cache().clear() or 3), 3)
    for _ in range(3):
        flash_attn_func(*draw())
        flash_attn_func(*draw(), window_size=window)
    assert len(fake.launches) == len(misses) == 6


def test_a_list_that_shrinks_while_it_is_read(on_fake_driver):
    window = [None, 3]
    window[0] = Index(lambda: window.clear() or 2)
    flash_attn_func(*draw(), window_size=window)
    with pytest.raises(TypeError, match="window_size"):
        flash_attn_func(*draw(), window_size=window)


NUMBERS = {
    "softmax_scale": [10**400, -(10**400), float("inf"), torch.ones(()), Index(raising)],
    "softcap": [10**400, 1e300, float("nan"), np.array(1.0)],
    "attention_chunk": [10**5000, 2**64, 1.0, np.float32(1.0)],
    "num_splits": [10**5000, 2**64, -1],
    "sm_margin": [10**5000, 2**64, -(2**64)],
    "dropout_p": [10**400, 1.0, float("nan")],
    "dropout_seed": [10**5000, 2**64],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_documented_errors(name, on_fake_driver):
    for value in NUMBERS[name]:
        options = {name: value, **({"dropout_p": 0.1} if name == "dropout_seed" else {})}
        with pytest.raises((TypeError, ValueError), match=name):
            flash_attn_func(*draw(), **options)


# ------------------------------------------------------------- the plan cache, without its checks


def arguments(**others):
    q, k, v = draw()
    return {"q": q, "k": k, "v": v, "causal": True, **others}


def run(call):
    return plan_cache._plan_cache().run(kernels.registry(), call, False, False)


def has_key(call):
    return plan_cache._plan_cache().has_key(kernels.registry(), call)


@pytest.fixture
def find(on_fake_driver):
    """A plan cache that has the plan of one call, asked past everything that checks arguments."""
    insert(arguments())
    assert len(plan_cache._plan_cache()) == 1
    return run


def test_it_serves_the_call_whose_plan_it_has(find):
    assert find(arguments()) is not None
    assert find({**arguments(), "window_size": (3, 4)}) is None
    assert find({**arguments(), "causal": 1}) is None


NAMES = [
    *("q", "k", "v", "qv", "s_aux", "out", "window_size", "no name of an argument"),
    *Options._fields,
]
ODD = {
    "tensor": torch.ones(4),
    "scalar tensor": torch.ones(()),
    "tensor of 12 dimensions": torch.zeros((1,) * 12),
    "empty tensor": torch.empty(0),
    "meta tensor": torch.empty(2, device="meta"),
    "sparse tensor": torch.eye(2).to_sparse(),
    "subclass": torch.zeros(2).as_subclass(type("Odd", (torch.Tensor,), {})),
    "complex": torch.zeros(2, dtype=torch.complex64).conj(),
    "tuple of tensors": (torch.ones(2), torch.ones(2)),
    "long tuple": (0,) * 10_000,
    "tuple in a tuple": ((1, 2), 3),
    "list": [1, 2],
    "huge": 2**70,
    "text": "text",
    "object": object(),
    "type": torch.Tensor,
}


@pytest.mark.parametrize("name", ODD)
def test_any_argument_of_any_name_is_a_miss(name, fake, find):
    before = len(fake.launches)
    for argument in NAMES:
        assert find(arguments(**{argument: ODD[name]})) is None, argument
    assert len(fake.launches) == before


KEYLESS = {
    "no arguments": {},
    "no q": {"k": draw()[1], "causal": True},
    "q is no tensor": arguments(q=None),
    "a tensor that no launch points to": arguments(mask=ENDS),
    "qv": arguments(qv=draw()[0]),
    "a name that is no text": {**arguments(), 7: True},
    "a name of a subclass of text": {**arguments(), type("Text", (str,), {})("name"): True},
    "many names": arguments(**{f"name {i}": i for i in range(1000)}),
    "many q": {f"q{i}": draw()[0] for i in range(60)},
}


@pytest.mark.parametrize("name", KEYLESS)
def test_a_call_without_a_key_is_a_miss(name, find):
    for _ in range(2):
        assert find(KEYLESS[name]) is None and not has_key(KEYLESS[name])
    insert(KEYLESS[name])
    assert len(plan_cache._plan_cache()) == 1
    assert find(arguments()) is not None


def test_names_are_told_apart_by_their_text(find):
    """Not by the object that has the text, nor by their order alone."""
    other = "".join(["cau", "sal"])
    assert find({other if name == "causal" else name: x for name, x in arguments().items()})
    swapped = {{"k": "v", "v": "k"}.get(name, name): x for name, x in arguments().items()}
    assert find(swapped) is None  # another order of the names is another key
    assert find({**arguments(), "deterministic": None}) is None
    assert find(arguments(causal=None, deterministic=True)) is None


def test_only_a_dict_is_a_call(find):
    for call in (None, (), [("q", draw()[0])], tuple(arguments().items())):
        with pytest.raises(TypeError):
            find(call)


def insert(call, **changes):
    """Keeps a plan for a call, whatever it is."""
    q, k, v = (call.get(name) for name in "qkv")
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in (q, k, v)):
        q, k, v = draw()
    out, lse = torch.empty_like(q), torch.empty(2, 4, 40)
    planned = hopper.plan(q, k, v, None, Options(), out, lse)
    given = {
        "kernel": planned.kernel,
        "device": 0,
        "sm_margin": 0,
        "dynamic_schedule": False,
        "params": planned.call,
        "out_like": out,
        "lse_like": lse,
        "options": (),
        "most_plans": 10,
        **changes,
    }
    plan_cache._plan_cache().insert(kernels.registry(), call, **given)


@pytest.mark.parametrize("name", ODD)
def test_no_plan_of_an_odd_call_serves(name, find):
    """As if a check had let it through: its parameters do not point to the tensors."""
    for argument in NAMES:
        call = arguments(**{argument: ODD[name]})
        insert(call, params=_native.ForwardParams())
        assert find(call) is None, argument


@pytest.mark.parametrize("like", [torch.ones(()), torch.empty(0), torch.ones(2).to_sparse()])
def test_an_output_without_memory_is_an_error(like, fake, find):
    plan_cache._plan_cache().clear()
    call = arguments()
    insert(call, out_like=like)
    before = len(fake.launches)
    if like.layout is torch.strided and like.numel():
        find(call)  # wrong, and still inside of nothing that is not there
    else:
        with pytest.raises(RuntimeError, match="torch gave a tensor without memory"):
            find(call)
        assert len(fake.launches) == before


def test_no_kernel_is_no_plan(find):
    with pytest.raises(TypeError):
        insert(arguments(), kernel=None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _native.Library(None, b""),
        lambda: _native.DeviceMemory(None, 8),
        lambda: _native.Stream(None),
        lambda: _native.Registry(None, lambda key, image: b""),
    ],
)
def test_there_is_nothing_without_a_driver(make):
    with pytest.raises(TypeError):
        make()


def test_a_registry_needs_a_resolver(driver):
    with pytest.raises(TypeError):
        _native.Registry(driver, None)


# -------------------------------------------------------------------- tensors that change meanwhile


def test_tensors_whose_attributes_answer_oddly(monkeypatch, on_fake_driver):
    """Read through attributes, which anybody may replace."""
    flash_attn_func(*draw())
    cache = plan_cache.new_plan_cache(None)
    monkeypatch.setattr(plan_cache, "_plan_cache", lambda: cache)
    insert(arguments())
    assert run(arguments()) is not None
    answers = [(1,) * 9, (1,) * 3, (), [2, 40, 4, 128], None, ("a",) * 4, (2**70,) * 4, 5]
    for answer in answers:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "stride", lambda self, answer=answer: answer)
            assert run(arguments()) is None


def test_an_interrupt_while_tensors_are_read_comes_through(monkeypatch, on_fake_driver):
    cache = plan_cache.new_plan_cache(None)

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "stride", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.run(kernels.registry(), arguments(), False, False)


def test_a_storage_that_goes_before_the_call(fake, on_fake_driver):
    q, k, v = draw()
    flash_attn_func(q, k, v)
    before = len(fake.launches)
    k.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError)):
        flash_attn_func(q, k, v)
    assert len(fake.launches) == before


# ------------------------------------------------------------------------ outputs over other memory


def foreign(buffer, start, like):
    """A tensor over part of a buffer, with a storage of its own that begins there."""
    part = torch.from_dlpack(buffer[start : start + like.numel()])
    own = torch.from_dlpack(np.from_dlpack(part.view(torch.int16))).view(like.dtype)
    assert own.untyped_storage().data_ptr() == part.data_ptr()
    return own.view(like.shape)


SHIFTS = {"a storage that begins later": 8, "one that begins before": -8, "the same bytes": 0}


@pytest.mark.parametrize("name", ["q", "k", "v", "s_aux"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_an_output_over_an_argument_is_refused_again(shift, name, fake, on_fake_driver):
    tensors = draw(heads=16, heads_kv=16)
    given = dict(zip("qkv", tensors, strict=True), s_aux=torch.zeros(16).bfloat16())
    out = torch.empty_like(given["q"])
    flash_attn_func(**given, out=out)
    buffer = torch.zeros(8 + given[name].numel() + 2 * out.numel()).bfloat16()
    place = 8 + out.numel() if shift == "one that begins before" else 8
    given[name] = foreign(buffer, place, given[name])
    before = len(fake.launches)
    with pytest.raises(ValueError, match="out must not share memory"):
        flash_attn_func(**given, out=foreign(buffer, place + SHIFTS[shift], out))
    assert len(fake.launches) == before


def test_an_output_next_to_an_argument_is_a_hit(fake, on_fake_driver, misses):
    q, k, v = draw(heads_kv=4)
    flash_attn_func(q, k, v, out=torch.empty_like(q))
    buffer = torch.zeros(3 * q.numel()).bfloat16()
    before, out, after = (foreign(buffer, i * q.numel(), q) for i in range(3))
    flash_attn_func(before, after, v, out=out)
    assert (len(fake.launches), len(misses)) == (2, 1)


# ----------------------------------------------------------------------------- threads that remain

REMAINS = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from fake_driver.cubin import fake_cubin
from flash8 import _native
driver = _native.Driver(sys.argv[2])
kernel = _native.Library(driver, fake_cubin()).kernel("plain")
registry = _native.Registry(driver, lambda key, image: time.sleep(0.001) or fake_cubin())
def launches():
    while True:
        kernel.launch((1, 1, 1), [], block=(32, 1, 1))
def loads(i):
    while True:
        i += 8
        registry.get(str(i))
for i in range(4):
    threading.Thread(target=launches, daemon=True).start()
    threading.Thread(target=loads, args=(i,), daemon=True).start()
time.sleep(0.2)
"""


def test_a_process_ends_while_threads_launch(fake_library):
    """Python before 3.14 ends such threads inside the extension, which must not abort for it."""
    command = light_process.command(REMAINS, str(SUPPORT), str(fake_library))
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


OUTLIVES = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from fake_driver.control import FakeDriver
from fake_driver.cubin import fake_cubin
from flash8 import _native
fake = FakeDriver(sys.argv[2])
fake.reset()
driver = _native.Driver(sys.argv[2])
registry = _native.Registry(driver, lambda key, image: fake_cubin())
# The driver takes the first image for another device's, so the resolver is asked again.
fake.fail("cuLibraryLoadData", 209)
fake.delay("cuLibraryLoadData", 300)
fake.linger(600)
threading.Thread(target=registry.get, args=("key",), daemon=True).start()
time.sleep(0.1)
"""


def test_a_driver_returns_when_python_has_ended(fake_library):
    """A thread that asks for the GIL then has no interpreter to ask."""
    command = light_process.command(OUTLIVES, str(SUPPORT), str(fake_library))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

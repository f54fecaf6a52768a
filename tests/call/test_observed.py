"""What watches a call is seen, and a torch that cannot tell is taken to watch every call."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flash8
from flash8 import flash_attn_func
from flash8.call import observed
from flash8.tensors import memory


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def within(context):
    def run(ask):
        with context():
            ask(torch.ones(3))

    return run


def traced(function, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        torch.jit.trace(function, x, check_trace=False)


X = torch.ones(3)
#: Each calls `ask` with a tensor while it watches.
WATCHERS = {
    "a dispatch mode": within(Dispatch),
    "a function mode": within(Function),
    "a default device": within(lambda: torch.device("cpu")),
    "fake tensors": within(FakeTensorMode),
    "forward-mode AD": within(torch.autograd.forward_ad.dual_level),
    "vmap": lambda ask: torch.func.vmap(ask)(X),
    "grad": lambda ask: torch.func.grad(lambda x: ask(x).sum())(X),
    "vjp": lambda ask: torch.func.vjp(ask, X),
    "jvp": lambda ask: torch.func.jvp(ask, (X,), (X,)),
    "functionalize": lambda ask: torch.func.functionalize(ask)(X),
    "make_fx": lambda ask: make_fx(ask)(X),
    "torch.jit.trace": lambda ask: traced(ask, X),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_who_watches_is_seen(name):
    answers = []

    def ask(x):
        answers.append(observed.is_observed())
        return x * 1.0

    assert not observed.is_observed()
    WATCHERS[name](ask)
    assert answers and all(answers)
    assert not observed.is_observed()


def test_a_compiled_function_is_a_watched_one():
    compiled = torch.compile(lambda x: x + observed.is_observed(), backend="eager", fullgraph=True)
    assert compiled(X).tolist() == [2.0] * 3


def test_a_compiled_function_is_no_transformed_one():
    ask = lambda x: x + observed.is_transformed()  # noqa: E731
    assert torch.compile(ask, backend="eager", fullgraph=True)(X).tolist() == [1.0] * 3
    assert torch.func.vmap(ask)(X).tolist() == [2.0] * 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_who_only_says_what_is_recorded_does_not_watch(context):
    with context():
        assert not observed.is_observed()


def test_function_modes_are_put_aside():
    with Function():
        assert observed.is_observed() and not observed.are_operations_observed()
        with observed.without_function_modes():
            assert torch.ones(2).device.type == "cpu"
    with Dispatch(), observed.without_function_modes():
        assert observed.are_operations_observed()


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("ask", [observed.is_autocast_on, observed._is_autocast_on])
def test_autocast_is_seen(device_type, ask):
    assert not ask()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no CUDA here
        with torch.amp.autocast_mode.autocast(device_type, dtype=torch.bfloat16):
            on = torch.is_autocast_enabled(device_type)
            assert ask() == on


def test_a_tangent_is_found():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, 2 * X)
        assert torch.equal(observed.tangent_of(dual), 2 * X)
        assert observed.tangent_of(X) is None
    torch.func.vmap(lambda x: x * (observed.tangent_of(x) is None))(X)


def test_tensors_of_a_transform_have_no_memory():
    answers = []

    def ask(x):
        answers.append((memory.is_readable(x), memory.is_shared(x, [x])))
        return x.sum()

    ask(X)
    torch.func.vmap(ask)(torch.ones(2, 3))
    torch.func.grad(ask)(X)
    assert answers == [(True, True), (False, False), (False, False)]


def test_aliases_share_memory():
    with FakeTensorMode():
        fake, other = torch.empty(8), torch.empty(8)
        assert memory.is_shared(fake, [fake[4:]]) and not memory.is_shared(fake, [other])
        assert not memory.is_shared(fake[:4], [fake[4:]])
    x = torch.empty(8)
    assert memory.is_shared(x, [x[4:]]) and not memory.is_shared(x[:4], [x[4:]])
    assert not memory.is_shared(x, [torch.empty(8)])


# A torch without one of the private names, in a process of its own for each of them.
LACKING = """
import ast, os, sys, types
from pathlib import Path
import torch
import torch.autograd.forward_ad as forward_ad

def names(module):
    tree = ast.parse((package / "call" / module).read_text())
    for block in ast.walk(tree):
        if isinstance(block, ast.Try) and any(h.type.id == "ImportError" for h in block.handlers):
            for node in ast.walk(block):
                if isinstance(node, ast.ImportFrom):
                    yield from ((node.module, name.name) for name in node.names)

def lacking(module, name, calls):
    owner = sys.modules[module]
    kept = getattr(owner, name)
    delattr(owner, name)
    if not calls:  # the package without its __init__ takes no time
        sys.modules["flash8"] = types.ModuleType("flash8")
        sys.modules["flash8"].__path__ = [str(package)]
    from flash8.call import derivatives, observed
    setattr(owner, name, kept)
    assert not derivatives._COMPLETE
    assert observed.COMPLETE == ((module, name) not in asked)
    assert observed.is_observed() == (not observed.COMPLETE)
    assert observed.is_profiled() == (not observed.COMPLETE)
    assert not observed.is_autocast_on()
    if calls:
        attend(__import__("flash8").flash_attn_func)

def attend(flash_attn_func):
    tensors = [torch.randn(2, 5, 2, 16) for _ in range(3)]
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    o = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    wanted = [o, *torch.autograd.grad(o.square().sum(), (q, k, v))]
    o = flash_attn_func(q, k, v, causal=True)
    found = [o, *torch.autograd.grad(o.square().sum(), (q, k, v))]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[0], tensors[1])
        for out in (None, o.detach()):
            try:
                flash_attn_func(dual, *tensors[1:], out=out)
            except (RuntimeError, ValueError) as error:
                assert "forward-mode" in str(error) or "tangent" in str(error), error
            else:
                raise AssertionError("a tangent was dropped")
    rows = torch.func.vmap(lambda x: flash_attn_func(x, x, x))(torch.stack(tensors))
    torch.testing.assert_close(rows[1], flash_attn_func(*[tensors[1]] * 3))

package = Path(sys.argv[1])
torch.set_num_threads(1)  # nothing runs here before the forks, which keep one thread
asked = {*names("observed.py"), ("torch.autograd.forward_ad", "_current_level")}
used = [*names("derivatives.py")]
cases = [*((name, False) for name in [*sorted(asked), *used]), (max(asked), True), (used[0], True)]
for (module, name), calls in cases:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            lacking(module, name, calls)
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, f"without {module}.{name}"
print(len(cases))
"""


def test_a_torch_without_a_private_name_takes_the_op():
    command = [sys.executable, "-c", LACKING, str(Path(flash8.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 12


def test_an_incomplete_torch_watches_every_call(monkeypatch):
    assert not observed.is_observed()
    monkeypatch.setattr(observed, "COMPLETE", False)
    assert observed.is_observed() and observed.are_operations_observed()
    assert observed.is_transformed() and observed.may_carry_tangents()
    tensors = [torch.randn(1, 4, 2, 8) for _ in range(3)]
    assert flash_attn_func(*tensors).shape == tensors[0].shape

"""A whole training step, forward, loss, backward and optimizer, as far as a driver that does
nothing can tell: while a CUDA graph is captured there are launches, and nothing reads on the host.

What torch itself does with CUDA tensors under capture is torch's affair; that nobody asks for a
value of a tensor is seen on CPU tensors as well.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flash8 import fp8, fp8_attention
from flash8.nn import FlashMHA
from flash8.tensors import memory
from forward_cases import packed

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

WIDTH, LENGTHS = 64, (40, 27, 67)
FORWARD, BACKWARD = ["forward"], ["preprocess", "backward", "postprocess"]
#: What waits for the device, or takes memory from the driver and not from torch.
FORBIDDEN = (
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
    *("cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2"),
)
#: Methods of a tensor that hand its values to Python.
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "equal", "__bool__", "__int__", "__float__")


class FP8MHA(FlashMHA):
    recipe = fp8.CurrentScaling()

    def attend(self, q, k, v, cu_seqlens, max_seqlen):
        ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        longest = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
        return fp8_attention(q, k, v, self.recipe, **ends, **longest, causal=True)


class Model(nn.Module):
    def __init__(self, attention):
        super().__init__()
        options = {"num_heads_kv": 1, "head_dim": 64, "causal": True, "dtype": torch.bfloat16}
        self.layers = nn.ModuleList(attention(WIDTH, 2, **options) for _ in range(2))

    def forward(self, x, **sequences):
        for layer in self.layers:
            x = x + layer(x, **sequences)
        return x


class Step:
    """The same tensors in every call, as a graph has them."""

    def __init__(self, attention, layout, *, compiled=False):
        self.model = Model(attention)
        shape = (2, 70) if layout == "dense" else (sum(LENGTHS),)
        self.x = torch.randn(*shape, WIDTH).bfloat16()
        self.sequences = {}
        if layout == "packed":
            self.sequences = {"cu_seqlens": packed(LENGTHS), "max_seqlen": max(LENGTHS)}
        self.run = self.model
        if compiled:
            self.run = torch.compile(self.model, fullgraph=True, backend="aot_eager")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self):
        out = self.run(self.x, **self.sequences)
        out.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@contextmanager
def nothing_read(monkeypatch):
    """Inside, asking for a value of a tensor fails, as it would while a stream is captured."""

    def refuse(*_, **__):
        raise AssertionError("a value is read on the host")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "is_readable", lambda x: False)  # as of CUDA tensors
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse)
        yield


def captured(step, fake, monkeypatch):
    """The names of the launches of a captured step."""
    fake.capture(True)
    before, counts = len(fake.launches), [fake.count(entry) for entry in FORBIDDEN]
    with nothing_read(monkeypatch):
        step()
    assert [fake.count(entry) for entry in FORBIDDEN] == counts
    return [line.split()[0] for line in fake.launches[before:]]


WAYS = [
    ("dense", False),
    ("packed", False),
    ("packed", True),
    pytest.param("dense", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "compiled"), WAYS)
def test_a_step_is_its_launches(layout, compiled, fake, on_fake_driver, monkeypatch):
    step = Step(FlashMHA, layout, compiled=compiled)
    step()
    assert captured(step, fake, monkeypatch) == [*2 * FORWARD, *2 * BACKWARD]


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_the_first_step_of_all_is_its_launches(layout, fake, on_fake_driver, monkeypatch):
    step = Step(FlashMHA, layout)
    assert captured(step, fake, monkeypatch) == [*2 * FORWARD, *2 * BACKWARD]


@pytest.mark.parametrize(("layout", "compiled"), WAYS)
def test_a_step_with_an_fp8_forward(layout, compiled, fake, on_fake_driver, monkeypatch):
    step = Step(FP8MHA, layout, compiled=compiled)
    step()
    names = [line.split()[0] for line in fake.launches]
    found = captured(step, fake, monkeypatch)
    assert found == names
    assert [x for x in found if x in (*FORWARD, *BACKWARD)] == [*2 * FORWARD, *2 * BACKWARD]


class Watch(TorchDispatchMode):
    """Refuses operations whose result has a size, or a value, that the host must be told."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        waits = name in self.waits
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        waits |= name in ("index", "index_put_") and any(_is_mask(x) for x in args[1])
        assert not waits, f"{name} waits for the device"
        return function(*args, **kwargs)


def _is_mask(index):
    return index is not None and index.dtype == torch.bool


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("attention", [FlashMHA, FP8MHA])
def test_no_operation_waits(attention, layout, fake, on_fake_driver, monkeypatch):
    """Those inside torch, too; what is observed goes through the torch op."""
    step = Step(attention, layout)
    with Watch():
        found = captured(step, fake, monkeypatch)
    assert [x for x in found if x in (*FORWARD, *BACKWARD)] == [*2 * FORWARD, *2 * BACKWARD]


@pytest.mark.parametrize("wait", [torch.nonzero, lambda x: x[x > 0], torch.repeat_interleave])
def test_a_wait_is_noticed(wait):
    with Watch(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("read", [lambda x: x.item(), bool, lambda x: x.tolist()])
def test_a_read_is_noticed(read, monkeypatch):
    with nothing_read(monkeypatch), pytest.raises(AssertionError, match="on the host"):
        read(torch.ones(1))
    assert read(torch.ones(1))

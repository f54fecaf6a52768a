"""Training steps on kernels, as far as a driver that does nothing can tell: what is launched, with
which parameters, and that nothing else happens while a CUDA graph is captured."""

import struct

import pytest
import torch

from fake_driver.cubin import LAYOUT
from flash8 import flash_attn_func, flash_attn_varlen_func
from flash8.backends.hopper import backward as hopper
from flash8.call.options import Options
from plan_cache_cases import addresses, draw

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

ENDS = torch.tensor([0, 40, 67, 134], dtype=torch.int32)
BACKWARD = ["preprocess", "backward", "postprocess"]


def dense(q, k, v, **options):
    return flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **options)


def packed(q, k, v, **options):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    options |= {"causal": True, "return_attn_probs": True}
    return flash_attn_varlen_func(q, k, v, ENDS, ENDS, 67, 67, **options)


CALLS = {
    "dense": dense,
    "packed": packed,
    "softcap": lambda *x: dense(*x, softcap=3.0),
    "window": lambda *x: dense(*x, window_size=(9, 0)),
    "deterministic": lambda *x: dense(*x, deterministic=True),
    "dropout": lambda *x: dense(*x, dropout_p=0.1),
    "ALiBi": lambda *x: dense(*x, alibi_slopes=torch.linspace(0.1, 0.4, 4)),
}


def trained(call, with_lse=True, seed=0):
    """The leaves of a training step and their gradients."""
    leaves = [x.requires_grad_() for x in draw(seed)]
    out, lse = call(*leaves)
    outputs = (out, lse) if with_lse else (out,)
    return leaves, torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def names(fake):
    return [line.split()[0] for line in fake.launches]


def field(parameters: bytes, name: str) -> int:
    return struct.unpack_from("<Q", parameters, LAYOUT["BackwardParams"]["fields"][name][0])[0]


@pytest.mark.parametrize("p", [0.1, 0.999, 1.0 - 2**-18])
def test_the_scale_of_dropout_is_that_of_its_threshold(p, fake, on_fake_driver):
    trained(lambda *x: dense(*x, dropout_p=p))
    threshold, scale = (
        LAYOUT["DropoutParams"]["fields"][x][0] for x in ("threshold", "keep_scale")
    )
    for at, struct_name in enumerate(("ForwardParams", *["BackwardParams"] * 3)):
        dropout = fake.parameter(at)[LAYOUT[struct_name]["fields"]["dropout"][0] :]
        (least,) = struct.unpack_from("<I", dropout, threshold)
        (factor,) = struct.unpack_from("<f", dropout, scale)
        assert least == round(65536 * p)
        assert factor == pytest.approx(65536 / (65536 - least) if p < 0.9999 else 0.0, rel=1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_step_is_four_launches_and_nothing_illegal(name, fake, on_fake_driver):
    trained(CALLS[name])
    fake.capture(True)
    before = len(fake.launches)
    leaves, gradients = trained(CALLS[name], seed=1)
    assert names(fake)[before:] == ["forward", *BACKWARD]
    parameters = [fake.parameter(i) for i in range(len(fake.launches) - 3, len(fake.launches))]
    assert len(set(parameters)) == 1
    for tensor, leaf, gradient in zip("qkv", leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert field(parameters[0], tensor) == leaf.data_ptr()
        assert field(parameters[0], f"d{tensor}") == gradient.data_ptr()
    assert field(parameters[0], "dlse") != 0


def test_forward_and_backward_read_one_seed(fake, on_fake_driver):
    """A tensor, which every replay of a captured graph reads again."""
    seed = torch.tensor([7])
    fake.capture(True)
    trained(lambda *x: dense(*x, dropout_p=0.1, dropout_seed=seed))
    assert addresses(fake.parameter(0), "dropout") == [seed.data_ptr()]
    assert field(fake.parameter(2), "dropout") == seed.data_ptr()
    trained(CALLS["dropout"])
    drawn = addresses(fake.parameter(4), "dropout")
    assert drawn == [field(fake.parameter(6), "dropout")] and drawn != [seed.data_ptr()]


def test_the_first_step_of_all_may_be_captured(fake, on_fake_driver):
    fake.capture(True)
    trained(dense, with_lse=False)
    assert names(fake) == ["forward", *BACKWARD]
    assert fake.count("cuLibraryLoadData") == 4 and fake.count("cuMemcpyDtoH_v2") == 0
    assert field(fake.parameter(1), "dlse") == 0


def test_the_workspace_is_aligned_and_apart(fake, on_fake_driver):
    leaves = [x.requires_grad_() for x in draw()]
    sinks = torch.zeros(4, requires_grad=True)
    out = flash_attn_func(*leaves, s_aux=sinks)
    out.float().sum().backward()
    parts = ("row_stats", "dq_accum", "dq_semaphore", "dsinks_partial")
    at = [field(fake.parameter(1), name) for name in parts]
    assert all(x % 128 == 0 and x for x in at) and at == sorted(at)
    batch, rows, heads, width = leaves[0].shape
    blocks = heads * batch * -(-rows // 64)
    sizes = [4 * blocks * n for n in (2 * 64, 64 * width, 1)]
    assert all(y - x >= size for x, y, size in zip(at[:-1], at[1:], sizes, strict=True))
    assert field(fake.parameter(1), "dsinks") == sinks.grad.data_ptr()


def test_steps_share_kernels(fake, on_fake_driver):
    """Of other options only the kernel itself is another one."""
    trained(dense)
    loaded = fake.count("cuLibraryLoadData")
    trained(packed)
    assert fake.count("cuLibraryLoadData") == loaded
    trained(CALLS["softcap"])
    assert fake.count("cuLibraryLoadData") == loaded + 2  # its forward, and its backward kernel


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 2 * 64, dtype=torch.bfloat16)
        self.out = torch.nn.Linear(2 * 64, 64, dtype=torch.bfloat16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).unbind(-3)
        return self.out(flash_attn_func(q, k, v, causal=True).flatten(-2))


def test_a_compiled_step_is_the_same_launches(fake, on_fake_driver):
    model = Model()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for captured in (False, True):
        fake.capture(captured)
        before = len(fake.launches)
        step(torch.randn(2, 70, 64).bfloat16()).float().sum().backward()
        assert names(fake)[before:] == ["forward", *BACKWARD]
    assert all(x.grad is not None for x in model.parameters())


def test_torchs_own_determinism_is_heard(monkeypatch):
    q, k, v = draw()
    assert not hopper.choose(q, k, v, Options()).deterministic
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert hopper.choose(q, k, v, Options()).deterministic

"""Backwards that are launched by the plan of one before: what they get, and who gets no plan."""

import struct
import threading

import pytest
import torch

import flash8
from fake_driver.cubin import LAYOUT
from flash8 import flash_attn_func, flash_attn_varlen_func
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import heuristics, kernels
from flash8.call.options import Options
from flash8.ops import backward_plans, planned
from plan_cache_cases import draw
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]

ENDS = torch.tensor([0, 13, 80], dtype=torch.int32)
USED = torch.tensor([17, 40], dtype=torch.int32)
SINKS = torch.linspace(-1.0, 2.0, 4)
BACKWARD = hopper.backward  # as it is outside of every test


def packed(q, k, v, **options):
    return flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), ENDS, ENDS, 67, 67, **options
    )


def used(q, k, v, **options):
    return flash_attn_varlen_func(q, k, v, None, None, None, None, USED, USED, **options)


CALLS = {
    "causal": lambda *x: flash_attn_func(*x, causal=True),
    "window, softcap": lambda *x: flash_attn_func(*x, window_size=(7, 2), softcap=3.0),
    "slopes": lambda *x: flash_attn_func(*x, alibi_slopes=SINKS),
    "sinks": lambda *x: flash_attn_func(*x, s_aux=SINKS.clone().requires_grad_()),
    "deterministic": lambda *x: flash_attn_func(*x, deterministic=True),
    "dropout": lambda *x: flash_attn_func(*x, dropout_p=0.2),
    "packed": packed,
    "used": used,
    "strided": lambda q, k, v: flash_attn_func(q[:, ::2], k[:, 1:], v[:, 1:]),
}


@pytest.fixture
def missed():
    """A list that grows with every backward that is planned. Patched by itself: the device has
    patched the same function, and takes that back before `monkeypatch` would."""
    seen = []

    def backward(*args):
        seen.append(args[9])
        return BACKWARD(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "backward", backward)
        yield seen


def step(call, seed=0, **sizes):
    """The leaves, dO, and the gradients of a training step."""
    leaves = [x.requires_grad_() for x in draw(seed, **sizes)]
    out = call(*leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return leaves, dout, torch.autograd.grad(out, leaves, dout)


PLACES = LAYOUT["BackwardParams"]["fields"]
MAPS = ("tma_q", "tma_k", "tma_v", "tma_dout")
TENSORS = ("q", "k", "v", "o", "dout", "dq", "dk", "dv", "lse", "dlse", "dsinks")
WORKSPACE = ("row_stats", "dq_accum", "dq_semaphore", "dsinks_partial", "dkv_partial")


def address(parameters, name):
    return struct.unpack_from("<Q", parameters, PLACES[name][0])[0]


def without_addresses(parameters):
    """With what tensors and maps point to zeroed, and the workspace counted from its start."""
    cleared = bytearray(parameters)
    start = address(parameters, "row_stats")
    for name in (*TENSORS, *WORKSPACE):
        at = address(parameters, name)
        kept = at - start if name in WORKSPACE and at else bool(at)
        struct.pack_into("<Q", cleared, PLACES[name][0], kept)
    for name in MAPS:
        at = PLACES[name][0] + 16  # as the fake driver packs a map
        cleared[at : at + 8] = bytes(8)
    for part, struct_name, name in (
        ("scores", "ScoreParams", "sinks"),
        ("scores", "ScoreParams", "alibi_slopes"),
        ("dropout", "DropoutParams", "seed"),
    ):
        at = PLACES[part][0] + LAYOUT[struct_name]["fields"][name][0]
        cleared[at : at + 8] = bytes(8)
    return bytes(cleared)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_step_is_launched_by_the_plan_of_the_first(name, fake, on_fake_driver, missed):
    step(CALLS[name])
    first = fake.parameter(len(fake.launches) - 1)
    leaves, dout, gradients = step(CALLS[name], seed=1)
    assert len(missed) == 1 and len(backward_plans.cache()) == 1
    launched = [line.split()[0] for line in fake.launches[-4:]]
    assert launched == ["forward", "preprocess", "backward", "postprocess"]
    found = [fake.parameter(len(fake.launches) - i) for i in (1, 2, 3)]
    assert len(set(found)) == 1
    assert without_addresses(found[0]) == without_addresses(first)
    assert address(found[0], "dout") == dout.data_ptr()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape
    if name not in ("packed", "strided"):
        for tensor, leaf, gradient in zip("qkv", leaves, gradients, strict=True):
            assert address(found[0], tensor) == leaf.data_ptr()
            assert address(found[0], f"d{tensor}") == gradient.data_ptr()
    assert all(address(found[0], part) % 128 == 0 for part in WORKSPACE)


def test_a_hit_reads_the_index_tensors_of_its_own_call(fake, on_fake_driver, missed):
    at = PLACES["sequences"][0] + LAYOUT["SequenceParams"]["fields"]["cu_seqlens_q"][0]
    for _ in range(2):
        ends = ENDS.clone()
        step(
            lambda q, k, v, ends=ends: flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, 67, 67, num_splits=0
            )
        )
        found = fake.parameter(len(fake.launches) - 1)
        assert struct.unpack_from("<Q", found, at)[0] == ends.data_ptr()
    assert len(missed) == 1


def test_split_heads_have_their_place(fake, on_fake_driver, missed, monkeypatch):
    monkeypatch.setattr(heuristics, "head_splits", lambda *_: 2)
    for seed in range(2):
        step(CALLS["causal"], seed)
    found = fake.parameter(len(fake.launches) - 1)
    assert len(missed) == 1 and address(found, "dkv_partial") > address(found, "row_stats")


OTHERS = {
    "another scale": lambda: step(lambda *x: flash_attn_func(*x, causal=True, softmax_scale=0.3)),
    "more rows": lambda: step(CALLS["causal"], rows=41),
    "other heads": lambda: step(CALLS["causal"], heads=2),
    "in one order": lambda: step(lambda *x: flash_attn_func(*x, causal=True, deterministic=True)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_have_plans_of_their_own(name, fake, on_fake_driver, missed):
    step(CALLS["causal"])
    OTHERS[name]()
    assert len(missed) == 2 and len(backward_plans.cache()) == 2
    OTHERS[name]()
    assert len(missed) == 2


def test_a_gradient_of_lse_has_a_plan_of_its_own(fake, on_fake_driver, missed):
    def both(seed):
        leaves = [x.requires_grad_() for x in draw(seed)]
        out = flash_attn_func(*leaves, causal=True, return_attn_probs=True)
        torch.autograd.grad(out, leaves, [torch.randn_like(x) for x in out])

    step(CALLS["causal"])
    both(0)
    assert len(missed) == 2
    both(1)
    assert len(missed) == 2 and address(fake.parameter(len(fake.launches) - 1), "dlse") != 0


def test_determinism_that_torch_asks_for_is_heard(fake, on_fake_driver, missed):
    step(CALLS["causal"])
    torch.use_deterministic_algorithms(True)
    try:
        step(CALLS["causal"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(missed) == 2


def test_calls_whose_kernels_read_copies_have_no_plan(fake, on_fake_driver, missed):
    def summed():
        leaves = [x.requires_grad_() for x in draw()]
        flash_attn_func(*leaves, causal=True).sum().backward()  # whose gradient is expanded

    sinks = SINKS.bfloat16().requires_grad_()
    for run in (
        summed,
        lambda: step(lambda *x: flash_attn_func(*x, s_aux=sinks)),
        lambda: step(lambda *x: flash_attn_func(*x, smooth_k=True)),
    ):
        before = len(missed)
        run()
        run()
        assert len(missed) == before + 2 and len(backward_plans.cache()) == 0


def test_addresses_between_units_are_a_miss(fake, on_fake_driver, missed):
    step(CALLS["causal"])
    leaves = [x.requires_grad_() for x in draw()]
    out = flash_attn_func(*leaves, causal=True)
    apart = torch.randn(out.numel() + 1).to(out.dtype)[1:].view(out.shape)
    torch.autograd.grad(out, leaves, apart)
    assert len(missed) == 2 and len(backward_plans.cache()) == 1


def test_a_second_derivative_is_refused_as_ever(fake, on_fake_driver):
    for _ in range(2):
        leaves = [x.requires_grad_() for x in draw()]
        out = flash_attn_func(*leaves, causal=True)
        dout = torch.randn_like(out, requires_grad=True)
        (dq, *_) = torch.autograd.grad(out, leaves, dout, create_graph=True)
        with pytest.raises(RuntimeError, match="second"):
            dq.sum().backward()
        step(CALLS["causal"])


def test_the_op_takes_plans_too(fake, on_fake_driver, missed):
    """As torch.compile calls it, with the options that are tensors in their places."""
    leaves, dout, _ = step(packed)
    q, k, v = (x.detach().flatten(0, 1) for x in leaves)
    options = Options(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS, max_seqlen_q=67, max_seqlen_k=67)
    out, lse, *_ = torch.ops.flash8.forward(q, k, v, None, None, *options)
    found = torch.ops.flash8.backward(dout, None, q, k, v, None, None, out, lse, *options)
    assert len(missed) == 1
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)] + [torch.Size([0])] * 2


def test_old_plans_go_when_there_are_too_many(fake, on_fake_driver, monkeypatch):
    monkeypatch.setattr(planned, "MOST_PLANS", 3)
    for rows in range(20, 30):
        step(CALLS["causal"], rows=rows)
        assert 1 <= len(backward_plans.cache()) <= 3


def test_threads_share_plans(fake, on_fake_driver):
    failed = []

    def train():
        try:
            for i in range(30):
                step(CALLS["causal"], rows=20 + i % 3)
                if i % 10 == 9:
                    backward_plans.cache().clear()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_is_no_call_is_a_miss(fake, on_fake_driver):
    step(CALLS["causal"])
    registry, options = kernels.registry(), Options(window_right=0, causal=True)
    q, k, v = draw()
    lse = torch.zeros(2, 4, 40)
    saved = (q, k, v, None, None, q, lse)

    def run(saved=saved, incoming=(q, None), options=options, names=()):
        return backward_plans.cache().run(registry, saved, incoming, options, names, False)

    assert run() is not None
    for given in (
        {"saved": ()},
        {"saved": saved[:6]},
        {"saved": (*saved, ENDS)},
        {"saved": (q, k, v, q, None, q, lse)},
        {"saved": (None, k, v, None, None, q, lse)},
        {"saved": (q, k, v, None, "sinks", q, lse)},
        {"saved": (torch.nn.Buffer(q), k, v.to_sparse(), None, None, q, lse)},
        {"incoming": ()},
        {"incoming": (None, lse)},
        {"incoming": (q[:, :0], None)},
        {"options": ()},
        {"options": (*options[:-1], [3])},
        {"options": options._replace(page_table=ENDS)},
        {"saved": (*saved, ENDS), "names": ("no such option",)},
        {"saved": (*saved, ENDS), "names": ("page_table",)},
    ):
        assert run(**given) is None, given
    with pytest.raises(TypeError):
        run(options=None)


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_kernels_give_the_gradients_of_a_miss(on_simulated_device, missed):
    """Also with a workspace that holds what the one before has left there."""
    call = lambda *x: flash8.flash_attn_func(*x, causal=True, deterministic=True)  # noqa: E731
    for seed in (0, 1):
        backward_plans.cache().clear()
        want = step(call, seed)[2]
        before = len(missed)
        found = step(call, seed)[2]
        assert len(missed) == before
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))

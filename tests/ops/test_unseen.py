"""Calls on CPU tensors that go past their op, and past checks that an equal call has passed."""

import threading

import pytest
import torch

import flash8
from flash8 import flash_attn_func
from flash8.ops import unseen


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(unseen, "_known", {})


def inputs(*shape, dtype=torch.float32, count=3):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape or (2, 9, 2, 16), generator=g).to(dtype) for _ in range(count)]


#: Arguments that pass, and others that look like them, do not, and are refused.
LOOKALIKES = {
    "causal is no bool": (dict(causal=True), dict(causal=1), TypeError),
    "a window of floats": (dict(window_size=(3, 2)), dict(window_size=(3.0, 2)), TypeError),
    "a chunk that is a bool": (dict(attention_chunk=1), dict(attention_chunk=True), TypeError),
    "a chunk that is a float": (dict(attention_chunk=4), dict(attention_chunk=4.0), TypeError),
    "splits that are a bool": (dict(num_splits=1), dict(num_splits=True), TypeError),
    "a softcap that is none": (dict(softcap=1.0), dict(softcap=-1.0), ValueError),
    "a list for a window": (dict(window_size=(3, 2)), dict(window_size=[3.5, 2]), TypeError),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_a_checked_call_is_checked(name):
    good, bad, error = LOOKALIKES[name]
    q, k, v = inputs()
    for _ in range(2):
        flash_attn_func(q, k, v, **good)
    with pytest.raises(error):
        flash_attn_func(q, k, v, **bad)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, :, :1], v),
        lambda q, k, v: (q.double(), k, v),
        lambda q, k, v: (q, k, v[..., :0]),
        lambda q, k, v: (q.to_sparse(), k, v),
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q, k.to("meta"), v),
    ],
)
def test_other_tensors_are_checked(change):
    q, k, v = inputs()
    flash_attn_func(q, k, v)
    with pytest.raises((TypeError, ValueError)):
        flash_attn_func(*change(q, k, v))


def test_an_equal_call_is_checked_once(monkeypatch):
    q, k, v = inputs()
    out = flash_attn_func(q, k, v, causal=True)

    def checks(*given):
        raise AssertionError("checked again")

    monkeypatch.setattr("flash8.call.checks.attention", checks)
    assert torch.equal(flash_attn_func(q, k, v, causal=True), out)
    assert not torch.equal(flash_attn_func(k, q, v, causal=True), out)
    with pytest.raises(AssertionError, match="checked again"):
        flash_attn_func(q, k, v)


def test_options_are_told_apart():
    q, k, v = inputs()
    found = [
        flash_attn_func(q, k, v, **options)
        for options in (
            {},
            dict(causal=True),
            dict(window_size=(2, 1)),
            dict(softmax_scale=0.5),
            dict(softcap=2.0),
            dict(s_aux=torch.ones(2)),
        )
        for _ in range(2)
    ]
    for i, out in enumerate(found):
        assert [torch.equal(out, other) for other in found].count(True) == 2, i


def test_dropout_is_drawn_anew():
    q, k, v = inputs()
    assert not torch.equal(
        flash_attn_func(q, k, v, dropout_p=0.3), flash_attn_func(q, k, v, dropout_p=0.3)
    )
    assert not unseen._known


def test_the_warning_of_a_dropout_rate_comes_every_time():
    q, k, v = inputs()
    for _ in range(2):
        with pytest.warns(UserWarning, match="looks like dropout_p"):
            flash_attn_func(q, k, v, 0.1)


def test_the_number_of_keys_is_bounded(monkeypatch):
    monkeypatch.setattr(unseen, "_MOST_KEYS", 4)
    for seqlen in range(2, 12):
        flash_attn_func(*inputs(1, seqlen, 2, 8))
        assert len(unseen._known) <= 4


def test_who_watches_sees_the_op():
    q, k, v = (x.requires_grad_() for x in inputs())
    for _ in range(2):
        with torch.profiler.profile() as profile:
            flash_attn_func(q, k, v).sum().backward()
        names = {event.name for event in profile.events()}
        assert {"flash8::forward", "flash8::backward"} <= names


def test_gradients_and_second_order():
    q, k, v = (x.requires_grad_() for x in inputs())
    for _ in range(2):
        out = flash_attn_func(q, k, v, causal=True)
        assert not out._is_view()  # which could not be changed in place
        found = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
        with pytest.raises(RuntimeError, match="first-order"):
            found[0].sum().backward()


def test_autocast_rounds_no_product_of_tiles():
    q, k, v = inputs()
    plain = flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), softcap=5.0)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(flash_attn_func(q, k, v, softcap=5.0), plain)


def test_threads_may_call_at_once():
    q, k, v = inputs(1, 40, 4, 16)
    expected = {c: flash_attn_func(q, k, v, causal=c) for c in (False, True)}
    wrong = []

    def run(causal):
        for _ in range(50):
            if not torch.equal(flash8.flash_attn_func(q, k, v, causal=causal), expected[causal]):
                wrong.append(causal)

    threads = [threading.Thread(target=run, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_descale_that_wants_a_gradient_is_refused_as_by_the_op():
    q, k, v = (torch.randn(1, 4, 2, 16).to(torch.float8_e4m3fn) for _ in range(3))
    out = flash8.flash_attn_func(q, k, v, k_descale=torch.ones(1, 2, requires_grad=True))
    assert out.requires_grad
    with pytest.raises(ValueError, match="float8_e4m3fn inputs has no backward"):
        out.sum().backward()


def test_none_is_not_what_is_left_out():
    qkv = torch.randn(1, 4, 3, 2, 16)
    for _ in range(2):
        flash8.flash_attn_qkvpacked_func(qkv)
        with pytest.raises(TypeError, match="smooth_k"):
            flash8.flash_attn_qkvpacked_func(qkv, smooth_k=None)

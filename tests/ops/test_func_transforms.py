"""torch.func and torch.vmap over the public functions, nested and beside plain autograd."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import flash8
from cases import int32
from transform_cases import FACE, small, summed

SECOND_ORDER = "first-order gradients only"


def loss_of(name):
    function = summed(FACE[name])
    return lambda *inputs: function(*inputs).square().sum()


def plain_gradients(loss, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves), leaves)


@pytest.mark.parametrize("name", FACE)
def test_grad(name):
    loss, inputs = loss_of(name), small()
    expected = plain_gradients(loss, inputs)
    torch.testing.assert_close(grad(loss, (0, 1, 2))(*inputs), expected)
    _, pull_back = vjp(loss, *inputs)
    torch.testing.assert_close(pull_back(torch.ones((), dtype=torch.float64)), expected)


#: These look at the data of their inputs on the way, as torch does not allow under vmap.
READS_DATA = {"FlashMHA, padded", "sdpa, hidden keys"}


@pytest.mark.parametrize("name", [name for name in FACE if name not in READS_DATA])
@pytest.mark.parametrize("mapped", [(0, 0, 0), (1, None, 2)], ids=str)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vmap(name, mapped):
    """Of the call and of its gradients, tangents of it, and gradients of it."""
    function, loss, one = summed(FACE[name]), loss_of(name), small()
    inputs = [
        x if dim is None else torch.randn(3, *x.shape, dtype=x.dtype).movedim(0, dim)
        for x, dim in zip(one, mapped, strict=True)
    ]

    def each(call):
        results = [
            call(
                *(
                    x if dim is None else x.select(dim, i)
                    for x, dim in zip(inputs, mapped, strict=True)
                )
            )
            for i in range(3)
        ]
        if isinstance(results[0], tuple):
            return tuple(map(torch.stack, zip(*results, strict=True)))
        return torch.stack(results)

    def tangents(*x):
        return jvp(function, x, tuple(map(torch.cos, x)))[1]

    for call in (function, grad(loss, (0, 1, 2)), tangents):
        torch.testing.assert_close(vmap(call, mapped)(*inputs), each(call))
    total = grad(lambda *x: vmap(function, mapped)(*x).square().sum(), (0, 1, 2))(*inputs)
    torch.testing.assert_close(
        total, plain_gradients(lambda *x: vmap(function, mapped)(*x).square().sum(), inputs)
    )
    wide = [dim is not None for dim in mapped]
    gradients = vmap(grad(loss, (0, 1, 2)), mapped)(*inputs)
    for whole, part, dim, is_mapped in zip(total, gradients, mapped, wide, strict=True):
        torch.testing.assert_close(whole, part.movedim(0, dim) if is_mapped else part.sum(0))


def test_a_batch_of_batches_is_one_call(monkeypatch):
    """And sequences with lengths of their own are a call each."""
    from flash8.backends import cpu

    calls, forward = [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(args[0].shape) or forward(*args))
    q = torch.randn(3, 2, 4, 2, 8)
    vmap(lambda x: flash8.flash_attn_func(x, x, x, alibi_slopes=torch.ones(2)))(q)
    assert calls == [(6, 4, 2, 8)]
    calls.clear()
    vmap(lambda x, s: flash8.flash_attn_func(x, x, x, s_aux=s))(q, torch.randn(3, 2))
    assert calls == [(2, 4, 2, 8)] * 3


def test_vmap_over_lengths_seeds_and_slopes():
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))
    used = int32([[1, 2], [6, 3], [0, 4]])
    slopes = torch.rand(3, 2, 2)

    def attend(used, slopes):
        return flash8.flash_attn_varlen_func(
            q, k, v, None, None, None, None, None, used, alibi_slopes=slopes
        )

    expected = torch.stack([attend(*x) for x in zip(used, slopes, strict=True)])
    torch.testing.assert_close(vmap(attend)(used, slopes), expected)
    seeds = torch.tensor([[1], [2]])

    def drop(seed):
        return flash8.flash_attn_func(q, k, v, dropout_p=0.5, dropout_seed=seed)

    torch.testing.assert_close(vmap(drop)(seeds), torch.stack([drop(seed) for seed in seeds]))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda q: flash8.flash_attn_func(q, k, v, dropout_p=0.5))(q[None])
    both = vmap(lambda q: flash8.flash_attn_func(q, k, v, dropout_p=0.5), randomness="different")(
        torch.stack((q, q))
    )
    assert not torch.equal(both[0], both[1])


def test_vmap_of_what_is_written_in_place():
    q, k, v = torch.randn(3, 2, 1, 4, 2, 8)
    out, caches = torch.zeros_like(q), [torch.zeros(2, 1, 8, 2, 8) for _ in range(2)]
    vmap(lambda q, k, v, out: flash8.flash_attn_func(q, k, v, out=out))(q, k, v, out)
    torch.testing.assert_close(out, vmap(flash8.flash_attn_func)(q, k, v))
    attend = lambda q, k_cache, v_cache, k, v: flash8.flash_attn_with_kvcache(  # noqa: E731
        q, k_cache, v_cache, k, v, cache_seqlens=2, causal=True
    )
    expected = [attend(*x) for x in zip(q, *(x.clone() for x in caches), k, v, strict=True)]
    torch.testing.assert_close(vmap(attend)(q, *caches, k, v), torch.stack(expected))
    assert torch.equal(caches[0][:, :, 2:6], k) and torch.equal(caches[1][:, :, 2:6], v)
    before = [x.clone() for x in (out, *caches)]
    for call in (
        lambda q: flash8.flash_attn_func(q, q, q, out=out[0]),
        lambda q: attend(q, caches[0][0], caches[1][0], q, q),
    ):
        with pytest.raises(RuntimeError, match="in place, by each element"):
            vmap(call)(q)
    assert all(torch.equal(x, y) for x, y in zip(before, (out, *caches), strict=True))


def test_batched_gradients_of_plain_autograd():
    q, k, v = (x.requires_grad_() for x in small())
    out = flash8.flash_attn_func(q, k, v)
    rows = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    (found,) = torch.autograd.grad(out, k, rows, is_grads_batched=True)
    expected = jacrev(lambda k: flash8.flash_attn_func(q, k, v))(k.detach()).detach()
    torch.testing.assert_close(found, expected.reshape(found.shape))


def test_gradients_of_each_sample_of_a_module():
    torch.manual_seed(1)
    module = flash8.nn.FlashMHA(16, 2, causal=True, rotary_dim=8, sinks=True, dtype=torch.float64)
    weights = {name: x.detach() for name, x in module.named_parameters()}
    x = torch.randn(3, 5, 16, dtype=torch.float64)

    def loss(weights, sample):
        return functional_call(module, weights, (sample[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(weights, x)
    for i in range(3):
        module.zero_grad()
        module(x[i : i + 1]).square().sum().backward()
        for name, weight in module.named_parameters():
            torch.testing.assert_close(found[name][i], weight.grad)
    assert module.rotary._tables is None or type(module.rotary._tables[0]) is torch.Tensor


@pytest.mark.parametrize("hadamard", [False, True])
def test_fp8_attention(hadamard):
    q, k, v = (torch.randn(3, 2, 20, 2, 16) for _ in range(3))
    recipe = flash8.fp8.BlockScaling(hadamard=hadamard)

    def loss(q, k, v):
        return flash8.fp8.fp8_attention(q, k, v, recipe, causal=True).square().sum()

    for one in zip(q, k, v, strict=True):
        torch.testing.assert_close(grad(loss, (0, 1, 2))(*one), plain_gradients(loss, one))
    found = vmap(grad(loss, (0, 1, 2)))(q, k, v)
    expected = [plain_gradients(loss, one) for one in zip(q, k, v, strict=True)]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*expected, strict=True))))


@pytest.mark.parametrize("backward", ["fp8_scores", "fp8"])
def test_fp8_backward(backward):
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    recipe = flash8.fp8.CurrentScaling(backward=backward)

    def loss(q, k, v):
        return flash8.fp8.fp8_attention(q, k, v, recipe).square().sum()

    torch.testing.assert_close(grad(loss, (0, 1, 2))(q, k, v), plain_gradients(loss, (q, k, v)))


def test_delayed_scaling_says_that_it_gathers_in_place():
    q, recipe = torch.randn(1, 8, 2, 16), flash8.fp8.DelayedScaling()
    call = grad(lambda q: flash8.fp8.fp8_attention(q, q, q, recipe).sum())
    with pytest.raises(RuntimeError, match="CurrentScaling or BlockScaling"):
        call(q)
    recipe.eval()
    assert call(q).isfinite().all()


def differentiate(kind):
    """f -> a derivative of its sum, of x's shape or a number."""
    return {
        "grad": lambda f: grad(lambda x: f(x).square().sum()),
        "jvp": lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1],
        "autograd": lambda f: lambda x: _by_autograd(f, x),
    }[kind]


def _by_autograd(f, x):
    x = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize(
    "outer,inner",
    [
        pair
        for pair in itertools.product(("grad", "jvp", "autograd"), repeat=2)
        if pair != ("grad", "autograd") and pair != ("jvp", "autograd")
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_combine", "fp8_attention"])
def test_second_derivatives_are_refused_never_zero(outer, inner, name):
    q, k, v = small()
    attend = FACE.get(name, lambda q, k, v: flash8.fp8.fp8_attention(q, k, v))
    attend = summed(attend)
    function = differentiate(outer)(differentiate(inner)(lambda x: attend(x, k, v)))
    with pytest.raises(RuntimeError, match=SECOND_ORDER):
        function(q)


def test_second_derivatives_below_a_dual_level():
    q, k, v = small()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.requires_grad_(), torch.ones_like(q))
        out = flash8.flash_attn_func(dual, k, v)
        with pytest.raises(RuntimeError, match=SECOND_ORDER):
            torch.autograd.grad(out.square().sum(), q)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_inside_a_compiled_function(backend):
    q, k, v = small()
    torch._dynamo.reset()

    def tangent(q):
        return jvp(lambda q: flash8.flash_attn_func(q, k, v), (q,), (q.cos(),))[1]

    def per_sample(q):
        return vmap(grad(lambda q: flash8.flash_attn_func(q, k, v).sin().sum()))(q[None])

    for function in (tangent, per_sample):
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(q), function(q))


def test_dual_tensors_inside_a_compiled_function():
    q, k, v = small()
    torch._dynamo.reset()
    forward_ad = torch.autograd.forward_ad

    def tangent(q):
        with forward_ad.dual_level():
            out = flash8.flash_attn_func(forward_ad.make_dual(q, q.cos()), k, v)
            return forward_ad.unpack_dual(out).tangent

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), tangent(q))

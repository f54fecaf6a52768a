"""fp8_attention: its gradients and their bounds, layouts, options, compile, checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash8
import oracle
from cases import cumulative
from flash8 import fp8
from flash8.fp8.recipes import BACKWARDS
from flash8.ops import fp8_backward16 as backward16
from tolerances import (
    FP8_GRADIENT_COSINE,
    FP8_GRADIENTS_DEQUANTISED,
    FP8_GRADIENTS_FULL,
    FP8_GRADIENTS_TRUE,
    FP8_UNQUANTISED,
    cosine,
    rel_l2,
)

NAMES = ("dQ", "dK", "dV")


def draw(seqlen=512, heads=2, heads_kv=2, d=128, bias=0.0, dtype=torch.bfloat16, seed=0):
    """Leaves q, k, v with std-1 logits, and dO."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(1, seqlen, h, d) for h in (heads, heads_kv, heads_kv, heads)]
    q, k, v, dout = (torch.randn(shape, generator=g) for shape in shapes)
    k[..., 3] += bias
    return [x.to(dtype) for x in (q, k, v, dout)]


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def run(q, k, v, dout, recipe=None, **options):
    """O and the gradients of q, k, v."""
    xs = leaves(q, k, v)
    out = fp8.fp8_attention(*xs, recipe, **options)
    out.backward(dout)
    return out.detach(), [x.grad for x in xs]


def reference(q, k, v, dout, **options):
    xs = leaves(*(x.double() for x in (q, k, v)))
    out, _ = oracle.attention(*xs, **options)
    out.backward(dout.double())
    return out.detach(), [x.grad for x in xs]


def dequantised(q, k, v, recipe):
    """What the FP8 forward of an unrotated call has seen."""
    named = zip("qkv", (q, k, v), strict=True)
    return [fp8.dequantize(recipe.quantize(name, x, None)) for name, x in named]


def check(bounds, gradients, expected):
    for name, bound, gradient, right in zip(NAMES, bounds, gradients, expected, strict=True):
        bound.check(name, rel_l2(gradient, right))


RECIPES = {
    "head": fp8.CurrentScaling(),
    "tensor": fp8.CurrentScaling(granularity="tensor"),
    "block": fp8.BlockScaling(),
    "smooth": fp8.CurrentScaling(smooth_k=True, smooth_v=True),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_dequantised_inputs(recipe, causal):
    problem, recipe = draw(), RECIPES[recipe]
    _, gradients = run(*problem, recipe, causal=causal)
    expected = reference(*dequantised(*problem[:3], recipe), problem[3], causal=causal)
    check(FP8_GRADIENTS_DEQUANTISED, gradients, expected[1])


@pytest.mark.parametrize("recipe", [*RECIPES, "rotated"])
def test_output_and_gradients_against_the_inputs_themselves(recipe):
    problem = draw(1024)
    recipe = RECIPES.get(recipe) or fp8.BlockScaling(hadamard=True, smooth_k=True)
    out, gradients = run(*problem, recipe)
    expected_out, expected = reference(*problem)
    assert out.dtype == torch.bfloat16 and all(x.dtype == torch.bfloat16 for x in gradients)
    FP8_UNQUANTISED.check("O", rel_l2(out, expected_out))
    check(FP8_GRADIENTS_TRUE, gradients, expected)


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_of_k_does_not_leak_into_dq(smooth_k, causal):
    problem, recipe = draw(bias=10.0), fp8.CurrentScaling(smooth_k=smooth_k)
    _, gradients = run(*problem, recipe, causal=causal)
    expected = reference(*dequantised(*problem[:3], recipe), problem[3], causal=causal)
    check(FP8_GRADIENTS_DEQUANTISED, gradients, expected[1])


@pytest.mark.parametrize(
    ("backward", "accumulation"),
    [("fp8_scores", "fp32"), ("fp8_scores_dv", "fp32"), ("fp8", "fp32"), ("fp8", "hopper")],
)
def test_fp8_backward(backward, accumulation):
    problem = draw(512 if accumulation == "hopper" else 1024, heads=1, heads_kv=1)
    recipe = fp8.CurrentScaling(backward=backward)
    with fp8.study(accumulation=accumulation):
        _, gradients = run(*problem, recipe)
    _, expected = reference(*problem)
    full = backward != "fp8_scores"
    bounds = list(FP8_GRADIENTS_FULL if backward == "fp8" else FP8_GRADIENTS_TRUE)
    bounds[2] = (FP8_GRADIENTS_FULL if full else FP8_GRADIENTS_TRUE)[2]
    check(bounds, gradients, expected)
    least = FP8_GRADIENT_COSINE["fp8_scores" if backward == "fp8_scores" else "fp8"]
    assert all(cosine(a, b) >= least for a, b in zip(gradients, expected, strict=True))


# -------------------------------------------------------------------------------- mutations


def test_mutation_keys_with_their_mean_fail(monkeypatch):
    problem, recipe = draw(bias=10.0), fp8.CurrentScaling()
    expected = reference(*dequantised(*problem[:3], recipe), problem[3])[1]
    zero = lambda self, x: x.new_zeros(1, *x.shape[2:])  # noqa: E731
    monkeypatch.setattr(backward16.Tokens, "finite_mean", zero)
    _, gradients = run(*problem, recipe)
    with pytest.raises(AssertionError, match=r"dQ.*above"):
        check(FP8_GRADIENTS_DEQUANTISED, gradients, expected)


def test_mutation_original_operands_fail():
    """The FP8 forward's LSE with unquantised q, k, v: rows of P do not sum to 1."""
    q, k, v, dout = draw()
    recipe = fp8.CurrentScaling()
    expected = reference(*dequantised(q, k, v, recipe), dout)[1]
    out, lse = fp8.fp8_attention(q, k, v, recipe, return_attn_probs=True)
    options = flash8.call.options.Options()
    wrong = torch.ops.flash8.backward(dout, None, q, k, v, None, None, out, lse, *options)[:3]
    with pytest.raises(AssertionError, match="above"):
        check(FP8_GRADIENTS_DEQUANTISED, wrong, expected)
    with pytest.raises(ValueError, match=r"'original'.*no longer sum to 1"):
        fp8.CurrentScaling(backward="original")


def test_mutation_unscaled_p_destroys_dv():
    problem = draw(1024)
    xs = leaves(*problem[:3])
    out = fp8.fp8_attention(*xs, fp8.CurrentScaling(backward="fp8_scores_dv"))
    with fp8.study(p_scaling="none"):
        out.backward(problem[3])
    _, expected = reference(*problem)
    with pytest.raises(AssertionError, match=r"dV.*above"):
        FP8_GRADIENTS_FULL[2].check("dV", rel_l2(xs[2].grad, expected[2]))


def test_mutation_e5m2_gradients_fail():
    problem = draw(1024)
    recipe = fp8.CurrentScaling(backward="fp8", gradient_dtype=torch.float8_e5m2)
    _, gradients = run(*problem, recipe)
    _, expected = reference(*problem)
    with pytest.raises(AssertionError, match="above"):
        check(FP8_GRADIENTS_FULL, gradients, expected)


def test_mutation_a_mask_off_by_one_fails():
    problem, recipe = draw(256), fp8.CurrentScaling()
    _, gradients = run(*problem, recipe, window_size=(-1, 1))
    expected = reference(*dequantised(*problem[:3], recipe), problem[3], causal=True)
    with pytest.raises(AssertionError, match="above"):
        check(FP8_GRADIENTS_DEQUANTISED, gradients, expected[1])


# ------------------------------------------------------------------- layouts and options

SINK = torch.tensor([1.0, -1.0, 4.0, 0.0])
OPTIONS = {
    "window": dict(window_size=(100, 30)),
    "chunk": dict(attention_chunk=96),
    "softcap": dict(softcap=3.0),
    "scale": dict(softmax_scale=0.2),
    "alibi": dict(alibi_slopes=torch.tensor([0.1, 0.05, 0.02, 0.01]), causal=True),
}


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_and_grouped_heads(option, backward):
    problem = draw(300, 4, 2, 64, dtype=torch.float32)
    recipe = fp8.CurrentScaling(backward=backward)
    _, gradients = run(*problem, recipe, **OPTIONS[option])
    expected = reference(*dequantised(*problem[:3], recipe), problem[3], **OPTIONS[option])[1]
    # Against the dequantised inputs an FP8 backward has its own rounding only.
    limit = 0.012 if backward == "16bit" else 0.06
    for gradient, right in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32 and rel_l2(gradient, right) < limit


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("scaling", [fp8.CurrentScaling, fp8.BlockScaling])
def test_sinks_and_gradients_of_lse(backward, scaling):
    """With both, rowsum(dS) is not zero and K's mean has a share of dQ."""
    q, k, v, dout = draw(300, 4, 2, 64, bias=5.0, dtype=torch.float32)
    recipe = scaling(backward=backward, smooth_k=True, smooth_v=True)
    xs = leaves(q, k, v, SINK)
    dlse = torch.randn(1, 4, 300)
    out, lse = fp8.fp8_attention(*xs[:3], recipe, s_aux=xs[3], causal=True, return_attn_probs=True)
    torch.autograd.backward((out, lse), (dout, dlse))
    right = leaves(*dequantised(q, k, v, recipe), SINK.double())
    right_out, right_lse = oracle.attention(*right[:3], s_aux=right[3], causal=True)
    torch.autograd.backward((right_out, right_lse), (dout.double(), dlse.double()))
    limit = 0.012 if backward == "16bit" else 0.06
    for x, y in zip(xs, right, strict=True):
        assert rel_l2(x.grad, y.grad) < limit


def test_only_lse_has_a_gradient():
    q, k, v, _ = draw(64, 4, 2, 64, bias=5.0, dtype=torch.float32)
    xs, recipe = leaves(q, k, v), fp8.CurrentScaling()
    fp8.fp8_attention(*xs, recipe, return_attn_probs=True)[1].sum().backward()
    right = leaves(*dequantised(q, k, v, recipe))
    oracle.attention(*(x.double() for x in right))[1].sum().backward()
    assert rel_l2(xs[0].grad, right[0].grad) < 1e-4 and rel_l2(xs[1].grad, right[1].grad) < 1e-4
    assert (xs[2].grad == 0).all()


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("recipe", ["current", "block"])
def test_packed_sequences_are_dense_ones(backward, recipe):
    lengths = (130, 1, 0, 260)
    cu, total = cumulative(lengths), sum(lengths)
    kind = fp8.CurrentScaling if recipe == "current" else fp8.BlockScaling
    recipe = kind(backward=backward, smooth_k=True, smooth_v=True, hadamard=True)
    q, k, v, dout = (x[0] for x in draw(total + 2, 4, 2, 64, bias=5.0, dtype=torch.float32))
    k[total:] = float("nan")  # nobody's rows
    index = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=260, max_seqlen_k=260)
    out, gradients = run(q, k, v, dout, recipe, causal=True, s_aux=SINK, **index)
    assert all((x[total:] == 0).all() for x in (out, *gradients))
    for b, length in enumerate(lengths):
        rows = slice(int(cu[b]), int(cu[b]) + length)
        if length == 0:
            continue
        dense = [x[None, rows] for x in (q, k, v, dout)]
        dense_out, dense_gradients = run(*dense, recipe, causal=True, s_aux=SINK)
        # The means are sums in another order: a value on a boundary may round the other way.
        assert (out[rows] - dense_out[0]).norm() <= 1e-3 * dense_out[0].norm()
        for x, y in zip(gradients, dense_gradients, strict=True):
            assert (x[rows] - y[0]).norm() <= 3e-3 * y.norm() + 1e-5


def test_dropout_replays():
    problem = draw(200, dtype=torch.float32)
    for backward in BACKWARDS:
        recipe = fp8.CurrentScaling(backward=backward)
        options = dict(dropout_p=0.3, dropout_seed=5)
        _, gradients = run(*problem, recipe, **options)
        seen = dequantised(*problem[:3], recipe)
        expected = reference(*seen, problem[3], **options)[1]
        limit = 0.012 if backward == "16bit" else 0.06
        assert all(rel_l2(x, y) < limit for x, y in zip(gradients, expected, strict=True))
    torch.manual_seed(3)
    first = fp8.fp8_attention(*problem[:3], dropout_p=0.3)
    assert not torch.equal(first, fp8.fp8_attention(*problem[:3], dropout_p=0.3))
    torch.manual_seed(3)
    assert torch.equal(first, fp8.fp8_attention(*problem[:3], dropout_p=0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_empty_sequences(dtype):
    q, k, v, dout = draw(40, 4, 2, 32, dtype=dtype)
    out, gradients = run(q, k, v, dout)
    assert out.dtype == dtype and all(x.dtype == dtype for x in gradients)
    _, gradients = run(q, k[:, :0], v[:, :0], dout)
    assert (gradients[0] == 0).all()
    out, gradients = run(q[:, :0], k, v, dout[:, :0])
    assert out.shape == (1, 0, 4, 32) and (gradients[1] == 0).all()


def test_nan_reaches_the_output():
    q, k, v, _ = draw(40)
    v[0, 20, 0, 5] = float("nan")
    out = fp8.fp8_attention(q, k, v, causal=True)
    assert out[0, 20:, 0, 5].isnan().all() and not out[..., 6:].isnan().any()


# ------------------------------------------------------------------ compile and checkpoint

TRACED = {
    "default": lambda: None,
    "block, fp8": lambda: fp8.BlockScaling(hadamard=True, smooth_k=True, backward="fp8"),
    "delayed": lambda: fp8.DelayedScaling(backward="fp8_scores"),
}


@pytest.mark.parametrize(
    ("recipe", "how"),
    [
        ("default", "compile"),
        ("delayed", "compile"),
        pytest.param("block, fp8", "compile", marks=pytest.mark.slow),
        *((recipe, "checkpoint") for recipe in TRACED),
    ],
)
def test_compiled_and_checkpointed_calls_are_the_eager_one(recipe, how):
    problem, recipe = draw(150, 4, 2, 64), TRACED[recipe]()

    def call(q, k, v):
        return fp8.fp8_attention(q, k, v, recipe, causal=True)

    def results(function, *extra, **options):
        if isinstance(recipe, torch.nn.Module):
            recipe.amax.zero_()
        xs = leaves(*problem[:3])
        out = function(*extra, *xs, **options)
        out.backward(problem[3])
        state = [recipe.amax.clone()] if isinstance(recipe, torch.nn.Module) else []
        return [out, *(x.grad for x in xs), *state]

    eager = results(call)
    if how == "compile":
        torch._dynamo.reset()
        other = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    else:
        other = results(checkpoint, call, use_reentrant=False)
    assert all(map(torch.equal, eager, other))


def test_scaled_tensors_compile():
    q, k, v, _ = draw(150, 4, 2, 64)

    def call(q, k, v):
        scaled = (fp8.quantize(q, "block", hadamard=3), fp8.quantize(k, "block", hadamard=3))
        return flash8.flash_attn_func(*scaled, fp8.quantize(v, "head", smooth_v=True))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), call(q, k, v))


def test_the_backward_keeps_nothing_wide_of_q_k_and_v():
    saved = []
    problem = draw(128, d=64)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fp8.fp8_attention(*leaves(*problem[:3]))
    wide = [x for x in saved if x.dtype == torch.bfloat16]
    assert len(wide) == 1 and sum(x.dtype == torch.float8_e4m3fn for x in saved) == 3  # O alone


# ---------------------------------------------------------------------------------- bad input


def test_bad_input():
    q, k, v, _ = draw(16, d=64)
    cases = [
        ((q.to(torch.float8_e4m3fn), k, v), {}, TypeError, "q must be a 16-bit.*flash_attn_func"),
        ((q, fp8.quantize(k), v), {}, TypeError, "k must be a 16-bit"),
        ((q, k, v, "current"), {}, TypeError, "recipe must be.*'current'"),
        ((q, k, v), dict(window_size=3), TypeError, "window_size"),
        ((q, k[..., :32], v), {}, ValueError, "k must have q's head_dim 64"),
        ((q, k, v), dict(return_attn_probs=1), TypeError, "return_attn_probs"),
        ((q[..., :36], k[..., :36], v, fp8.BlockScaling(hadamard=1)), {}, ValueError, "8.*36"),
        (
            (q, k, v, fp8.CurrentScaling(smooth_k=True)),
            dict(softcap=5.0),
            ValueError,
            "smooth_k.*softcap = 5.0",
        ),
        (
            (q, k, v, fp8.CurrentScaling(smooth_v=True)),
            dict(dropout_p=0.5),
            ValueError,
            "smooth_v.*dropout_p = 0.5",
        ),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            fp8.fp8_attention(*arguments, **options)


def test_no_second_order():
    q, k, v, dout = draw(16, d=64)
    xs = leaves(q, k, v)
    out = fp8.fp8_attention(*xs)
    (dq,) = torch.autograd.grad(out, xs[0], dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"first-order|double backward|does not require grad"):
        dq.sum().backward()

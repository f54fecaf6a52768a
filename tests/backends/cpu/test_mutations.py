"""A tolerance that nothing fails is worth nothing: each mistake here must be caught by its check.

A mutant changes what the call under test is given (or what it gave); the reference keeps the
truth.  First the unchanged call passes the same check, so a failure is the mutation's doing.
"""

from dataclasses import replace

import pytest
import torch

import flash8
import fp8_model
import oracle
from cases import (
    Case,
    as_leaves,
    build,
    check_backward,
    check_forward,
    gradients,
    run_flash8,
    upstream,
)
from fp8_cases import inputs, quantised, sink_key
from fp8_model import Kernel
from kvcache_cases import call
from kvcache_cases import check as check_cache
from kvcache_cases import problem as cache_problem
from tolerances import (
    FP8_ACCUMULATION,
    FP8_REL_L2,
    FP8_ROW_REL_L2,
    FP8_SINK_KEY,
    check_fp8,
    check_fp8_lse,
    rel_l2,
    row_rel_l2,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BASE = Case((100, 100), (120, 120), heads=4, heads_kv=2, head_dim=64, head_dim_v=64)


def caught(check, *args, **kwargs):
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


# ------------------------------------------------- wrong arguments, as a wrong kernel would act

WRONG_OPTION = {
    "mask not applied": (dict(causal=True), dict(causal=False)),
    "causal anchored one key late": (dict(causal=True), dict(causal=False, window_size=(-1, 1))),
    "left bound off by one": (dict(window_size=(9, 4)), dict(window_size=(8, 4))),
    "right bound off by one": (dict(window_size=(9, 4)), dict(window_size=(9, 5))),
    "chunk off by one": (dict(attention_chunk=16), dict(attention_chunk=17)),
    "scale of another head dim": ({}, dict(softmax_scale=80**-0.5)),
    "scale forgotten": ({}, dict(softmax_scale=1.0)),
    "scale without qv": (dict(qv=True), dict(softmax_scale=64**-0.5)),
    "softcap forgotten": (dict(softcap=3.0, spread=2.0), dict(softcap=0.0)),
    "another softcap": (dict(softcap=3.0, spread=2.0), dict(softcap=3.3)),
    "sink dropped": (dict(sink=True), dict(sink=False)),
    "qv dropped": (dict(qv=True), dict(qv=False)),
    "alibi dropped": (dict(alibi="h"), dict(alibi=None)),
    "dropout dropped": (dict(dropout_p=0.1), dict(dropout_p=0.0)),
    "another dropout rate": (dict(dropout_p=0.1), dict(dropout_p=0.12)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG_OPTION)
def test_wrong_option(name, dtype):
    true, changed = WRONG_OPTION[name]
    problem = build(BASE.with_(dtype=dtype, **true))
    check_forward(problem)
    mutant = build(problem.case.with_(**changed))
    mutant.q, mutant.k, mutant.v = problem.q, problem.k, problem.v
    caught(check_forward, problem, result=run_flash8(mutant))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG_OPTION)
def test_wrong_option_in_the_backward(name, dtype):
    true, changed = WRONG_OPTION[name]
    problem = build(BASE.with_(dtype=dtype, **true))
    mutant = build(problem.case.with_(**changed))
    mutant.q, mutant.k, mutant.v = problem.q, problem.k, problem.v
    d_out, d_lse = upstream(problem)
    found = gradients(as_leaves(mutant), run_flash8, d_out, d_lse)
    missing = as_leaves(problem).leaves().keys() - found.keys()
    found.update({n: torch.zeros_like(problem.leaves()[n]) for n in missing})
    caught(check_backward, problem, found=found)


# ----------------------------------------------------------------------------- wrong results


def test_a_tile_left_out():
    """A key block that one query block never visits."""
    problem = build(Case((300,), (1100,), causal=True))
    mutant = replace(problem, k=problem.k.clone())
    mutant.k[:, 512:640] = -1e4 * problem.q.mean(dim=(1, 2))[:, None, None, :]
    check_forward(problem)
    caught(check_forward, problem, result=run_flash8(mutant))


RESULTS = {
    "zero O": lambda o, lse: (o * 0, lse),
    "O of the next row": lambda o, lse: (o.roll(1, dims=1), lse),
    "O of the next head": lambda o, lse: (o.roll(1, dims=2), lse),
    "O of the next batch": lambda o, lse: (o.roll(1, dims=0), lse),
    "one row not written": lambda o, lse: (o.index_fill(1, torch.tensor([50]), 0.0), lse),
    "one element is NaN": lambda o, lse: (_with_nan(o), lse),
    "O two percent off": lambda o, lse: (o * 1.02, lse),
    "LSE in log2": lambda o, lse: (o, lse / 0.6931471805599453),
    "LSE without the maximum's last bits": lambda o, lse: (o, lse + 1e-3),
    "LSE of another row": lambda o, lse: (o, lse.roll(1, dims=2)),
    "LSE is zero": lambda o, lse: (o, lse * 0),
}


def _with_nan(o):
    o = o.clone()
    o[1, 7, 1, 3] = float("nan")
    return o


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RESULTS)
def test_wrong_result(name, dtype):
    problem = build(BASE.with_(dtype=dtype))
    found = run_flash8(problem)
    check_forward(problem, result=found)
    caught(check_forward, problem, result=RESULTS[name](*found))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("leaf", ["q", "k", "v", "s_aux"])
@pytest.mark.parametrize("factor", [0.0, 1.05, -1.0])
def test_wrong_gradient(leaf, factor, dtype):
    problem = build(BASE.with_(dtype=dtype, sink=True, causal=True))
    d_out, d_lse = upstream(problem)
    found = gradients(as_leaves(problem), run_flash8, d_out, d_lse)
    check_backward(problem, found=found)
    found[leaf] = found[leaf] * factor
    caught(check_backward, problem, found=found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lse_gradient_forgotten(dtype):
    problem = build(BASE.with_(dtype=dtype))
    d_out, _ = upstream(problem)
    found = gradients(as_leaves(problem), run_flash8, d_out, None)
    check_backward(problem, with_lse=False, found=found)
    caught(check_backward, problem, found=found)


def test_row_of_a_masked_query_that_is_not_zero():
    problem = build(BASE.with_(seqlens_q=(120, 120), seqlens_k=(100, 100), causal=True))
    out, lse = run_flash8(problem)
    out[0, 3] = 1e-30
    caught(check_forward, problem, result=(out, lse))
    out[0, 3] = 0.0
    lse[0, :, 3] = float("inf")
    caught(check_forward, problem, result=(out, lse))


# ---------------------------------------------------------------------------------- KV cache


def rotary_mutants(step):
    cos, sin = step.rotary_cos, step.rotary_sin
    yield "one position late", dict(rotary_cos=cos.roll(-1, 0), rotary_sin=sin.roll(-1, 0))
    yield "wrong direction", dict(rotary_sin=-sin)
    yield "other pairing", dict(rotary_interleaved=not step.rotary_interleaved)
    yield "not rotated", dict(rotary_cos=None, rotary_sin=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_wrong_rotary(interleaved, dtype):
    q, k_cache, v_cache, step = cache_problem(dtype, new=3, rotary_dim=16, interleaved=interleaved)
    check_cache(q, k_cache, v_cache, step, causal=True)
    for _, changes in rotary_mutants(step):
        caught(_cache_against, step, replace(step, **changes), q, k_cache, v_cache)


def _cache_against(truth, given, q, k_cache, v_cache):
    """flash8 gets `given`, the oracle `truth`: O, LSE and the caches are compared."""
    k_after, v_after = k_cache.clone(), v_cache.clone()
    out, _lse, *_ = call(q, k_after, v_after, given, causal=True)
    reference = truth.attention(q, k_cache, v_cache, causal=True)
    assert rel_l2(out, reference[0]) < 0.01
    assert (k_after.double() - reference[2].double()).abs().max() < 0.05
    assert torch.equal(v_after, reference[3])


CACHE_MUTANTS = {
    "length off by one": dict(cache_seqlens=1),
    "leftpad off by one": dict(cache_leftpad=1),
    "page of another sequence": dict(page_table=None),
}


@pytest.mark.parametrize("name", CACHE_MUTANTS)
def test_wrong_cache_index(name):
    q, k_cache, v_cache, step = cache_problem(page_size=4, leftpad=True, lengths=(9, 17, 30))
    _cache_against(step, step, q, k_cache, v_cache)
    (field, shift), *_ = CACHE_MUTANTS[name].items()
    value = getattr(step, field)
    wrong = value.roll(1, 0) if shift is None else value + shift
    caught(_cache_against, step, replace(step, **{field: wrong}), q, k_cache, v_cache)


# -------------------------------------------------------------------------------------- e4m3


def fp8_check(out, lse, reference, reference_lse):
    check_fp8("O", out, reference)
    check_fp8_lse("LSE", lse, reference_lse)


def test_fp8_wrong_results():
    tensors, descales = quantised(*inputs(200, 600, 4, 2, batch=2))
    out, lse = flash8.flash_attn_func(*tensors, return_attn_probs=True, **descales)
    truth = oracle.attention(*tensors, **descales)
    fp8_check(out, lse, *truth)
    caught(fp8_check, out * 0, lse, *truth)
    caught(fp8_check, out * 1.04, lse, *truth)
    caught(fp8_check, out.roll(1, 1), lse, *truth)
    caught(fp8_check, out.index_fill(1, torch.tensor([7]), 0.0), lse, *truth)
    caught(fp8_check, out, lse + 8 * 0.6931471805599453, *truth)  # the offset of P left in LSE
    caught(fp8_check, out, lse + 2e-3, *truth)


@pytest.mark.parametrize("wrong", ["q", "k", "v", "swapped k v", "swapped heads", "swapped batch"])
def test_fp8_wrong_descales(wrong):
    q, k, v = inputs(200, 600, 4, 2, batch=2)
    size = torch.tensor([1.0, 1.3])[None, None, :, None]  # heads of different size
    k, v = k * size, v * size * torch.tensor([1.0, 1.2])[:, None, None, None] * 1.1
    tensors, truth = quantised(q, k, v)
    reference = oracle.attention(*tensors, **truth)
    given = dict(truth)
    if wrong in truth or f"{wrong}_descale" in truth:
        given[f"{wrong}_descale"] = None
    elif wrong == "swapped k v":
        given.update(k_descale=truth["v_descale"], v_descale=truth["k_descale"])
    else:
        dim = 1 if wrong == "swapped heads" else 0
        given = {n: x.flip(dim) for n, x in truth.items()}
    fp8_check(*flash8.flash_attn_func(*tensors, return_attn_probs=True, **truth), *reference)
    found = flash8.flash_attn_func(*tensors, return_attn_probs=True, **given)
    caught(fp8_check, *found, *reference)


FP8_MASKS = {
    "causal forgotten": (dict(causal=True), {}),
    "causal off by one": (dict(causal=True), dict(window_size=(-1, 1))),
    "causal off by one the other way": (dict(window_size=(-1, 1)), dict(causal=True)),
    "window off by one": (dict(window_size=(30, 30)), dict(window_size=(29, 30))),
    "sink dropped": (dict(s_aux=torch.tensor([5.0, 5.0])), {}),
}


@pytest.mark.parametrize("name", FP8_MASKS)
def test_fp8_wrong_mask(name):
    true, wrong = FP8_MASKS[name]
    tensors, descales = quantised(*inputs(300, 300))
    reference, reference_lse = oracle.attention(*tensors, **descales, **true)

    def check(options):
        out, lse = flash8.flash_attn_func(*tensors, return_attn_probs=True, **descales, **options)
        FP8_REL_L2.check("O", rel_l2(out, reference))
        FP8_ROW_REL_L2.check("row of O", row_rel_l2(out, reference))
        check_fp8_lse("LSE", lse, reference_lse)

    check(true)
    caught(check, wrong)


def model_run(kernel, tensors, descales):
    q8, k8, v8 = (x[0, :, 0].float() for x in tensors)
    scale = {n: x.item() for n, x in descales.items()}
    return kernel.run(q8 * scale["q_descale"], k8 * scale["k_descale"], v8, scale["v_descale"])


def model_against(bound, kernel, tensors, descales):
    reference, _ = oracle.attention(*tensors, **descales)
    out, _ = model_run(kernel, tensors, descales)
    bound.check("O", rel_l2(out, reference[0, :, 0]))


def test_fp8_promotion_switched_off():
    case = quantised(*inputs(16, 16384, 1, 1, dv=16, mean_v=0.5))
    model_against(FP8_ACCUMULATION, Kernel(hardware_sum=True), *case)
    caught(model_against, FP8_ACCUMULATION, Kernel(hardware_sum=True, promote=False), *case)


@pytest.mark.parametrize(
    "kernel",
    [Kernel(block_local=False), Kernel(offset=0.0), Kernel(offset=0.0, block_local=False)],
    ids=["running reference", "P unscaled", "P unscaled, running reference"],
)
def test_fp8_one_key_far_above_the_rest(kernel):
    case = sink_key(0)
    model_against(FP8_SINK_KEY, Kernel(), *case)
    caught(model_against, FP8_SINK_KEY, kernel, *case)


def test_fp8_offset_and_lazy_rescale_clip_p():
    case = quantised(*inputs(64, 1024, 1, 1, dv=64))
    model_against(FP8_REL_L2, Kernel(block_local=False), *case)
    caught(model_against, FP8_REL_L2, Kernel(block_local=False, lazy=4.0), *case)


def test_fp8_row_sum_of_the_rounded_p():
    case = quantised(*inputs(64, 1024, 1, 1, dv=64))
    _, reference_lse = oracle.attention(*case[0], **case[1])
    check_fp8_lse("LSE", model_run(Kernel(), *case)[1], reference_lse[0, 0])
    _, lse = model_run(Kernel(sum_rounded_p=True), *case)
    caught(check_fp8_lse, "LSE", lse, reference_lse[0, 0])


def test_the_model_of_the_tensor_core_loses_what_hardware_loses():
    """13 bits below the largest exponent survive: 1 + 2^-13 does, 1 + 2^-14 does not."""
    one = torch.ones(1, 1, dtype=torch.float64)
    for exponent, kept in ((-13, True), (-14, False)):
        v = torch.full((1, 1), 2.0**exponent, dtype=torch.float64)
        assert (fp8_model.tensor_core(one, v, one) != 1.0).item() is kept

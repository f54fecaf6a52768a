"""Dense forward against the float64 oracle: FA3's rule in 16 bits, absolute bounds above."""

from dataclasses import replace

import pytest
import torch

import flash8
import oracle
from cases import build, check_forward, factor, run_flash8, run_oracle
from cpu_cases import GROUPS, LONG, OPTIONS, case
from tolerances import check_absolute, check_fa3, check_lse

SHAPES = [(1, 1), (1, 131), (131, 1), (64, 128), (113, 203), (203, 113), (127, 129), (128, 128)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, dtype):
    check_forward(build(case(dtype=dtype, **OPTIONS[option])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_over_many_tiles(option, dtype):
    check_forward(build(case(*LONG, batch=1, dtype=dtype, **OPTIONS[option])))


@pytest.mark.parametrize("window_size", [(600, 0), (600, 300), (3, -1), (-1, 700)])
def test_windows_wider_than_a_tile(window_size):
    check_forward(build(case(700, 1300, 1, window_size=window_size)))


@pytest.mark.parametrize("shape", [(1, 4096), (4096, 1), (1030, 1030), (1100, 500), (513, 1025)])
def test_long_shapes(shape):
    for causal in (False, True):
        check_forward(build(case(*shape, batch=1, heads=1, causal=causal)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, causal):
    check_forward(build(case(*shape, dtype=dtype, causal=causal)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_heads(group, dtype):
    heads, heads_kv = GROUPS[group]
    check_forward(build(case(heads=heads, heads_kv=heads_kv, dtype=dtype, causal=True)))


@pytest.mark.parametrize(
    "head_dim,head_dim_v",
    [
        (1, 1),
        (8, 1),
        (1, 8),
        (7, 13),
        (64, 64),
        (59, 59),
        (96, 128),
        (192, 128),
        (64, 512),
        (512, 512),
    ],
)
def test_head_dims(head_dim, head_dim_v):
    for dtype in (torch.float64, torch.float16):
        check_forward(build(case(37, 70, 1, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("option", ["full", "causal", "window", "softcap", "chunk"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_fa3_rule_to_the_letter(head_dim, option, dtype):
    shape = case(256, 320, heads=4, heads_kv=2, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype)
    problem = build(shape.with_(**OPTIONS[option]))
    out, lse = run_flash8(problem)
    reference, reference_lse = run_oracle(problem)
    emulation, _ = run_oracle(problem, dtype=dtype)
    check_fa3("O", out, reference, emulation, factor=factor(problem.case))
    check_lse("LSE", lse, reference_lse, dtype)


@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_splits_change_nothing_but_rounding(num_splits, dtype):
    options = dict(causal=True, sink=True, num_splits=num_splits)
    for seqlen_k in (300, 2500):
        check_forward(build(case(5, seqlen_k, dtype=dtype, **options)))


@pytest.mark.parametrize("pack_gqa", [None, False, True])
@pytest.mark.parametrize("sm_margin", [0, 8])
def test_hints_are_accepted_and_change_nothing(pack_gqa, sm_margin):
    problem = build(case(heads=4, heads_kv=2))
    plain, _ = run_flash8(problem)
    hinted, _ = run_flash8(problem, pack_gqa=pack_gqa, sm_margin=sm_margin, deterministic=True)
    assert torch.equal(plain, hinted)


@pytest.mark.parametrize("batch,seqlen_q,seqlen_k", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("sink", [False, True])
def test_empty(batch, seqlen_q, seqlen_k, sink):
    problem = build(case(seqlen_q or 1, seqlen_k or 1, batch or 1, sink=sink))
    q = problem.q[:batch, :seqlen_q]
    k, v = problem.k[:batch, :seqlen_k], problem.v[:batch, :seqlen_k]
    out, lse = flash8.flash_attn_func(q, k, v, s_aux=problem.s_aux, return_attn_probs=True)
    expected, expected_lse = oracle.attention(q, k, v, s_aux=problem.s_aux)
    assert out.shape == expected.shape and lse.shape == expected_lse.shape
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_strided_inputs():
    for order in [(0, 2, 1, 3), (3, 1, 2, 0), (1, 0, 2, 3)]:
        q, k, v = (torch.randn(2, 33, 2, 16, dtype=torch.float64) for _ in range(3))
        back = torch.tensor(order).argsort().tolist()
        strided = [x.permute(order).contiguous().permute(back) for x in (q, k, v)]
        assert torch.equal(
            flash8.flash_attn_func(q, k, v, causal=True),
            flash8.flash_attn_func(*strided, causal=True),
        )
    wide = torch.randn(2, 33, 2, 64, dtype=torch.float64)
    q = wide[..., ::4]
    assert torch.equal(
        flash8.flash_attn_func(q, q, q),
        flash8.flash_attn_func(*[q.contiguous()] * 3),
    )
    one = torch.randn(1, 33, 1, 16, dtype=torch.float64).expand(2, 33, 2, 16)
    assert torch.equal(
        flash8.flash_attn_func(one, one, one),
        flash8.flash_attn_func(*[one.contiguous()] * 3),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_filled_and_returned(dtype):
    problem = build(case(33, 20, dtype=dtype, causal=True))
    plain, lse = run_flash8(problem)
    out = torch.full((2, 2, 33, 24), float("nan"), dtype=dtype).transpose(1, 2)[..., 4:20]
    returned, lse_out = run_flash8(problem, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, plain) and torch.equal(lse, lse_out)


def test_large_logits_do_not_overflow():
    problem = build(case(65, 130, dtype=torch.float32))
    for factor_ in (1e3, -1e3):
        large = replace(problem, q=problem.q * factor_)
        (out, lse), (reference, reference_lse) = run_flash8(large), run_oracle(large)
        # S is about 1e3, so fp32 rounds it, and with it log(P), by about 1e3 * 6e-8.
        check_absolute("O", out, reference, 1e-3)
        check_absolute("LSE", lse, reference_lse, 1e-6)
    shifted = build(case(3, 130, dtype=torch.float32, head_dim=1, head_dim_v=4))
    shifted.q.fill_(1e4)
    shifted.k.copy_(-1.0 + 1e-3 * torch.linspace(0, 1, 130)[None, :, None, None])
    out, _ = run_flash8(shifted)
    reference, _ = run_oracle(shifted)
    assert (out.double() - reference).abs().max() < 1e-2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_masked_keys_do_not_leak(value):
    problem = build(case(40, 40, causal=True))
    expected, expected_lse = run_flash8(problem)
    problem.k[:, -1] = value
    out, lse = run_flash8(problem)
    assert torch.equal(out[:, :-1], expected[:, :-1])
    assert torch.equal(lse[..., :-1], expected_lse[..., :-1])


def test_visible_nan_reaches_the_output():
    problem = build(case(40, 40))
    problem.v[0, 7, 0, 3] = float("nan")
    out, _ = run_flash8(problem)
    assert out[0, :, :, 3].isnan().all() and not out[1].isnan().any()


@pytest.mark.parametrize("layout", ["five", "four"])
def test_qkvpacked(layout):
    heads, heads_kv = (2, 2) if layout == "five" else (4, 2)
    problem = build(case(50, 50, heads=heads, heads_kv=heads_kv, causal=True, sink=True))
    q, k, v = problem.q, problem.k, problem.v
    if layout == "five":
        qkv, extra = torch.stack([q, k, v], dim=2), {}
    else:
        qkv, extra = torch.cat([q, k, v], dim=2), dict(num_heads_q=heads)
    found = flash8.flash_attn_qkvpacked_func(
        qkv, causal=True, s_aux=problem.s_aux, return_attn_probs=True, **extra
    )
    check_forward(problem, result=found)


def test_kvpacked():
    problem = build(case(50, 70, heads=4, heads_kv=2, causal=True))
    kv = torch.stack([problem.k, problem.v], dim=2)
    found = flash8.flash_attn_kvpacked_func(problem.q, kv, causal=True, return_attn_probs=True)
    check_forward(problem, result=found)


def test_returns_out_alone_unless_asked():
    q = torch.randn(1, 4, 1, 8)
    assert isinstance(flash8.flash_attn_func(q, q, q), torch.Tensor)
    out, lse = flash8.flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (1, 1, 4) and lse.dtype == torch.float32

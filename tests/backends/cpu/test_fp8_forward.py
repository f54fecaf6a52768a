"""Raw e4m3 q, k, v: the accuracy bounds of tolerances.py that concern the forward, and layouts."""

import pytest
import torch

import flash8
import fp8_model
import oracle
from cases import cumulative, int32
from fp8_cases import inputs, quantised, sink_key
from tolerances import (
    FP8_ACCUMULATION,
    FP8_LSE_OUTLIER,
    FP8_MODEL,
    FP8_REL_L2,
    FP8_ROW_REL_L2,
    FP8_SINK_KEY,
    FP8_UNQUANTISED,
    check_fp8,
    check_fp8_lse,
    rel_l2,
    row_rel_l2,
)


def run_both(tensors, **options):
    out, lse = flash8.flash_attn_func(*tensors, return_attn_probs=True, **options)
    reference, reference_lse = oracle.attention(*tensors, **options)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    return out, lse, reference, reference_lse


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("seqlen", [512, 1000])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_against_the_dequantised_inputs(seqlen, heads_kv, seed):
    tensors, descales = quantised(*inputs(200, seqlen, 2, heads_kv, batch=2, seed=seed))
    out, lse, reference, reference_lse = run_both(tensors, **descales)
    check_fp8("O", out, reference)
    check_fp8_lse("LSE", lse, reference_lse)


@pytest.mark.parametrize("d,dv", [(64, 64), (256, 256), (96, 32), (40, 77)])
def test_head_dims(d, dv):
    tensors, descales = quantised(*inputs(100, 700, d=d, dv=dv))
    out, lse, reference, reference_lse = run_both(tensors, **descales)
    check_fp8("O", out, reference)
    check_fp8_lse("LSE", lse, reference_lse)


OPTIONS = {
    "causal": dict(causal=True),
    "window": dict(window_size=(200, 50)),
    "chunk": dict(attention_chunk=300),
    "softcap": dict(softcap=4.0),
    "sink": dict(s_aux=torch.tensor([2.0, -1.0])),
    "causal sink": dict(causal=True, s_aux=torch.tensor([9.0, 0.0])),
    "alibi": dict(alibi_slopes=torch.tensor([0.01, 0.002]), causal=True),
    "scale": dict(softmax_scale=0.15),
    "splits": dict(num_splits=3),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    """Rows with few keys make max/rms meaningless, so the bounds are relL2 of all and of a row."""
    options = dict(OPTIONS[option])
    tensors, descales = quantised(*inputs(600, 600))
    splits = options.pop("num_splits", 1)
    out, lse = flash8.flash_attn_func(
        *tensors, return_attn_probs=True, num_splits=splits, **descales, **options
    )
    reference, reference_lse = oracle.attention(*tensors, **descales, **options)
    FP8_REL_L2.check("O", rel_l2(out, reference))
    FP8_ROW_REL_L2.check("row of O", row_rel_l2(out, reference))
    check_fp8_lse("LSE", lse, reference_lse)


def test_lse_with_logits_of_standard_deviation_two():
    q, k, v = inputs(100, 600)
    tensors, descales = quantised(q * 2.0, k, v)
    _, lse, _, reference_lse = run_both(tensors, **descales)
    check_fp8_lse("LSE", lse, reference_lse)


def test_lse_with_outlier_channels_in_k():
    q, k, v = inputs(100, 600)
    k[..., :4] += 12.0
    tensors, descales = quantised(q, k, v)
    _, lse, _, reference_lse = run_both(tensors, **descales)
    check_fp8_lse("LSE", lse, reference_lse, FP8_LSE_OUTLIER)


def test_accumulation_over_many_keys():
    tensors, descales = quantised(*inputs(32, 16384, 1, 1, dv=32, mean_v=0.5))
    out, _, reference, _ = run_both(tensors, **descales)
    FP8_ACCUMULATION.check("O", rel_l2(out, reference))


@pytest.mark.parametrize("position", [0, 1023, 2047])
def test_one_key_far_above_the_rest(position):
    tensors, descales = sink_key(position)
    out, _, reference, _ = run_both(tensors, **descales)
    FP8_SINK_KEY.check("O", rel_l2(out, reference))


def test_against_the_unquantised_inputs():
    q, k, v = inputs(400, 1024)
    tensors, descales = quantised(q, k, v)
    out = flash8.flash_attn_func(*tensors, **descales)
    FP8_UNQUANTISED.check("O", rel_l2(out, oracle.attention(q, k, v)[0]))


def test_against_a_block_exact_kernel():
    """The CPU backend walks key blocks of 128, as the model does (in the other direction)."""
    tensors, descales = quantised(*inputs(64, 1000, 1, 1, dv=64))
    out = flash8.flash_attn_func(*tensors, **descales)[0, :, 0]
    scale = [x.item() for x in descales.values()]
    modelled, _ = fp8_model.Kernel(hardware_sum=True).run(
        tensors[0][0, :, 0].float() * scale[0],
        tensors[1][0, :, 0].float() * scale[1],
        tensors[2][0, :, 0].float(),
        scale[2],
    )
    FP8_MODEL.check("O", rel_l2(out, modelled))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_one_visible_key_is_exact(out_dtype):
    tensors, descales = quantised(*inputs(300, 300, 2, 1, dv=64))
    out = torch.empty(1, 300, 2, 64, dtype=out_dtype)
    flash8.flash_attn_func(*tensors, window_size=(0, 0), out=out, **descales)
    expected = (tensors[2].float() * descales["v_descale"].item()).to(out_dtype)
    assert torch.equal(out, expected.expand_as(out))


def test_rows_that_see_only_the_sink_or_nothing():
    tensors, descales = quantised(*inputs(40, 25))
    sink = torch.tensor([1.5, -2.0])
    out, lse = flash8.flash_attn_func(
        *tensors, causal=True, s_aux=sink, return_attn_probs=True, **descales
    )
    assert (out[:, :15] == 0).all() and (out[:, 15:] != 0).any(-1).all()
    assert torch.allclose(lse[0, :, :15], sink[:, None].expand(2, 15), atol=1e-6)
    out, lse = flash8.flash_attn_func(*tensors, causal=True, return_attn_probs=True, **descales)
    assert (out[:, :15] == 0).all() and torch.isneginf(lse[..., :15]).all()


def test_descales_may_be_scalars_or_absent():
    tensors, _ = quantised(*inputs(50, 60, batch=2))
    plain = flash8.flash_attn_func(*tensors)
    scale = {f"{x}_descale": torch.tensor(0.5) for x in "qkv"}
    full = {name: value.expand(2, 1).contiguous() for name, value in scale.items()}
    scalar = flash8.flash_attn_func(*tensors, **scale)
    assert torch.equal(scalar, flash8.flash_attn_func(*tensors, **full))
    explicit = flash8.flash_attn_func(*tensors, softmax_scale=0.25 * 128**-0.5)
    assert torch.equal(scalar, (explicit.float() * 0.5).bfloat16())
    assert not torch.equal(scalar, plain)


def test_the_descale_applies_before_the_softcap():
    tensors, descales = quantised(*inputs(50, 60))
    loud = {**descales, "q_descale": descales["q_descale"] * 8}
    out, lse, reference, reference_lse = run_both(tensors, softcap=3.0, **loud)
    FP8_REL_L2.check("O", rel_l2(out, reference))
    check_fp8_lse("LSE", lse, reference_lse)


@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_varlen(layout):
    lengths_q, lengths_k = (100, 0, 300), (200, 50, 400)
    q, k, v = (x[0] for x in inputs(400, 650))
    q8, k8, v8 = (fp8_model.to_e4m3(x) for x in (q, k, v))
    descales = {f"{x}_descale": torch.rand(3, 1) + 0.5 for x in "qkv"}
    cu_k = cumulative(lengths_k)
    index = dict(cu_seqlens_q=cumulative(lengths_q), cu_seqlens_k=cu_k)
    if layout == "paged":
        table = torch.randperm(3 * 8 + 1)[:24].reshape(3, 8).to(torch.int32)
        pages = [torch.full((25, 56, 1, 128), float("nan")).to(fp8_model.FP8) for _ in range(2)]
        for b, length in enumerate(lengths_k):
            for t in range(length):
                for page, x in zip(pages, (k8, v8), strict=True):
                    page[int(table[b, t // 56]), t % 56] = x[int(cu_k[b]) + t]
        k8, v8 = pages
        index.update(cu_seqlens_k=None, page_table=table, seqused_k=int32(lengths_k))
    out, lse = flash8.flash_attn_varlen_func(
        q8,
        k8,
        v8,
        max_seqlen_q=300,
        max_seqlen_k=400,
        causal=True,
        return_attn_probs=True,
        **index,
        **descales,
    )
    reference, reference_lse = oracle.attention(q8, k8, v8, causal=True, **index, **descales)
    FP8_REL_L2.check("O", rel_l2(out, reference))
    check_fp8_lse("LSE", lse, reference_lse)


def test_kv_cache_append_in_e4m3():
    tensors, descales = quantised(*inputs(2, 64, batch=2))
    q8, k8, v8 = tensors
    k_cache, v_cache = (torch.zeros(2, 80, 1, 128).to(fp8_model.FP8) for _ in range(2))
    k_cache[:, :62], v_cache[:, :62] = k8[:, :62], v8[:, :62]
    out, lse, *_ = flash8.flash_attn_with_kvcache(
        q8,
        k_cache,
        v_cache,
        k8[:, 62:],
        v8[:, 62:],
        cache_seqlens=62,
        causal=True,
        return_softmax_lse=True,
        **descales,
    )
    expected, expected_lse = flash8.flash_attn_func(
        *tensors, causal=True, return_attn_probs=True, **descales
    )
    assert torch.equal(k_cache[:, :64].float(), k8.float())
    assert torch.equal(v_cache[:, :64].float(), v8.float())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_nan_in_e4m3_reaches_the_output_where_it_is_visible():
    (q8, k8, v8), descales = quantised(*inputs(40, 40, 1, 1))
    v8[0, 20, 0, 5] = float("nan")
    out = flash8.flash_attn_func(q8, k8, v8, causal=True, **descales)
    assert out[0, 20:, 0, 5].isnan().all() and not out[..., :5].isnan().any()


def test_gradients_are_refused_by_the_backward():
    """FA3 takes leaves in e4m3 too; what neither has is their gradient."""
    (q8, k8, v8), descales = quantised(*inputs(8, 8))
    out = flash8.flash_attn_func(q8.requires_grad_(), k8, v8, **descales)
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*backward"):
        out.float().sum().backward()
    with torch.no_grad():
        assert not flash8.flash_attn_func(q8, k8, v8, **descales).requires_grad

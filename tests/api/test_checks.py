"""Bad input ends in an exception that names the argument, its value and what is supported."""

import pytest
import torch

import flash8
from argument_cases import grad, ones, refuses
from cases import int32

FP8 = torch.float8_e4m3fn


def dense(**changes):
    """A valid flash_attn_func call, with `changes`."""
    arguments = dict(
        q=torch.randn(2, 5, 4, 16), k=torch.randn(2, 7, 2, 16), v=torch.randn(2, 7, 2, 8)
    )
    arguments.update(changes)
    return flash8.flash_attn_func(**arguments)


def varlen(**changes):
    arguments = dict(
        q=torch.randn(9, 4, 16),
        k=torch.randn(12, 2, 16),
        v=torch.randn(12, 2, 8),
        cu_seqlens_q=int32([0, 4, 9]),
        cu_seqlens_k=int32([0, 7, 12]),
        max_seqlen_q=5,
        max_seqlen_k=7,
    )
    arguments.update(changes)
    return flash8.flash_attn_varlen_func(**arguments)


def paged(**changes):
    arguments = dict(
        q=torch.randn(9, 4, 16),
        k=torch.randn(6, 4, 2, 16),
        v=torch.randn(6, 4, 2, 8),
        cu_seqlens_q=int32([0, 4, 9]),
        cu_seqlens_k=None,
        max_seqlen_q=5,
        max_seqlen_k=8,
        seqused_k=int32([7, 5]),
        page_table=int32([0, 3, 2, 5]).reshape(2, 2),
    )
    arguments.update(changes)
    return flash8.flash_attn_varlen_func(**arguments)


def fp8(**changes):
    q, k, v = (torch.randn(2, 5, h, 16).to(FP8) for h in (4, 2, 2))
    return flash8.flash_attn_func(**{**dict(q=q, k=k, v=v), **changes})


def latent(**changes):
    """A bf16 q and qv over e4m3 k and v."""
    q, qv = (torch.randn(2, 5, 4, d).bfloat16() for d in (16, 8))
    k, v = (torch.randn(2, 5, 2, d).to(FP8) for d in (16, 8))
    return flash8.flash_attn_func(**{**dict(q=q, k=k, v=v, qv=qv), **changes})


def test_the_calls_below_are_valid_when_unchanged():
    for call in (dense, varlen, paged, fp8, latent):
        call()


# call, what is wrong, exception, texts that the message must contain
BAD = [
    # type, dtype, device
    (dense, dict(q=[1.0]), TypeError, "q", "torch.Tensor", "[1.0]"),
    (dense, dict(k=None), TypeError, "k", "torch.Tensor", "None"),
    (dense, dict(q=ones(2, 5, 4, 16, dtype=torch.int32)), TypeError, "q", "bfloat16", "int32"),
    (dense, dict(q=ones(2, 5, 4, 16, dtype=torch.complex64)), TypeError, "q", "complex64"),
    (dense, dict(q=ones(2, 5, 4, 16).to(torch.float8_e5m2)), TypeError, "q", "float8_e5m2"),
    (dense, dict(k=ones(2, 7, 2, 16).half()), TypeError, "k", "float32", "float16"),
    (dense, dict(v=ones(2, 7, 2, 8).bfloat16()), TypeError, "v", "float32", "bfloat16"),
    (dense, dict(k=ones(2, 7, 2, 16, device="meta")), ValueError, "k", "cpu", "meta"),
    (dense, dict(s_aux=ones(4, device="meta")), ValueError, "s_aux", "cpu", "meta"),
    (dense, dict(q=ones(2, 5, 4, 16).to_sparse()), TypeError, "q", "strided", "sparse_coo"),
    # shapes
    (
        dense,
        dict(q=ones(5, 4, 16)),
        ValueError,
        "q",
        "batch, seqlen_q, heads, head_dim",
        "(5, 4, 16)",
    ),
    (dense, dict(k=ones(7, 2, 16)), ValueError, "k", "batch, seqlen_k", "(7, 2, 16)"),
    (dense, dict(k=ones(3, 7, 2, 16), v=ones(3, 7, 2, 8)), ValueError, "k", "batch", "2", "3"),
    (dense, dict(k=ones(2, 7, 2, 24)), ValueError, "k", "head_dim", "16", "24"),
    (dense, dict(v=ones(2, 6, 2, 8)), ValueError, "v", "(2, 7, 2, 16)", "(2, 6, 2, 8)"),
    (dense, dict(v=ones(2, 7, 1, 8)), ValueError, "v", "(2, 7, 2, 16)", "(2, 7, 1, 8)"),
    (dense, dict(q=ones(2, 5, 3, 16)), ValueError, "heads", "multiple", "3", "2"),
    (dense, dict(q=ones(2, 5, 0, 16)), ValueError, "heads", "positive", "0"),
    (dense, dict(q=ones(2, 5, 4, 0), k=ones(2, 7, 2, 0)), ValueError, "head_dim", "1", "512", "0"),
    (dense, dict(q=ones(2, 5, 4, 513), k=ones(2, 7, 2, 513)), ValueError, "head_dim", "512", "513"),
    (dense, dict(v=ones(2, 7, 2, 520)), ValueError, "head_dim_v", "512", "520"),
    # extra tensors
    (dense, dict(qv=ones(2, 5, 4, 16)), ValueError, "qv", "(2, 5, 4, 8)", "(2, 5, 4, 16)"),
    (dense, dict(qv=ones(2, 5, 4, 8).half()), TypeError, "qv", "float32", "float16"),
    (dense, dict(s_aux=ones(2)), ValueError, "s_aux", "(heads,)", "(4,)", "(2,)"),
    (dense, dict(s_aux=ones(4).half()), TypeError, "s_aux", "float32", "float16"),
    (dense, dict(alibi_slopes=ones(3)), ValueError, "alibi_slopes", "(4,)", "(3,)"),
    (dense, dict(alibi_slopes=ones(4, 2)), ValueError, "alibi_slopes", "(2, 4)", "(4, 2)"),
    (dense, dict(alibi_slopes=ones(4).int()), TypeError, "alibi_slopes", "float32", "int32"),
    (dense, dict(alibi_slopes=grad(4)), ValueError, "alibi_slopes", "requires_grad"),
    (dense, dict(q_descale=ones(2, 2)), ValueError, "q_descale", "float8_e4m3fn", "float32"),
    (dense, dict(out=ones(2, 5, 4, 16)), ValueError, "out", "(2, 5, 4, 8)", "(2, 5, 4, 16)"),
    (dense, dict(out=ones(2, 5, 4, 8).half()), TypeError, "out", "float32", "float16"),
    (dense, dict(out=ones(2, 5, 8, 4).mT), ValueError, "out", "contiguous", "strides"),
    (
        dense,
        dict(out=ones(1, 5, 4, 8).expand(2, 5, 4, 8)),
        ValueError,
        "out",
        "expanded",
        "strides",
    ),
    (dense, dict(out=ones(2, 5, 4, 8), q=grad(2, 5, 4, 16)), ValueError, "out", "grad", "no_grad"),
    # scalars
    (dense, dict(causal=1), TypeError, "causal", "bool", "1"),
    (dense, dict(return_attn_probs=None), TypeError, "return_attn_probs", "bool", "None"),
    (dense, dict(deterministic="yes"), TypeError, "deterministic", "bool", "yes"),
    (dense, dict(smooth_k=1), TypeError, "smooth_k", "bool", "1"),
    (dense, dict(smooth_k=True, softcap=2.0), ValueError, "smooth_k", "softcap", "2.0"),
    (
        dense,
        {name: ones(2, 5, 4, 16).to(torch.float8_e4m3fn) for name in "qkv"} | {"smooth_k": True},
        ValueError,
        "smooth_k",
        "float8",
        "quantize",
    ),
    (dense, dict(pack_gqa=2), TypeError, "pack_gqa", "bool", "2"),
    (dense, dict(softmax_scale="1"), TypeError, "softmax_scale", "number", "'1'"),
    (dense, dict(softmax_scale=0.0), ValueError, "softmax_scale", "greater than 0", "0.0"),
    (dense, dict(softmax_scale=-1.0), ValueError, "softmax_scale", "greater than 0", "-1.0"),
    (dense, dict(softmax_scale=float("nan")), ValueError, "softmax_scale", "finite", "nan"),
    (dense, dict(softmax_scale=torch.tensor(0.5)), TypeError, "softmax_scale", ".item()"),
    (dense, dict(softcap=torch.tensor(2.0)), TypeError, "softcap", ".item()"),
    (dense, dict(dropout_p=torch.tensor(0.1)), TypeError, "dropout_p", ".item()"),
    (dense, dict(window_size=torch.tensor([3, 0])), TypeError, "window_size", "integers", "tensor"),
    (dense, dict(window_size=3), TypeError, "window_size", "(left, right)", "3"),
    (dense, dict(window_size=(1, 2, 3)), TypeError, "window_size", "(left, right)", "(1, 2, 3)"),
    (dense, dict(window_size=(-2, 0)), ValueError, "window_size[0]", "-1", "-2"),
    (dense, dict(window_size=(0, 1.5)), TypeError, "window_size[1]", "integer", "1.5"),
    (dense, dict(attention_chunk=-1), ValueError, "attention_chunk", "0", "-1"),
    (dense, dict(softcap=-1.0), ValueError, "softcap", "0", "-1.0"),
    (dense, dict(softcap=float("inf")), ValueError, "softcap", "finite", "inf"),
    (dense, dict(num_splits=-1), ValueError, "num_splits", "0 to 256", "-1"),
    (dense, dict(num_splits=257), ValueError, "num_splits", "256", "257"),
    (dense, dict(num_splits=1.0), TypeError, "num_splits", "integer", "1.0"),
    (dense, dict(sm_margin=-3), ValueError, "sm_margin", "0", "-3"),
    (dense, dict(dropout_p=1.0), ValueError, "dropout_p", "less than 1", "1.0"),
    (dense, dict(dropout_p=-0.1), ValueError, "dropout_p", "at least 0", "-0.1"),
    (dense, dict(dropout_p=0.1, dropout_seed=1.5), TypeError, "dropout_seed", "integer", "1.5"),
    (
        dense,
        dict(dropout_p=0.1, dropout_seed=int32([1])),
        TypeError,
        "dropout_seed",
        "int64",
        "int32",
    ),
    (
        dense,
        dict(dropout_p=0.1, dropout_seed=torch.tensor([1, 2])),
        ValueError,
        "dropout_seed",
        "one element",
        "(2,)",
    ),
    (dense, dict(dropout_p=0.1, dropout_seed=2**63), ValueError, "dropout_seed", str(2**63)),
    # packed layouts
    (varlen, dict(q=ones(1, 9, 4, 16)), ValueError, "q", "total_q", "(1, 9, 4, 16)"),
    (varlen, dict(k=ones(1, 12, 2, 16)), ValueError, "k", "total_k", "(1, 12, 2, 16)"),
    (varlen, dict(cu_seqlens_q=[0, 4, 9]), TypeError, "cu_seqlens_q", "torch.Tensor", "[0, 4, 9]"),
    (
        varlen,
        dict(cu_seqlens_q=torch.tensor([0, 4, 9], dtype=torch.int16)),
        TypeError,
        "cu_seqlens_q",
        "int32",
        "int16",
    ),
    (varlen, dict(cu_seqlens_k=torch.tensor([0.0, 7, 12])), TypeError, "cu_seqlens_k", "int32"),
    (varlen, dict(cu_seqlens_q=int32([])), ValueError, "cu_seqlens_q", "batch + 1", "0"),
    (varlen, dict(cu_seqlens_q=int32([[0, 4, 9]])), ValueError, "cu_seqlens_q", "(1, 3)"),
    (varlen, dict(cu_seqlens_k=int32([0, 12])), ValueError, "cu_seqlens_k", "(3,)", "(2,)"),
    (varlen, dict(cu_seqlens_q=int32([1, 4, 9])), ValueError, "cu_seqlens_q", "start with 0", "1"),
    (varlen, dict(cu_seqlens_k=int32([0, 7, 6])), ValueError, "cu_seqlens_k", "decrease", "7", "6"),
    (varlen, dict(cu_seqlens_q=int32([0, 4, 10])), ValueError, "cu_seqlens_q", "9", "10"),
    (varlen, dict(cu_seqlens_k=int32([0, 7, 99])), ValueError, "cu_seqlens_k", "12", "99"),
    (varlen, dict(cu_seqlens_k=int32([0, -7, 12])), ValueError, "cu_seqlens_k", "-7"),
    (varlen, dict(max_seqlen_q=None), ValueError, "max_seqlen_q", "cu_seqlens_q", "None"),
    (varlen, dict(max_seqlen_k=6), ValueError, "max_seqlen_k", "at least", "7", "6"),
    (varlen, dict(max_seqlen_q=-1), ValueError, "max_seqlen_q", "0", "-1"),
    (varlen, dict(max_seqlen_q=5.0), TypeError, "max_seqlen_q", "integer", "5.0"),
    (varlen, dict(seqused_q=int32([4, 6])), ValueError, "seqused_q", "0 to 5", "index 1", "6"),
    (varlen, dict(seqused_k=int32([-1, 5])), ValueError, "seqused_k", "0 to 7", "index 0", "-1"),
    (varlen, dict(seqused_k=int32([1])), ValueError, "seqused_k", "(batch,)", "(1,)"),
    (varlen, dict(seqused_k=ones(2)), TypeError, "seqused_k", "int32", "int64", "float32"),
    (varlen, dict(cu_seqlens_q=torch.tensor([0, 4, 2**32 + 9])), ValueError, "cu_seqlens_q", "9"),
    (varlen, dict(seqused_k=torch.tensor([7, -(2**32)])), ValueError, "seqused_k", "0 to 5"),
    # paged
    (paged, dict(page_table=int32([0, 3])), ValueError, "page_table", "(batch, max_pages)", "(2,)"),
    (paged, dict(page_table=int32([[0, 3]])), ValueError, "page_table", "2 rows", "1"),
    (paged, dict(page_table=torch.zeros(2, 2)), TypeError, "page_table", "int32", "float32"),
    (
        paged,
        dict(page_table=int32([[0, 6], [1, 2]])),
        ValueError,
        "page_table",
        "0 to 5",
        "6",
        "[0, 1]",
    ),
    (paged, dict(page_table=int32([[0, 1], [1, -1]])), ValueError, "page_table", "0 to 5", "-1"),
    (paged, dict(seqused_k=None), ValueError, "page_table", "seqused_k", "None"),
    (paged, dict(seqused_k=int32([9, 5])), ValueError, "seqused_k", "0 to 8", "9"),
    (paged, dict(cu_seqlens_k=int32([0, 7, 12])), ValueError, "page_table", "cu_seqlens_k"),
    (paged, dict(k=ones(6, 0, 2, 16), v=ones(6, 0, 2, 8)), ValueError, "page_size", "1"),
    (paged, dict(k=ones(24, 2, 16)), ValueError, "k", "page_size", "(24, 2, 16)"),
    # e4m3
    (fp8, dict(q_descale=ones(2, 3)), ValueError, "q_descale", "(2, 2)", "(2, 3)"),
    (fp8, dict(k_descale=ones(2, 4)), ValueError, "k_descale", "(2, 2)", "(2, 4)"),
    (fp8, dict(v_descale=ones(1, 2)), ValueError, "v_descale", "(2, 2)", "(1, 2)"),
    (fp8, dict(v_descale=ones(1)), ValueError, "v_descale", "(2, 2)", "(1,)"),
    (fp8, dict(k_descale=ones(2, 2).half()), TypeError, "k_descale", "float32", "float16"),
    (fp8, dict(v_descale=0.5), TypeError, "v_descale", "torch.Tensor", "0.5"),
    (fp8, dict(k_descale=ones(2, 2, device="meta")), ValueError, "k_descale", "cpu", "meta"),
    (fp8, dict(qv=ones(2, 5, 4, 16).to(FP8)), ValueError, "qv", "float8_e4m3fn", "bfloat16"),
    (latent, dict(v_mean=ones(2, 8)), ValueError, "v_mean", "qv"),
    (fp8, dict(out=ones(2, 5, 4, 16)), TypeError, "out", "bfloat16", "float16", "float32"),
    (fp8, dict(k=ones(2, 5, 2, 16)), TypeError, "k", "float8_e4m3fn", "float32"),
]


def describe(row):
    call, changes, *_ = row
    shown = [
        f"{name}={tuple(x.shape) if isinstance(x, torch.Tensor) else x}"
        for name, x in changes.items()
    ]
    return f"{call.__name__} {' '.join(shown)}"


@pytest.mark.parametrize("row", BAD, ids=describe)
def test_bad_argument(row):
    refuses(*row)


def test_out_that_shares_memory_with_an_input():
    q = torch.randn(1, 5, 2, 16)
    refuses(dense, dict(q=q, k=q.clone(), v=q.clone(), out=q), ValueError, "out", "share", "q")


@pytest.mark.parametrize(
    "qkv,extra,texts",
    [
        (ones(2, 5, 2, 4, 16), {}, ("qkv", "3", "(2, 5, 2, 4, 16)")),
        (ones(2, 5, 4, 16), {}, ("qkv", "(2, 5, 4, 16)")),
        (ones(2, 5, 8, 16), dict(num_heads_q=8), ("num_heads_q", "8")),
        (ones(2, 5, 8, 16), dict(num_heads_q=5), ("num_heads_q", "8", "5")),
        (ones(2, 5, 8, 16), dict(num_heads_q=0), ("num_heads_q", "1", "0")),
    ],
)
def test_qkvpacked(qkv, extra, texts):
    refuses(flash8.flash_attn_qkvpacked_func, dict(qkv=qkv, **extra), ValueError, *texts)


def test_kvpacked():
    arguments = dict(q=ones(2, 5, 4, 16), kv=ones(2, 5, 3, 2, 16))
    refuses(flash8.flash_attn_kvpacked_func, arguments, ValueError, "kv", "2", "(2, 5, 3, 2, 16)")
    arguments["kv"] = ones(2, 5, 4, 16)
    refuses(flash8.flash_attn_kvpacked_func, arguments, ValueError, "kv", "(2, 5, 4, 16)")


@pytest.mark.parametrize(
    "arguments,error,texts",
    [
        (dict(p=1.5), ValueError, ("dropout_p", "1.5")),
        (dict(heads=-1), ValueError, ("heads", "-1")),
        (dict(seqlen_k=2.5), TypeError, ("seqlen_k", "2.5")),
        (dict(seed="a"), TypeError, ("dropout_seed", "'a'")),
    ],
)
def test_dropout_mask(arguments, error, texts):
    valid = dict(seed=1, batch=1, heads=1, seqlen_q=2, seqlen_k=2, p=0.5)
    refuses(flash8.dropout_mask, {**valid, **arguments}, error, *texts)

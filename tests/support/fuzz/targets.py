"""Public functions and arguments with which each of them is right, small and of every kind."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash8
from cases import cumulative, int32
from flash8 import fp8, gemm, varlen
from flash8.fp8 import Rope, Rotation
from flash8.nn import Fp8Linear
from fuzz.calls import attention_call, cache_call
from grouped_gemm_cases import make, make_along_k

Target = tuple[Callable[..., Any], dict[str, Any]]
WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def randn(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**40))
    return torch.randn(*shape, generator=generator).to(dtype)


def _public(
    call: Callable[[random.Random], tuple[str, dict[str, Any]]], rng: random.Random
) -> Target:
    name, arguments = call(rng)
    return getattr(flash8, name), arguments


def _packed(rng: random.Random) -> Target:
    """The functions whose q, k and v come in one tensor."""
    dtype = rng.choice(WIDE)
    lengths = [rng.choice([0, 1, 3, 9]) for _ in range(2)]
    total, longest = sum(lengths), max(lengths)
    options = {"causal": rng.random() < 0.5, "window_size": (-1, -1), "softcap": 0.0}
    options |= {"softmax_scale": None, "return_attn_probs": True, "s_aux": None}
    qkv = {"qkv": randn(rng, 2, 5, 3, 2, 8, dtype=dtype)}
    kv = {"q": randn(rng, 2, 5, 4, 8, dtype=dtype), "kv": randn(rng, 2, 7, 2, 2, 8, dtype=dtype)}
    ends = cumulative(lengths)
    ends_qkv = {"qkv": randn(rng, total, 3, 2, 8, dtype=dtype), "cu_seqlens": ends}
    ends_kv = {
        "q": randn(rng, total, 4, 8, dtype=dtype),
        "kv": randn(rng, total, 2, 2, 8, dtype=dtype),
    }
    ends_kv |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    return rng.choice(
        [
            (flash8.flash_attn_qkvpacked_func, qkv | options),
            (flash8.flash_attn_kvpacked_func, kv | options),
            (flash8.flash_attn_varlen_qkvpacked_func, ends_qkv | {"max_seqlen": longest} | options),
            (
                flash8.flash_attn_varlen_kvpacked_func,
                ends_kv | {"max_seqlen_q": longest, "max_seqlen_k": longest} | options,
            ),
        ]
    )


def _quantize(rng: random.Random) -> Target:
    lengths = [rng.choice([0, 1, 5, 20]) for _ in range(2)]
    is_packed = rng.random() < 0.5
    shape = (sum(lengths), 2, 64) if is_packed else (2, 9, 2, 64)
    angle = randn(rng, 32, 16)
    arguments = {
        "x": randn(rng, *shape, dtype=rng.choice(WIDE[:3])),
        "granularity": rng.choice(["tensor", "head", "block"]),
        "hadamard": rng.choice([None, True, False, 5, Rotation(64, 3)]),
        "smooth_k": rng.random() < 0.3,
        "rope": Rope(angle.cos(), angle.sin()) if rng.random() < 0.3 else None,
        "cu_seqlens": cumulative(lengths) if is_packed else None,
        "seqused": None,
        "descale": None,
        "amax": None,
        "v_colmajor": rng.random() < 0.2,
    }
    if arguments["v_colmajor"]:
        arguments |= {"smooth_k": False, "rope": None, "hadamard": None}
    return fp8.quantize, arguments


def _fp8_attention(rng: random.Random) -> Target:
    recipe = rng.choice([None, fp8.CurrentScaling(), fp8.BlockScaling(smooth_k=True)])
    q, k, v = (randn(rng, 1, 9, heads, 16, dtype=torch.bfloat16) for heads in (2, 1, 1))
    leaf = rng.random() < 0.5
    arguments = {"q": q.requires_grad_(leaf), "k": k, "v": v, "recipe": recipe}
    options = {"causal": True, "window_size": (-1, -1), "softcap": 0.0, "softmax_scale": None}
    return fp8.fp8_attention, arguments | options | {"s_aux": None, "return_attn_probs": True}


def _products(rng: random.Random) -> Target:
    """Matrix products, their operands, and a layer of them."""
    m, n, k = rng.choice([1, 5, 130]), rng.choice([1, 8, 40]), rng.choice([16, 48, 144])
    a, b = (randn(rng, rows, k, dtype=rng.choice(WIDE[:3])) for rows in (m, n))
    of_a, of_b = rng.choice(
        [("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("128x128", "128x128")]
    )
    if rng.random() < 0.2:
        return gemm.quantize, {"x": a, "granularity": of_a}
    if rng.random() < 0.2:
        options = {"scaling": rng.choice(["tensor", "delayed", "block"])}
        options |= {"grad_dtype": rng.choice([None, torch.float8_e4m3fn])}
        return Fp8Linear(k, n, **options).forward, {"x": a.requires_grad_(rng.random() < 0.5)}
    (a8, scale_a), (b8, scale_b) = gemm.quantize(a, of_a), gemm.quantize(b, of_b)
    out_dtype = rng.choice([None, *WIDE[:3], torch.float8_e4m3fn])
    arguments = {"a": a8, "b": b8.t(), "scale_a": scale_a, "scale_b": scale_b.t(), "bias": None}
    if rng.random() < 0.3:
        arguments["bias"] = randn(rng, n, dtype=rng.choice(WIDE[:3]))
    narrow = out_dtype == torch.float8_e4m3fn
    arguments["scale_result"] = torch.ones(1) if narrow and rng.random() < 0.5 else None
    arguments["out"] = None
    if rng.random() < 0.3:
        arguments["out"] = torch.zeros(m, n).to(out_dtype or torch.bfloat16)
    arguments["use_fast_accum"] = of_b != "128x128" and rng.random() < 0.5
    arguments["split_k"] = rng.choice([1, 1, 0, 2, 8])
    if arguments["use_fast_accum"]:
        arguments["split_k"] = min(1, arguments["split_k"])
    arguments["out_dtype"] = out_dtype
    return torch.no_grad()(gemm.scaled_mm), arguments  # it has no derivative, and says so


def _projection(rng: random.Random) -> Target:
    """q, k and v of one product, of dense or packed sequences."""
    heads_q, heads_kv = rng.choice([(1, 1), (4, 2)])
    head_dim, k = rng.choice([32, 128]), rng.choice([16, 144])
    tokens, packed = rng.choice([1, 6, 130]), rng.random() < 0.5
    of_a, of_b = rng.choice([("row", "row"), ("1x128", "128x128")])
    rows, columns = tokens * (1 if packed else 2), (heads_q + 2 * heads_kv) * head_dim
    a, scale_a = gemm.quantize(randn(rng, rows, k, dtype=torch.float32), of_a)
    b, scale_b = gemm.quantize(randn(rng, columns, k, dtype=torch.float32), of_b)
    arguments = {"a": a if packed else a.view(2, tokens, k), "b": b.t(), "scale_a": scale_a}
    arguments |= {"scale_b": scale_b.t(), "heads_q": heads_q, "heads_kv": heads_kv}
    arguments["cu_seqlens"] = cumulative([0, tokens - 1, 1]) if packed else None
    arguments |= dict.fromkeys(("bias", "rotary_cos", "rotary_sin", "rotary_seqlens", "seqused"))
    if rng.random() < 0.5:
        arguments |= {"rotary_cos": torch.rand(140, 16), "rotary_sin": torch.rand(140, 16)}
        arguments["rotary_seqlens"] = int32([3, 0, 5] if packed else [3, 0])
    arguments["rotary_interleaved"] = rng.random() < 0.5
    weight = torch.rand(head_dim) if rng.random() < 0.5 else None
    arguments |= {"q_norm_weight": weight, "k_norm_weight": weight, "norm_eps": 1e-6}
    return torch.no_grad()(gemm.qkv_projection), arguments


def _quantize_attention(rng: random.Random) -> Target:
    dtype = rng.choice([*WIDE, torch.float8_e4m3fn])
    rows, keys = rng.choice([1, 5]), rng.choice([1, 9])
    sizes = {"q": (2, rows, 2, 16), "k": (2, keys, 1, 16), "v": (2, keys, 1, 128)}
    arguments: dict[str, Any] = {x: randn(rng, *sizes[x]).to(dtype) for x in sizes}
    arguments |= {"causal": rng.random() < 0.5, "window_size": (-1, -1), "softcap": 0.0}
    arguments |= {"softmax_scale": None, "s_aux": None}
    arguments["out_scale"] = rng.choice([None, torch.tensor([0.01])])
    return torch.no_grad()(gemm.quantize_attention), arguments


def _grouped_products(rng: random.Random) -> Target:
    """Products of groups: of rows one after another or apart, and along K."""
    groups, n = rng.choice([1, 3, 40]), rng.choice([1, 8, 40])
    sizes = [rng.choice([0, 1, 5, 20]) for _ in range(groups)]
    granularity = rng.choice(["tensor", "group", "row", "block"])
    kind = rng.choice(["rows", "apart", "along K"])
    if kind == "along K":
        product = make_along_k(sizes, rng.choice([1, 9]), n, granularity, seed=rng.randrange(99))
    else:
        room = max(sizes) + rng.choice([0, 2]) if kind == "apart" else None
        beyond = 0 if room is not None else rng.choice([0, 3])
        k = rng.choice([16, 144])
        product = make(sizes, n, k, granularity, room=room, beyond=beyond, seed=rng.randrange(99))
    index = product.group_rows.long() if rng.random() < 0.2 else product.group_rows
    arguments = {x: getattr(product, x) for x in ("a", "b", "scale_a", "scale_b")}
    arguments |= {"offs": None, "masked_m": None}
    arguments["masked_m" if kind == "apart" else "offs"] = index
    out_dtype = rng.choice([None, *WIDE[:3]])
    arguments |= {"out_dtype": out_dtype, "out": None}
    if rng.random() < 0.3:
        arguments["out"] = torch.zeros(product.out_shape, dtype=out_dtype or torch.bfloat16)
    arguments["use_fast_accum"] = granularity != "block" and rng.random() < 0.5
    return torch.no_grad()(gemm.grouped_scaled_mm), arguments


def _others(rng: random.Random) -> Target:
    lengths = [rng.choice([0, 1, 4]) for _ in range(3)]
    ends = cumulative(lengths)
    mask = torch.rand(2, 6) < 0.5
    x = randn(rng, 2, 6, 3)
    kept, indices, *_ = varlen.unpad_input(x, mask)
    partial = randn(rng, 3, 2, 5, 2, 8), randn(rng, 3, 2, 5, 2)
    metadata = {"batch_size": 2, "max_seqlen_q": 3, "max_seqlen_k": 40, "num_heads_q": 4}
    metadata |= {"num_heads_kv": 2, "headdim": 64, "cache_seqlens": int32([3, 40])}
    metadata |= {"page_size": None, "causal": True, "num_splits": 0, "qkv_dtype": torch.bfloat16}
    combine = {"out_partial": partial[0], "lse_partial": partial[1], "out": None}
    mask_of = {"seed": 5, "batch": 1, "heads": 2, "seqlen_q": 3, "seqlen_k": 4, "p": 0.5}
    quantized = fp8.quantize(randn(rng, 1, 4, 2, 16), "head")
    return rng.choice(
        [
            (flash8.flash_attn_combine, combine | {"out_dtype": None}),
            (flash8.get_scheduler_metadata, metadata),
            (flash8.dropout_mask, mask_of),
            (varlen.cu_seqlens_from_lengths, {"lengths": lengths}),
            (varlen.cu_seqlens_from_mask, {"attention_mask": mask}),
            (varlen.cu_seqlens_from_position_ids, {"position_ids": int32([0, 1, 2, 0, 1])}),
            (varlen.max_seqlen_of, {"cu_seqlens": ends}),
            (varlen.pack, {"tensors": [x[0, :n] for n in lengths]}),
            (varlen.unpack, {"packed": randn(rng, sum(lengths), 3), "cu_seqlens": ends}),
            (varlen.unpad_input, {"hidden_states": x, "attention_mask": mask, "unused_mask": None}),
            (
                varlen.pad_input,
                {"hidden_states": kept, "indices": indices, "batch": 2, "seqlen": 6},
            ),
            (
                varlen.position_ids_from_cu_seqlens,
                {"cu_seqlens": ends, "total": sum(lengths)},
            ),
            (fp8.dequantize, {"x": quantized, "dtype": torch.float32}),
            (fp8.descale_of, {"amax": torch.rand(3), "dtype": torch.float8_e4m3fn}),
            (fp8.block_offsets, {"cu_seqlens": ends}),
        ]
    )


#: How a target is drawn, and how often.
DRAWS: list[tuple[int, Callable[[random.Random], Target]]] = [
    (6, lambda rng: _public(attention_call, rng)),
    (4, lambda rng: _public(cache_call, rng)),
    (2, _packed),
    (1, _quantize),
    (1, _fp8_attention),
    (2, _products),
    (1, _projection),
    (1, _quantize_attention),
    (1, _grouped_products),
    (3, _others),
]


def draw(rng: random.Random) -> Target:
    """A function and arguments that it takes."""
    torch.manual_seed(rng.randrange(2**40))
    return rng.choices([draw for _, draw in DRAWS], [weight for weight, _ in DRAWS])[0](rng)

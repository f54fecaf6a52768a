"""Random calls of the public functions: valid ones, damaged ones, and what is right for either."""

import inspect
import math
import random
import re
from dataclasses import fields

import numpy as np
import torch

import flash8
import oracle
from cases import LOW, Case, build, call_of, factor
from kvcache_cases import SLOTS, problem
from tolerances import check_close, check_lse

FP8 = torch.float8_e4m3fn

# Arguments that must not change the result.
HINTS = {"num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs", "out"}

HINTS |= {"max_seqlen_q", "max_seqlen_k", "scheduler_metadata", "return_softmax_lse", "smooth_k"}

STEP_FIELDS = {f.name for f in fields(oracle.CacheStep)}


def attention_call(rng: random.Random):
    length = lambda: rng.choice([0, 1, 2, 5, 17, 64, 130])  # noqa: E731
    layout = rng.choice(["dense", "packed", "paged"])
    batch = rng.choice([1, 2, 3])
    seqlens_q = tuple(length() for _ in range(batch))
    seqlens_k = tuple(length() for _ in range(batch))
    if layout == "dense":
        seqlens_q, seqlens_k = seqlens_q[:1] * batch, seqlens_k[:1] * batch
    heads, heads_kv = rng.choice([(1, 1), (2, 1), (4, 2)])
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16, FP8])
    case = Case(
        seqlens_q,
        seqlens_k,
        unused_q=rng.choice([None, tuple(rng.randint(0, n) for n in seqlens_q)]),
        unused_k=rng.choice([None, tuple(rng.randint(0, n) for n in seqlens_k)]),
        layout=layout,
        page_size=rng.choice([1, 4, 16]),
        heads=heads,
        heads_kv=heads_kv,
        head_dim=rng.choice([1, 8, 24]),
        head_dim_v=rng.choice([1, 8, 40]),
        dtype=torch.float32 if dtype == FP8 else dtype,
        causal=rng.random() < 0.5,
        window_size=rng.choice([(-1, -1), (3, 2), (-1, 0), (20, -1)]),
        attention_chunk=rng.choice([0, 0, 7]),
        softcap=rng.choice([0.0, 0.0, 2.5]),
        alibi=rng.choice([None, "h", "bh"]),
        sink=rng.random() < 0.3,
        qv=dtype != FP8 and rng.random() < 0.2,
        dropout_p=rng.choice([0.0, 0.0, 0.3]),
        num_splits=rng.choice([1, 1, 0, 3]),
    )
    name, arguments = call_of(build(case, rng.randrange(2**30)))
    arguments["smooth_k"] = dtype != FP8 and case.softcap == 0.0 and rng.random() < 0.2
    if dtype == FP8:
        torch.manual_seed(rng.randrange(2**30))
        for x in "qkv":
            arguments[x] = arguments[x].to(FP8)
            arguments[f"{x}_descale"] = rng.choice([None, torch.rand(batch, heads_kv) + 0.5])
    return name, arguments


def cache_call(rng: random.Random):
    torch.manual_seed(rng.randrange(2**30))
    lengths = tuple(rng.randint(0, SLOTS - 6) for _ in range(rng.choice([1, 3])))
    new = rng.choice([0, 1, 3])
    packed = rng.random() < 0.3
    q, k_cache, v_cache, step = problem(
        rng.choice([torch.float64, torch.float32, torch.bfloat16]),
        seqlen_q=rng.choice([1, 3]),
        new=new,
        page_size=rng.choice([None, 1, 4, 16]),
        batch_idx=rng.random() < 0.4,
        leftpad=rng.random() < 0.4,
        rotary_dim=rng.choice([0, 16, 32]) if new else 0,
        interleaved=rng.random() < 0.5,
        varlen_q=tuple(rng.randint(0, 4) for _ in lengths) if packed else None,
        lengths=lengths,
    )
    arguments = {name: getattr(step, name) for name in STEP_FIELDS}
    arguments.update(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        causal=rng.random() < 0.5,
        window_size=rng.choice([(-1, -1), (5, 2)]),
        softcap=rng.choice([0.0, 2.0]),
        num_splits=rng.choice([0, 1, 3]),
        max_seqlen_q=4 if packed else None,
        return_softmax_lse=True,
    )
    return "flash_attn_with_kvcache", arguments


JUNK = [None, True, False, -1, 0, 1, 3, 2.5, -2.0, math.nan, math.inf, "x", b"", [], (1,), (2, 3)]


JUNK += [2**31, 2**63, 10**30, 1j, object(), {}, np.int64(3), np.float32(0.5), torch.float32]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, FP8, torch.float8_e5m2]


DTYPES += [torch.int32, torch.int64, torch.int8, torch.bool, torch.complex64]


def damaged(rng: random.Random, value):
    """Something else in the place of an argument: sometimes still valid, mostly not."""
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    if not plain or value.device.type == "meta" or rng.random() < 0.15:
        junk_tensor = torch.randint(-1, 4, (rng.randint(0, 3),), dtype=torch.int32)
        return rng.choice([*JUNK, junk_tensor, torch.randn(rng.randint(0, 4))])
    dim = rng.randrange(value.dim()) if value.dim() else 0
    index = value.dtype in (torch.int32, torch.int64)
    choices = ["dtype", "unsqueeze", "flatten", "meta", "grad", "sparse", "empty", "longer"]
    choices += ["shorter", "transpose", "strided", "expand", "values", "values", "values"]
    how = rng.choice(choices)
    if how == "dtype":
        return value.to(rng.choice(DTYPES))
    if how == "unsqueeze":
        return value.unsqueeze(dim)
    if how == "flatten":
        return value.flatten()
    if how == "meta":
        return value.to("meta")
    if how == "grad":
        return value.clone().requires_grad_() if value.is_floating_point() else value
    if how == "sparse":
        return value.float().to_sparse()
    if value.dim() == 0:
        return value.reshape(1)
    if how == "empty":
        return value.narrow(dim, 0, 0)
    if how == "longer":
        return torch.cat([value, value.narrow(dim, 0, 1)], dim) if value.shape[dim] else value
    if how == "shorter":
        return value.narrow(dim, 0, max(0, value.shape[dim] - 1))
    if how == "v_colmajor":
        return value.transpose(dim, rng.randrange(value.dim()))
    if how == "strided":
        return value.repeat_interleave(2, dim=dim).unflatten(dim, (-1, 2)).select(dim + 1, 0)
    if how == "expand" and value.shape[dim]:
        return value.narrow(dim, 0, 1).expand_as(value)
    if index and value.numel():
        value = value.clone()
        value.view(-1)[rng.randrange(value.numel())] += rng.choice([-1, 1, 1, -100, 100, 2**30])
    return value


def copies(arguments):
    """Independent tensors with the same sizes and strides."""
    result = {}
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.layout is torch.strided and not x.requires_grad:
            fresh = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            broadcast = any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))
            result[name] = x if broadcast else fresh.copy_(x)
        else:
            result[name] = x
    return result


def is_ambiguous(name, arguments):
    """Calls whose result is not determined, or too sensitive for our tolerances."""
    scale = arguments.get("softmax_scale")
    if scale is not None and scale > 50:
        return True
    if arguments.get("dropout_p", 0.0) > 0 and arguments.get("dropout_seed") is None:
        return True
    if name != "flash_attn_with_kvcache" or arguments["k"] is None:
        return False
    rows = arguments["cache_batch_idx"]
    table = arguments["page_table"]
    shared_rows = rows is not None and rows.unique().numel() < rows.numel()
    return shared_rows or (table is not None and table.unique().numel() < table.numel())


def expected(name, arguments, dtype=torch.float64):
    given = {n: x for n, x in arguments.items() if n not in HINTS}
    window = given.get("window_size", (-1, -1))
    given["window_size"] = tuple(int(x) for x in window)
    given["softcap"] = float(given.get("softcap", 0.0))
    if name != "flash_attn_with_kvcache":
        seed = given.pop("dropout_seed", None)
        seed = int(seed) if given.get("dropout_p") else None  # unread without dropout
        return oracle.attention(**given, dropout_seed=seed, dtype=dtype)
    step = {n: given.pop(n) for n in STEP_FIELDS}
    lengths = step["cache_seqlens"]
    q, k_cache, v_cache = given.pop("q"), given.pop("k_cache"), given.pop("v_cache")
    if not isinstance(lengths, torch.Tensor):
        cu, table = step["cu_seqlens_q"], step["page_table"]
        batch = q.shape[0] if cu is None else cu.numel() - 1
        rows = k_cache.shape[1] * (table.shape[1] if table is not None else 1)
        fill = rows if lengths is None else int(lengths)
        step["cache_seqlens"] = torch.full((batch,), fill, dtype=torch.int32)
    return oracle.CacheStep(**step).attention(q, k_cache, v_cache, **given, dtype=dtype)[:2]


def judge(name, arguments, undamaged):
    function = getattr(flash8, name)
    before = copies(arguments)
    try:
        result = function(**arguments)
    except (TypeError, ValueError) as error:
        refusal = str(error)
    else:
        return compare(name, before, result)
    assert not undamaged, f"a valid call was refused: {refusal}"
    names = "|".join(map(re.escape, inspect.signature(function).parameters))
    assert re.search(rf"\b({names})\b", refusal), f"names no argument: {refusal}"
    return "refused"


def compare(name, before, result):
    out = result[0] if isinstance(result, tuple) else result
    if out.device.type == "meta" or is_ambiguous(name, before):
        return "not compared"
    reference, reference_lse = expected(name, before)
    assert out.shape == reference.shape
    if before["q"].dtype == FP8 and out.numel():
        # P is off by at most half an ulp of e4m3, 2^-4, or by a subnormal's step; O is bfloat16.
        size, _ = expected(name, {**before, "v": before["v"].float().abs()})
        assert ((out.double() - reference).abs() <= 0.067 * size + 1e-3 * size.max()).all()
        return "right"
    dtype = out.dtype
    low = expected(name, before, dtype)[0] if dtype in LOW else None
    softcap = before.get("softcap") or 0.0
    check_close("O", out, reference, low, factor(Case(softcap=softcap)), ulps=2.0)
    if isinstance(result, tuple) and before.get("rotary_cos") is None:
        check_lse("LSE", result[1], reference_lse, dtype)
    return "right"

"""Calls of the decode kernel on the simulated device, and what float64 attention makes of them.

`check` is the whole of a case: everything that nobody may read is NaN, outputs are poisoned, the
launch is repeated under several adversarial schedules, and O and LSE are compared over every row.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import oracle
import tolerances
from decode_launch import BLOCK, Call, DecodeKernel
from faults import Fault
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.compiler import Unit, compile_unit
from forward_cases import device, int32
from fp8_forward_cases import changed_sources

E4M3 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def kernel(variant: DecodeVariant) -> DecodeKernel:
    return DecodeKernel(device().driver, device().ptx(variant))


def changed_kernel(
    folder: Path, variant: DecodeVariant, *edits: tuple[str, str, str]
) -> DecodeKernel:
    """A variant compiled from sources with (file, old, new) edits."""
    root = changed_sources(folder, *edits)
    unit = Unit(root / "decode" / "kernel.cu", variant.defines, "changed")
    return DecodeKernel(device().driver, compile_unit(unit).ptx.read_bytes() + b"\0")


@dataclass(frozen=True)
class Cache:
    """How the keys of a call lie."""

    page_size: int | None = None  # None: dense
    room: int = 0  # keys that a sequence has room for; 0: as the longest
    spare: int = 2  # pages, or rows of a dense cache, that belong to nobody


def draw(
    variant: DecodeVariant,
    lengths: Sequence[int],
    *,
    seqlen_q: int = 1,
    heads: int = 4,
    heads_kv: int = 1,
    cache: Cache = Cache(),
    seed: int = 0,
    scales: tuple[str, str] = ("token", "token"),
    e4m3_q: bool = False,
    **options: object,
) -> Call:
    """Normal q, k, v; `lengths` are the used keys of each sequence, `scales` what the descales of k
    and v belong to, where the variant has them by key: "head", "token", "page", "block"."""
    generator = torch.Generator().manual_seed(seed)
    batch, room = len(lengths), max(cache.room, *lengths, 1)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    float8 = variant.cache == "e4m3"
    dtype = DTYPES[variant.dtype]
    q = tensor(batch, seqlen_q, heads, variant.head_dim).to(dtype)
    given: dict = {"indices": {"seqused_k": int32(lengths)}}
    if e4m3_q:
        q = (16.0 * q.float()).to(E4M3)
        given["q_descale"] = (1.0 + torch.rand(batch, heads, generator=generator)) / 16.0
        given["out_dtype"] = dtype
    if cache.page_size is None:
        pages, page_size = batch, room
    else:
        page_size = cache.page_size
        max_pages = -(-room // page_size)
        pages = batch * max_pages + cache.spare
        order = torch.randperm(pages, generator=generator)
        given["page_table"] = order[: batch * max_pages].view(batch, max_pages).int()
    k = tensor(pages, page_size, heads_kv, variant.head_dim)
    v = tensor(pages, page_size, heads_kv, variant.head_dim_v)
    if float8:
        k, v = (32.0 * k).to(E4M3), (32.0 * v).to(E4M3)
        factors = 1.0 + 0.25 * torch.arange(batch * heads_kv).view(batch, heads_kv)
        given["k_descale"], given["v_descale"] = factors / 32.0, (factors + 0.5) / 32.0
        if variant.scales == "key":
            shapes = {"token": (pages, page_size, heads_kv), "page": (pages, heads_kv, 1)}
            shapes["block"] = (pages, heads_kv, -(-page_size // BLOCK))
            for name, granularity in zip("kv", scales, strict=True):
                if granularity != "head":
                    exponents = 6.0 * torch.rand(shapes[granularity], generator=generator) - 9.0
                    given[f"{name}_descale"] = exponents.exp2()
    else:
        k, v = k.to(dtype), v.to(dtype)
    width = variant.head_dim + (variant.head_dim_v if variant.qv else 0)
    given |= {"softmax_scale": width**-0.5, **options}
    if variant.qv:
        given["qv"] = tensor(batch, seqlen_q, heads, variant.head_dim_v).to(dtype)
        k, v = _of_one_cache(k, v)
    given["indices"] = {"seqused_k": int32(lengths), **options.get("indices", {})}
    return Call(q, k, v, **given)


def _of_one_cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As absorbed MLA keeps them: the channels of v, then those of k."""
    width = v.shape[-1]
    both = k.new_empty((*k.shape[:-1], width + k.shape[-1]))
    both[..., :width], both[..., width:] = v, k
    return both[..., width:], both[..., :width]


def keys_of(call: Call) -> oracle.Keys:
    return oracle.Keys(
        seqused=call.indices.get("seqused_k"),
        leftpad=call.indices.get("leftpad_k"),
        page_table=call.page_table,
        batch_idx=call.indices.get("kv_batch_idx"),
    )


def queries_of(call: Call, b: int) -> tuple:
    cu_seqlens = call.indices.get("cu_seqlens_q")
    if cu_seqlens is None:
        return b, slice(0, call.q.shape[1])
    return (slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1])),)


def _mask(call: Call, rows: int, keys: int) -> Tensor:
    return oracle.visible(rows, keys, call.causal, call.window, call.attention_chunk)


def poisoned(call: Call) -> Call:
    """The same call with NaN in every slot of the cache that no query sees."""
    keys = keys_of(call)
    given = {name: torch.full(x.shape, math.nan).to(x.dtype) for name, x in _caches(call).items()}
    by_key = {name: x for name, x in _descales(call).items() if x.dim() == 3}
    given |= {name: torch.full_like(x, math.nan) for name, x in by_key.items()}
    for b in range(call.batch):
        if not keys.has_work(b):
            continue
        rows = call.q[queries_of(call, b)].shape[0]
        logical = keys.logical(call.k, b)
        seen = _mask(call, rows, len(logical)).any(dim=0) & keys.exists(call.k, b)
        slot = keys.slot(call.k, b, logical[seen])
        for name, x in _caches(call).items():
            given[name][slot] = x[slot]
        for name, x in by_key.items():
            if is_by_token(x, call):
                given[name][slot] = x[slot]
            else:
                at = (slot[0], slice(None), slot[1] // BLOCK if x.shape[2] > 1 else 0 * slot[1])
                given[name][at] = x[at]
    if call.qv is not None:
        given["k"], given["v"] = _of_one_cache(given["k"], given["v"])
    return replace(call, **given)


def _caches(call: Call) -> dict[str, Tensor]:
    return {"k": call.k, "v": call.v}


def _descales(call: Call) -> dict[str, Tensor]:
    both = {"k_descale": call.k_descale, "v_descale": call.v_descale}
    return {name: x for name, x in both.items() if x is not None}


def is_by_token(descale: Tensor, call: Call) -> bool:
    return descale.shape == call.k.shape[:3]


def _of_keys(descale: Tensor, call: Call, keys: oracle.Keys, b: int) -> Tensor:
    """Broadcasting over (keys, heads_kv, d), in float64."""
    descale = descale.double()
    if descale.dim() == 0:
        return descale
    if descale.dim() == 2:
        return descale[b][:, None]
    if not is_by_token(descale, call):
        tokens = call.k.shape[1]
        each = tokens if descale.shape[2] == 1 else BLOCK
        descale = descale.repeat_interleave(each, dim=2)[:, :, :tokens].transpose(1, 2)
    return keys.take(descale[..., None], b)


def _of_queries(call: Call, b: int) -> Tensor:
    """Of an e4m3 q, broadcasting over (rows, heads, d), in float64."""
    descale = call.q_descale
    if descale is None:
        return torch.ones((), dtype=torch.float64)
    descale = descale.double()
    if descale.dim() < 2:
        return descale
    if descale.dim() == 2:
        return descale[b].repeat_interleave(call.q.shape[-2] // descale.shape[1])[:, None]
    rows = call.q[queries_of(call, b)].shape[0]
    first, of = 0, b
    if "cu_seqlens_q" in call.indices:
        first, of = int(call.indices["cu_seqlens_q"][b]) // BLOCK + b, 0
    return descale[of][:, first + torch.arange(rows) // BLOCK].T[..., None]


def _drafts(call: Call, b: int, keys: int) -> Tensor:
    """bool (rows, keys): what the tree lets a query see."""
    rows = call.q[queries_of(call, b)].shape[0]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if call.tree_mask is None:
        return seen
    words = call.tree_mask[queries_of(call, b)].tolist()
    for i, word in enumerate(words):
        for n in range(rows):
            key = keys - rows + n
            if key >= 0 and not word >> n & 1:
                seen[i, key] = False
    return seen


def reference(call: Call) -> tuple[Tensor, Tensor]:
    """O and LSE of every row in float64; 0 and -inf in rows that are not used."""
    o = torch.zeros((*call.q.shape[:-1], call.v.shape[-1]), dtype=torch.float64)
    lse = torch.full(o.shape[:-1], -math.inf, dtype=torch.float64).transpose(-1, -2).contiguous()
    keys = keys_of(call)
    for b in range(call.batch):
        if not keys.has_work(b):
            continue
        at = queries_of(call, b)
        q = call.q[at].double() * _of_queries(call, b)
        k, v = (keys.take(x.double(), b) for x in (call.k, call.v))
        for name, descale in _descales(call).items():
            x = k if name == "k_descale" else v
            x *= _of_keys(descale, call, keys, b)
        for mean, x in ((call.k_mean, k), (call.v_mean, v)):
            if mean is not None:
                x += mean[b]
        slopes = call.alibi_slopes
        o[at], rows_lse = oracle.attend(
            q,
            k,
            v,
            _mask(call, q.shape[0], k.shape[0]) & _drafts(call, b, k.shape[0]),
            call.softmax_scale,
            call.softcap,
            slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b],
            sink=None if call.s_aux is None else call.s_aux.double(),
            qv=None if call.qv is None else call.qv[at].double(),
        )
        lse[(*at[:-1], slice(None), at[-1])] = rows_lse
    return o, lse


def compare(call: Call, o: Tensor, lse: Tensor) -> None:
    """Over every row."""
    exact, exact_lse = reference(call)
    assert not o.isnan().any(), "a row of O was not written, or NaN leaked"
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    without_keys = exact.abs().amax(dim=-1) == 0.0
    assert not o[without_keys].any(), "a row without keys is not zero"
    in_bf16 = call.k.dtype == torch.bfloat16
    bound = tolerances.DECODE_BF16 if in_bf16 else tolerances.DECODE_FP16
    if not without_keys.all():
        bound.check("O", tolerances.rel_l2_beyond_rounding(o, exact))
    given = {"atol": tolerances.DECODE_LSE.limit, "rtol": 1e-6}  # eight units of the last place
    torch.testing.assert_close(lse.double()[~empty], exact_lse[~empty], **given)


def launch(
    variant: DecodeVariant,
    *calls: Call,
    ctas: int = 3,
    seed: int = 0,
    changed: DecodeKernel | None = None,
) -> list[tuple[Tensor, Tensor]]:
    device().configure(seed=seed)
    try:
        return (changed or kernel(variant))(*calls, ctas=ctas)
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error


def check(
    variant: DecodeVariant,
    call: Call,
    *,
    ctas: int = 3,
    seeds: Sequence[int] = (0, 1),
    changed: DecodeKernel | None = None,
) -> tuple[Tensor, Tensor]:
    """O and LSE of a correct call: the same bits under every schedule, and close to float64."""
    given = poisoned(call)
    (first,) = launch(variant, given, ctas=ctas, seed=seeds[0], changed=changed)
    compare(call, *first)
    for seed in seeds[1:]:
        (again,) = launch(variant, given, ctas=ctas, seed=seed, changed=changed)
        for name, x, y in zip(("O", "LSE"), first, again, strict=True):
            assert torch.equal(x, y), f"{name} differs between the seeds {seeds[0]} and {seed}"
    return first


def found_by(
    fault: Fault, problems: Sequence[tuple[Call, int]], seeds: Sequence[int], folder: Path
) -> str | None:
    """Under which seed, and by which of these calls and CTAs, a planted fault shows; None if under
    none. What it was edited in is compiled in `folder`."""
    changed = changed_kernel(folder, fault.variant, fault.edit)
    for seed in seeds:
        for i, (call, ctas) in enumerate(problems):
            try:
                check(fault.variant, call, ctas=ctas, seeds=(seed,), changed=changed)
            except (AssertionError, RuntimeError) as error:
                return f"seed {seed}, problem {i}: {str(error)[:200]}"
    return None

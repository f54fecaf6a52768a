"""Calls of the forward kernel on the simulated device, and what float64 attention makes of them.

`check` is the whole of a case: everything that nobody may read is NaN, outputs are poisoned, the
launch is repeated under several adversarial schedules, and O and LSE are compared over every row.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import oracle
import tolerances
from flash8.backends.hopper.variants import ForwardVariant
from forward_launch import Call, ForwardKernel, Schedule
from simulated_device import SimulatedDevice

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
#: (batch, seqlen_q, seqlen_k, heads, heads_kv) of dense calls.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 127, 129, 1, 1),
    (1, 113, 203, 2, 1),
    (2, 193, 131, 2, 2),
    (1, 200, 50, 1, 1),
    (2, 3, 0, 1, 1),
]
#: Eight units of fp32's last place: scores of the size of LSE are summed over head_dim.
LSE_BOUND = {"atol": 3e-6, "rtol": 1e-6}


@functools.cache
def device() -> SimulatedDevice:
    return SimulatedDevice()


@functools.cache
def kernel(variant: ForwardVariant) -> ForwardKernel:
    return ForwardKernel(device().driver, device().ptx(variant))


def draw(
    variant: ForwardVariant, rows_q, rows_k, heads, heads_kv, *, batch=None, seed=0, scale=1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v; packed without `batch`. q is multiplied by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    cache = "e4m3" if variant.cache == "e4m3" else variant.dtype

    def tensor(rows: int, heads: int, head_dim: int, dtype: str, scale: float = 1.0) -> Tensor:
        x = torch.randn((*lead, rows, heads, head_dim), generator=generator) * scale
        # uses e4m3's range; `descales` takes it back
        return (x * (32.0 if dtype == "e4m3" else 1.0)).to(DTYPES[dtype])

    q = tensor(rows_q, heads, variant.head_dim, variant.dtype, scale)
    k = tensor(rows_k, heads_kv, variant.head_dim, cache)
    return q, k, tensor(rows_k, heads_kv, variant.head_dim_v, cache)


def masks(variant: ForwardVariant) -> dict:
    """Arguments of a Call that give a variant's compiled choices something to do."""
    window = (37, 21) if variant.mask == "local" else (-1, -1)
    return {
        "causal": variant.mask == "causal",
        "window": window,
        "softcap": 3.0 if variant.softcap else 0.0,
    }


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def packed(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def launch(
    variant: ForwardVariant, call: Call, schedule: Schedule | None = None, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    device().configure(seed=seed)
    try:
        return kernel(variant)(call, schedule or Schedule())
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error


# ------------------------------------------------------------------------------- what is expected


@dataclass(frozen=True)
class Used:
    """Where the used rows of one sequence lie: indices into (batch, row) or (row,) of q and k."""

    index: int
    queries: tuple
    keys: tuple


def sequences(call: Call) -> Iterator[Used]:
    def number(name: str, at: int, default: int) -> int:
        return int(call.indices[name][at]) if name in call.indices else default

    cu_q, cu_k = call.indices.get("cu_seqlens_q"), call.indices.get("cu_seqlens_k")
    for b in range(call.q.shape[0] if cu_q is None else cu_q.numel() - 1):
        first_q = 0 if cu_q is None else int(cu_q[b])
        rows_q = call.q.shape[1] if cu_q is None else int(cu_q[b + 1]) - first_q
        first_k = 0 if cu_k is None else int(cu_k[b])
        capacity_k = call.k.shape[1] if cu_k is None else int(cu_k[b + 1]) - first_k
        used_q = number("seqused_q", b, rows_q)
        used_k = number("seqused_k", b, capacity_k)
        rows = slice(first_q, first_q + used_q)
        keys = slice(first_k + number("leftpad_k", b, 0), first_k + used_k)
        row = number("kv_batch_idx", b, b)
        yield Used(
            b, (b, rows) if cu_q is None else (rows,), (row, keys) if cu_k is None else (keys,)
        )


def real(call: Call, name: str, used: Used, dtype: torch.dtype) -> Tensor:
    """The used rows of q, k or v of one sequence: what the stored values stand for."""
    x = getattr(call, name)[used.queries if name == "q" else used.keys].to(dtype)
    x = _descaled(call, name, used, x)
    if name == "v" and call.v_channel_descale is not None:
        x = x * call.v_channel_descale[used.index]
    mean = {"k": call.k_mean, "v": call.v_mean}.get(name)
    return x if mean is None else x + mean[used.index]


def _descaled(call: Call, name: str, used: Used, x: Tensor) -> Tensor:
    descale = call.descales.get(f"{name}_descale")
    if descale is None or descale.dim() == 0:
        return x if descale is None else (x * descale).to(x.dtype)
    if descale.dim() == 2:
        factor = descale[used.index, :, None].expand(-1, x.shape[0])
    else:
        factor = _block_descales(call, name, used, descale, x.shape[0])
    heads = factor.repeat_interleave(x.shape[1] // factor.shape[0], dim=0)
    return (x * heads.T[..., None]).to(x.dtype)


def _block_descales(call: Call, name: str, used: Used, descale: Tensor, rows: int) -> Tensor:
    """(heads, rows): blocks of 128 rows from the start of the sequence."""
    cu_seqlens = call.indices.get(f"cu_seqlens_{'q' if name == 'q' else 'k'}")
    if cu_seqlens is None:
        return descale[(used.queries if name == "q" else used.keys)[0]].repeat_interleave(128, 1)[
            :, :rows
        ]
    first = int(cu_seqlens[used.index]) // 128 + used.index
    return descale[0, :, first:].repeat_interleave(128, 1)[:, :rows]


def poisoned(call: Call) -> Call:
    """The same call with NaN wherever nobody may look."""
    wanted = {"q": call.q, "k": call.k, "v": call.v}
    given = {name: torch.full(x.shape, math.nan).to(x.dtype) for name, x in wanted.items()}
    for used in sequences(call):
        for name, at in (("q", used.queries), ("k", used.keys), ("v", used.keys)):
            given[name][at] = wanted[name][at]
    return replace(call, **given)


def reference(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """O and LSE of every row in this precision; 0 and -inf in rows that are not used."""
    shape = (*call.q.shape[:-1], call.v.shape[-1])
    o = torch.zeros(shape, dtype=dtype)
    lse = torch.full(shape[:-1], -math.inf, dtype=torch.float64).transpose(-1, -2).contiguous()
    for used in sequences(call):
        q, k, v = (real(call, name, used, dtype) for name in "qkv")
        slopes = call.alibi_slopes
        o[used.queries], rows_lse = oracle.attend(
            q,
            k,
            v,
            oracle.visible(q.shape[0], k.shape[0], call.causal, call.window, call.attention_chunk),
            call.softmax_scale,
            call.softcap,
            slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[used.index],
            sink=None if call.s_aux is None else call.s_aux.double(),
            keep=kept(call, used.index, q.shape[0], k.shape[0]),
            dropout_p=call.dropout_p,
        )
        lse[(*used.queries[:-1], slice(None), used.queries[-1])] = rows_lse.double()
    return o, lse


def kept(call: Call, index: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
    """What dropout keeps of a sequence's probabilities, (heads, seqlen_q, seqlen_k)."""
    if call.dropout_p == 0.0:
        return None
    sizes = call.q.shape[-2], seqlen_q, seqlen_k
    keep = oracle.dropout_keep(call.dropout_seed, index, *sizes, call.dropout_p)
    return torch.from_numpy(keep)


def compare(call: Call, o: Tensor, lse: Tensor) -> None:
    """16 bit: FA3's rule for O, a few units of the last place for LSE. FP8: the bounds of
    tolerances.py. Over every row.
    """
    exact, exact_lse = reference(call)
    assert not o.isnan().any(), "a row of O was not written, or NaN leaked"
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    if call.q.dtype == DTYPES["e4m3"]:
        tolerances.FP8_REL_L2.check("O", tolerances.rel_l2(o, exact))
        tolerances.FP8_ROW_REL_L2.check("row of O", tolerances.row_rel_l2(o, exact))
        tolerances.check_fp8_lse("LSE", lse, exact_lse)
    else:
        emulation, _ = reference(call, o.dtype)
        factor = tolerances.FA3_FACTOR_SOFTCAP if call.softcap else tolerances.FA3_FACTOR
        tolerances.check_fa3("O", o, exact, emulation, factor=factor, ulps=1.0)
        torch.testing.assert_close(lse.double()[~empty], exact_lse[~empty], **LSE_BOUND)
    unused = ~torch.isfinite(exact_lse.transpose(-1, -2))
    assert not o[unused].any(), "a row without keys is not zero"


def check(
    variant: ForwardVariant,
    call: Call,
    schedule: Schedule | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
) -> tuple[Tensor, Tensor]:
    """O and LSE of a correct call: the same bits under every schedule, and close to float64."""
    given = poisoned(call)
    o, lse = launch(variant, given, schedule, seed=seeds[0])
    compare(call, o, lse)
    for seed in seeds[1:]:
        again, lse_again = launch(variant, given, schedule, seed=seed)
        assert torch.equal(o, again), f"O differs between the seeds {seeds[0]} and {seed}"
        assert torch.equal(lse, lse_again), f"LSE differs between the seeds {seeds[0]} and {seed}"
    return o, lse

"""flash8.distributed.decode: caches that are spread over ranks, against one cache of everything."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

import distributed_faults
import oracle
from distributed_faults import DECODE_FAULTS
from flash8 import distributed, flash_attn_with_kvcache
from flash8.fp8 import quantize
from process_group import Processes

HEADS, HEADS_KV, DIM = 4, 2, 16
DESCALE = 0.25
LENGTHS = (21, 1, 64, 3)


@dataclass(frozen=True)
class Step:
    name: str
    ranks: int = 2
    interleave: int = 1
    queries: int = 1
    lengths: tuple[int, ...] = LENGTHS
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    page_size: int = 0
    dtype: torch.dtype = torch.float32
    e4m3: bool = False

    def __str__(self):
        return self.name

    def options(self):
        return dict(causal=self.causal, window_size=self.window, softcap=self.softcap)


STEPS = [
    Step("one"),
    Step("four-sink", ranks=4, sink=True, causal=True),
    Step("interleaved", ranks=4, interleave=4, sink=True),
    Step("contiguous", interleave=100),
    Step("window", ranks=4, window=(5, 0), sink=True),
    Step("queries", queries=3, lengths=(21, 3, 64, 5), causal=True, ranks=4),
    Step("queries-window", queries=3, lengths=(21, 3, 64, 5), window=(4, 1), softcap=3.0),
    Step("queries-full", queries=2, interleave=2, lengths=(21, 2, 64, 5)),
    Step("pages", page_size=4, ranks=4, interleave=4),
    Step("pages-queries", page_size=8, queries=2, lengths=(21, 2, 64, 5), causal=True, sink=True),
    Step("e4m3", e4m3=True, queries=3, lengths=(21, 3, 64, 5), causal=True, ranks=4, sink=True),
    Step("bf16", dtype=torch.bfloat16, ranks=4, sink=True),
]


@pytest.fixture(scope="module")
def processes():
    started = Processes(4)
    yield started
    started.close()


def whole(step):
    """q, all keys and values packed, the sink."""
    generator = torch.Generator().manual_seed(9)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(step.dtype)

    q = random(len(step.lengths), step.queries, HEADS, DIM)
    k, v = (random(sum(step.lengths), HEADS_KV, DIM) for _ in range(2))
    if step.e4m3:
        k, v = ((x / DESCALE).to(torch.float8_e4m3fn).float() * DESCALE for x in (k, v))
    return q, k, v, torch.randn(HEADS, generator=generator) if step.sink else None


def cache_of(step, x, rank):
    """A rank's cache by the definition: (batch, tokens, ...), or pages and their table. NaN where
    nothing is."""
    rows = []
    for own in x.split(step.lengths):
        mine = [t for t in range(len(own)) if (t // step.interleave) % step.ranks == rank]
        rows.append(own[mine])
    longest = max(map(len, rows))
    if not step.page_size:
        cache = x.new_full((len(rows), longest + 1, *x.shape[1:]), torch.nan)
        for b, own in enumerate(rows):
            cache[b, : len(own)] = own
        return cache, None
    per_row = -(-longest // step.page_size) + 1
    pages = x.new_full((len(rows) * per_row, step.page_size, *x.shape[1:]), torch.nan)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(3))
    table = order.view(len(rows), per_row).int()
    for b, own in enumerate(rows):
        for t, row in enumerate(own):
            pages[table[b, t // step.page_size], t % step.page_size] = row
    return pages, table


def run(group, step, fault=""):
    q, k, v, s_aux = whole(step)
    k_cache, table = cache_of(step, k, group.rank())
    v_cache, _ = cache_of(step, v, group.rank())
    lengths = torch.tensor(step.lengths)
    mine = distributed.own_seqlens(lengths, group=group, interleave=step.interleave)
    assert mine.tolist() == [
        sum((t // step.interleave) % step.ranks == dist.get_rank() for t in range(length))
        for length in step.lengths
    ]
    scales = {}
    if step.e4m3:
        k_cache, v_cache = ((x / DESCALE).to(torch.float8_e4m3fn) for x in (k_cache, v_cache))
        descale = torch.full((len(lengths), HEADS_KV), DESCALE)
        scales = dict(k_descale=descale, v_descale=descale)
    given = dict(cache_seqlens=lengths, interleave=step.interleave, page_table=table, s_aux=s_aux)
    with distributed_faults.planted(fault) if fault else nullcontext():
        out, lse = distributed.decode(
            q,
            k_cache,
            v_cache,
            group=group,
            return_softmax_lse=True,
            **given,
            **scales,
            **step.options(),
        )
    assert out.dtype == step.dtype
    return out.double().numpy(), lse.double().numpy()


def errors(answers, step):
    q, k, v, s_aux = whole(step)
    count = len(step.lengths)
    cu_q = torch.arange(count + 1) * step.queries
    cu_k = torch.tensor([0, *step.lengths]).cumsum(0)
    out, lse = oracle.attention(
        q.flatten(0, 1), k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, s_aux=s_aux, **step.options()
    )
    out, lse = out.unflatten(0, (count, -1)), lse.unflatten(1, (count, -1)).transpose(0, 1)
    return [
        max(
            torch.nan_to_num(torch.from_numpy(x) - y, nan=torch.inf).abs().max().item()
            for x, y in zip(answer, (out, lse), strict=True)
        )
        for answer in answers
    ]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_ranks_find_what_one_cache_gives(processes, step):
    found = errors(processes.run(run, step.ranks, step), step)
    assert max(found) <= (2e-2 if step.dtype == torch.bfloat16 else 5e-6), found


@pytest.mark.parametrize("fault", DECODE_FAULTS)
def test_a_planted_fault_is_found(processes, fault):
    step = next(step for step in STEPS if step.name == "window")
    assert max(errors(processes.run(run, step.ranks, step, fault), step)) > 1e-2


def random_call(queries):
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, queries, HEADS, DIM, generator=generator)
    return q, *torch.randn(2, 2, 20, HEADS_KV, DIM, generator=generator).unbind()


HIDDEN = {
    "no keys": (1, dict(cache_seqlens=[0, 20]), [[True], [False]]),
    "causal": (
        3,
        dict(cache_seqlens=[1, 20], causal=True),
        [[True, True, False], [False, False, False]],
    ),
    "no row": (
        1,
        dict(cache_seqlens=[20, 20], cache_batch_idx=torch.tensor([-1, 1], dtype=torch.int32)),
        [[True], [False]],
    ),
}


def hide(group, queries, given):
    q, k, v = random_call(queries)
    given = {**given, "cache_seqlens": torch.tensor(given["cache_seqlens"])}
    given |= dict(group=group, return_softmax_lse=True)
    s_aux = torch.tensor([-torch.inf, 0.0, 1.0, 2.0])
    found = [distributed.decode(q, k, v, s_aux=x, **given) for x in (s_aux, None)]
    return [[x.numpy() for x in pair] for pair in found]


@pytest.mark.parametrize("name", HIDDEN)
def test_a_query_without_keys_finds_nothing_beside_a_sink_of_no_weight(processes, name):
    queries, given, hidden = HIDDEN[name]
    ((found, without),) = processes.run(hide, 1, queries, given)
    (out, lse), hidden = map(torch.from_numpy, found), torch.tensor(hidden)
    assert torch.isfinite(out).all() and (out[hidden] == 0.0).all()
    assert (out[~hidden] != 0.0).any(dim=-1).all()
    assert torch.equal(out[:, :, 0], torch.from_numpy(without[0])[:, :, 0])
    assert (lse.transpose(1, 2)[hidden] == torch.tensor([-torch.inf, 0.0, 1.0, 2.0])).all()


def decode_scaled(group, smooth):
    q, k, v = random_call(3)
    scaled = quantize(k + 1.0, "head", smooth_k=smooth), quantize(3 * v, "head", smooth_v=smooth)
    lengths = torch.tensor([20, 7], dtype=torch.int32)
    given = dict(cache_seqlens=lengths, causal=True, return_softmax_lse=True)
    here = distributed.decode(q, *scaled, group=group, **given)
    there = flash_attn_with_kvcache(q, *scaled, **given)
    return max((x - y).abs().max().item() for x, y in zip(here, there[:2], strict=True))


@pytest.mark.parametrize("smooth", [False, True])
def test_scales_of_sequences_are_those_of_their_queries(processes, smooth):
    (error,) = processes.run(decode_scaled, 1, smooth)
    assert error <= 5e-6


def decode_nothing(group):
    q, k, v = random_call(1)
    given = dict(group=group, cache_seqlens=torch.tensor([0, 20]), return_softmax_lse=True)
    found = [
        distributed.decode(q[:, :0], k, v, **given, **options)
        for options in ({}, dict(causal=True), dict(window_size=(3, 0)), dict(window_size=(3, 1)))
    ]
    return [[tuple(x.shape) for x in pair] for pair in found]


def test_no_queries_find_nothing(processes):
    for found in processes.run(decode_nothing, 2):
        assert found == [[(2, 0, HEADS, DIM), (2, HEADS, 0)]] * 4


def refused(group):
    q, k, *_ = whole(STEPS[0])
    cache = k[:4].view(4, 1, HEADS_KV, DIM)
    given = dict(q=q, k_cache=cache, v_cache=cache, cache_seqlens=torch.ones(4).int(), group=group)
    messages = []
    for change in (
        dict(interleave=0),
        dict(cache_seqlens=torch.ones(3).int()),
        dict(q=q[0]),
        dict(q=q.clone().requires_grad_()),
        dict(group="cp"),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            distributed.decode(**{**given, **change})
        messages.append(str(error.value))
    return messages


def test_a_call_is_refused(processes):
    (found,) = processes.run(refused, 1)
    for message, text in zip(
        found,
        (
            "interleave must be an integer from 1",
            "cache_seqlens must have shape (batch,) = (4,)",
            "q must have 4 dimensions",
            "must not require grad",
            "group must be a torch.distributed.ProcessGroup",
        ),
        strict=True,
    ):
        assert text in message

"""shard and unshard: who has which token, there and back, and the gradient of the way back."""

import pytest
import torch
import torch.distributed as dist

from distributed_cases import RAGGED, Case, own_rows
from flash8 import distributed
from flash8.distributed.layout import Batch
from process_group import Processes

CASES = [
    Case("packed-zigzag", ranks=4),
    Case("packed-contiguous", layout="contiguous", ranks=4),
    Case("dense-zigzag", lengths=None, seqlen=21),
    Case("dense-contiguous", lengths=None, seqlen=6, layout="contiguous"),
    Case("grid", ranks=4, method="ulysses+ring"),
]


@pytest.fixture(scope="module")
def processes():
    started = Processes(4)
    yield started
    started.close()


def there_and_back(group, case):
    dense = case.lengths is None
    total = sum(case.all_lengths)
    cu_seqlens = None if dense else torch.tensor([0, *case.all_lengths]).cumsum(0)
    x = torch.arange(total * 3.0).view(total, 3)
    x = (x.unflatten(0, (2, case.seqlen)) if dense else x).requires_grad_()
    given = dict(group=group, cu_seqlens=cu_seqlens, layout=case.layout)
    own = distributed.shard(x, **given)
    rows = own.detach().flatten(0, -2)[:, 0] / 3
    rank, ranks = dist.get_rank(), case.ranks
    assert rows.long().tolist() == own_rows(case, rank).tolist()
    back = distributed.unshard(own, seqlen=case.seqlen if dense else None, **given)
    assert torch.equal(back, x)
    # The loss of rank r counts every token r + 1 times.
    (grad,) = torch.autograd.grad(back.sum() * (rank + 1), own)
    assert (grad == sum(range(ranks + 1))).all()
    labels = torch.arange(total).view(*x.shape[:-1])
    assert torch.equal(
        distributed.unshard(
            distributed.shard(labels, **given), seqlen=case.seqlen if dense else None, **given
        ),
        labels,
    )
    return len(rows)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back(processes, case):
    counts = processes.run(there_and_back, case.processes, case)
    assert sum(counts) == sum(case.all_lengths)


def shape_of_no_sequences(group):
    own = torch.zeros(0, 2, 3)
    return [tuple(distributed.unshard(own, group=group, seqlen=n).shape) for n in (None, 4, 3)]


def test_no_sequences_have_a_length_too(processes):
    for shapes in processes.run(shape_of_no_sequences, 2):
        assert shapes == [(0, 4, 3), (0, 4, 3), (0, 3, 3)]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_has_one_rank_and_ranks_differ_little(layout, ranks):
    batch = Batch((*RAGGED, 1000), layout)
    seen = [
        (span.sequence, token)
        for rank in range(ranks)
        for span in batch.spans(ranks, rank)
        for token in range(span.begin, span.end)
    ]
    assert len(seen) == len({*seen}) == sum(batch.lengths)
    alone = Batch((1000,), layout).counts(ranks)
    assert max(alone) - min(alone) <= 2


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("joined", [2, 3])
def test_joined_ranks_have_what_fewer_ranks_would(layout, joined):
    batch = Batch((*RAGGED, 101), layout)
    for rank in range(4):
        together = {
            (span.sequence, token)
            for i in range(joined)
            for span in batch.spans(4 * joined, rank * joined + i)
            for token in range(span.begin, span.end)
        }
        assert together == {
            (span.sequence, token)
            for span in batch.spans(4, rank)
            for token in range(span.begin, span.end)
        }

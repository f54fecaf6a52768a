"""method="ulysses": every rank gets all tokens of some heads, attends, and gives them back.

Rank r of U attends with query heads [r, r + 1) * heads / U and the KV heads that these read. Where
there are fewer KV heads than ranks, several ranks get the same one, and its gradients are added up
in fp32. The attention between the two exchanges is any other: `inner` is one call over whole
sequences, or for "ulysses+ring" a ring whose ranks are the groups of U (Jacobs et al., arXiv
2309.14509; Fang and Zhao, arXiv 2405.07719).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from flash8.distributed import partial
from flash8.distributed.collectives import exchange
from flash8.distributed.layout import Batch, joined_order

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
Shares = Sequence[tuple[int, int]]


def shares(heads: int, heads_kv: int, ranks: int) -> tuple[Shares, Shares]:
    """[begin, end) of the query heads and of the KV heads of every rank.

    Raises ValueError where they cannot be shared out evenly.
    """
    if heads % ranks or (heads_kv % ranks and ranks % heads_kv):
        raise ValueError(
            f"the heads of q must be a multiple of the {ranks} ranks that share them under "
            "'ulysses', and those of k a multiple or a divisor of it, got "
            f"{heads} and {heads_kv}"
        )
    own, group = heads // ranks, heads // heads_kv
    of_queries = [(r * own, (r + 1) * own) for r in range(ranks)]
    return of_queries, [(begin // group, -(-end // group)) for begin, end in of_queries]


class Way(NamedTuple):
    """From own tokens of all heads to all tokens of own heads, for tensors of one kind."""

    group: ProcessGroup
    shares: Shares  # of heads
    counts: Sequence[int]  # tokens of the ranks of the group
    order: Tensor  # where the tokens are in the order of ranks

    def own(self) -> slice:
        """The heads of this rank."""
        return slice(*self.shares[self.group.rank()])

    def to_heads(self, x: Tensor) -> Tensor:
        """(all tokens, own heads, d) from (own tokens, heads, d)."""
        begin, end = self.shares[self.group.rank()]
        heads, width = end - begin, x.shape[-1]
        parts = [x[:, low:high].reshape(-1) for low, high in self.shares]
        sent = [part.numel() for part in parts]
        received = [count * heads * width for count in self.counts]
        found = exchange(torch.cat(parts), sent, received, self.group)
        return found.view(-1 if width else 0, heads, width).index_select(0, self.order)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(own tokens, heads, d) from (all tokens, own heads, d). What several ranks have is
        added up."""
        count, (heads, width) = self.counts[self.group.rank()], x.shape[1:]
        by_rank = torch.empty_like(x, memory_format=torch.contiguous_format)
        by_rank.index_copy_(0, self.order, x)
        sent = [n * heads * width for n in self.counts]
        received = [count * (high - low) * width for low, high in self.shares]
        flat = exchange(by_rank.view(-1), sent, received, self.group)
        found = x.new_zeros((count, self.shares[-1][1], width), dtype=partial.wide(x))
        for (low, high), part in zip(self.shares, flat.split(received), strict=True):
            found[:, low:high] += part.view(count, high - low, width)
        return found.to(x.dtype)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.to_heads(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.way.to_tokens(grad), None


def to_tokens(queries: Way, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """O and LSE of all heads of the own tokens."""
    rows = queries.to_tokens(lse.transpose(0, 1)[..., None])
    return queries.to_tokens(out), rows[..., 0].transpose(0, 1)


def gradients_to_heads(
    queries: Way, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dO and dLSE of the own heads. Every rank exchanges both, as zeros where its loss uses only
    one of them: the others wait for it. dlse is None where no rank was given LSE."""
    dout = queries.to_heads(dout)
    if dlse is not None:
        dlse = queries.to_heads(dlse.transpose(0, 1)[..., None])[..., 0].transpose(0, 1)
    return dout, dlse


class _OutToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way.to_tokens(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        return ctx.way.to_heads(dout), None


class _ToTokens(torch.autograd.Function):
    """Of both outputs at once, so that what a rank exchanges does not depend on its loss."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        ctx.way = way
        return to_tokens(way, out, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        return *gradients_to_heads(ctx.way, dout, dlse), None


def ways(
    q: Tensor, k: Tensor, batch: Batch, group: ProcessGroup, outer: tuple[int, int]
) -> tuple[Way, Way]:
    """Those of q and of k, from a rank's own tokens with all heads."""
    (groups, number), size = outer, group.size()
    both = shares(q.shape[1], k.shape[1], size)
    counts = batch.counts(size * groups)[number * size : (number + 1) * size]
    order = joined_order(batch, size * groups, size, number, q.device)
    return Way(group, both[0], counts, order), Way(group, both[1], counts, order)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    batch: Batch,
    group: ProcessGroup,
    outer: tuple[int, int],
    inner: Attend,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """O (rows, heads, head_dim_v) and LSE (heads, rows) of this rank's packed queries.

    outer: how many groups of such ranks share the sequences, and which one this is.
    """
    queries, keys = ways(q, k, batch, group, outer)
    own_q: Tensor = _ToHeads.apply(q, queries)
    both: Tensor = _ToHeads.apply(torch.cat((k, v), dim=-1), keys)
    own_k, own_v = (x.contiguous() for x in both.split((k.shape[-1], v.shape[-1]), dim=-1))
    sink = None if s_aux is None else s_aux[queries.own()]
    out, lse = inner(own_q, own_k, own_v, sink)
    if not return_lse:
        return _OutToTokens.apply(out, queries), None
    found: tuple[Tensor, Tensor] = _ToTokens.apply(out, lse, queries)
    return found

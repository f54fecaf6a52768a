"""A packed (thd) attention layer in the shape of Megatron's, tensor parallel over two processes.

    python examples/distributed/megatron_thd.py

`FlashCoreAttention.forward` takes the arguments of a Megatron core attention, among them the
`PackedSeqParams` of a packed batch, so it can stand where a Megatron layer has its core attention.
Each rank projects to its own heads, attends, and the output projections are summed.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash8 import flash_attn_func, flash_attn_varlen_func
from processes import report, run

HIDDEN, HEADS, HEADS_KV, HEAD_DIM = 64, 8, 2, 16
LENGTHS = (13, 1, 40, 26)
PADDED_LENGTHS = (16, 4, 40, 28)  # each sequence starts at a multiple of 4


@dataclass
class PackedSeqParams:
    """The fields of megatron.core.packed_seq_params.PackedSeqParams that attention reads."""

    qkv_format: str
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None


class FlashCoreAttention(nn.Module):
    """query (tokens, heads, head_dim) packed, or (seqlen, batch, heads, head_dim); causal."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("attention_mask and attention_bias must be None: the mask is causal")
        if packed_seq_params is None:
            q, k, v = (x.transpose(0, 1) for x in (query, key, value))
            return flash_attn_func(q, k, v, causal=True).transpose(0, 1).flatten(2)
        return self._packed(query, key, value, packed_seq_params).flatten(1)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, params: PackedSeqParams) -> Tensor:
        begins_q, begins_k, used_q, used_k = params.cu_seqlens_q, params.cu_seqlens_kv, None, None
        if params.cu_seqlens_q_padded is not None and params.cu_seqlens_kv_padded is not None:
            used_q, used_k = begins_q.diff(), begins_k.diff()
            begins_q, begins_k = params.cu_seqlens_q_padded, params.cu_seqlens_kv_padded
        return flash_attn_varlen_func(
            q,
            k,
            v,
            begins_q,
            begins_k,
            params.max_seqlen_q,
            params.max_seqlen_kv,
            seqused_q=used_q,
            seqused_k=used_k,
            causal=True,
        )


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad


class ParallelAttention(nn.Module):
    """Column-parallel q, k, v; row-parallel output: rank r has the heads [r, r + 1) * heads / P."""

    def __init__(self, weights: list[Tensor], rank: int, ranks: int) -> None:
        super().__init__()
        *inputs, output = weights
        self.inputs = nn.ParameterList(w.chunk(ranks, dim=0)[rank].clone() for w in inputs)
        self.output = nn.Parameter(output.chunk(ranks, dim=1)[rank].clone())
        self.core_attention = FlashCoreAttention()

    def forward(self, x: Tensor, params: PackedSeqParams) -> Tensor:
        q, k, v = ((x @ w.T).unflatten(-1, (-1, HEAD_DIM)) for w in self.inputs)
        out = self.core_attention(q, k, v, None, packed_seq_params=params)
        return _SumOverRanks.apply(out @ self.output.T)


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def one_process(weights: list[Tensor], sequences: list[Tensor]) -> Tensor:
    """The same layer with all heads, one unpadded sequence after the other."""
    outputs = []
    for x in sequences:
        q, k, v = ((x @ w.T).view(1, len(x), -1, HEAD_DIM) for w in weights[:3])
        outputs.append(flash_attn_func(q, k, v, causal=True)[0].flatten(1) @ weights[3].T)
    return torch.cat(outputs)


def with_padding(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The packed sequences with noise between them, and which rows are theirs."""
    rows, valid = [], []
    for x, padded in zip(sequences, PADDED_LENGTHS, strict=True):
        rows += [x, torch.randn(padded - len(x), HIDDEN)]
        valid.append(torch.arange(padded) < len(x))
    return torch.cat(rows), torch.cat(valid)


def main() -> None:
    torch.manual_seed(0)
    rows = (HEADS * HEAD_DIM, HEADS_KV * HEAD_DIM, HEADS_KV * HEAD_DIM)
    weights = [torch.randn(n, HIDDEN) / HIDDEN**0.5 for n in rows]
    weights.append(torch.randn(HIDDEN, HEADS * HEAD_DIM) / (HEADS * HEAD_DIM) ** 0.5)
    sequences = [torch.randn(n, HIDDEN) for n in LENGTHS]
    expected = one_process(weights, sequences)

    params = PackedSeqParams(
        "thd",
        *(cumulative(LENGTHS),) * 2,
        *(max(LENGTHS),) * 2,
        *(cumulative(PADDED_LENGTHS),) * 2,
    )
    packed, valid = with_padding(sequences)
    layer = ParallelAttention(weights, dist.get_rank(), dist.get_world_size())
    out = layer(packed, params)[valid]
    difference = (out - expected).abs().max().item()
    report(f"{len(LENGTHS)} sequences, {HEADS // dist.get_world_size()} heads per rank")
    report(f"largest difference from one process without padding: {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    run(main)

"""Multi-head attention whose heads are split over the processes of a group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flash8.compat.flash_attn.modules.generation import (
    CachedAttention,
    get_alibi_slopes,
    new_cache,
)
from flash8.compat.flash_attn.ops.fused_dense import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_dim_for_local_rank,
)


class ParallelMHA(CachedAttention):
    """Self-attention, tensor parallel; see `MHA` for the arguments, and:

    process_group: has some of the heads in each process.
    sequence_parallel: the input and the output are split along their first dimension.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: Any,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Any = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % heads_kv != 0 or embed_dim % num_heads != 0:
            raise ValueError(
                "num_heads must be a multiple of num_heads_kv and divide embed_dim, got "
                f"num_heads={num_heads}, num_heads_kv={heads_kv}, embed_dim={embed_dim}"
            )
        rank, size = dist.get_rank(process_group), process_group.size()
        group_size = num_heads // heads_kv
        own_kv = get_dim_for_local_rank(heads_kv, size, rank)
        own = own_kv * group_size
        before = sum(get_dim_for_local_rank(heads_kv, size, r) for r in range(rank)) * group_size
        slopes = get_alibi_slopes(num_heads)[before : before + own]
        rotary = {
            "dim": rotary_emb_dim,
            "base": rotary_emb_base,
            "scale_base": rotary_emb_scale_base,
            "interleaved": rotary_emb_interleaved,
            "device": device,
        }
        super().__init__(
            causal,
            layer_idx,
            rotary if rotary_emb_dim > 0 else None,
            softmax_scale,
            dropout,
            torch.tensor(slopes, device=device) if use_alibi else None,
            window_size,
            use_flash_attn,
            checkpointing,
        )
        self.embed_dim = embed_dim
        self.num_heads, self.num_heads_kv = num_heads, heads_kv
        self.num_heads_per_rank, self.num_heads_kv_per_rank = own, own_kv
        self.head_dim = embed_dim // num_heads
        self.process_group = process_group
        self.world_size, self.local_rank = size, rank
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        made["sequence_parallel"] = sequence_parallel
        self.Wqkv = ColumnParallelLinear(
            embed_dim,
            self.head_dim * (num_heads + 2 * heads_kv),
            process_group,
            bias=qkv_proj_bias,
            multiple_of=self.head_dim * (group_size + 2),
            **made,
        )
        self.out_proj = RowParallelLinear(
            embed_dim,
            embed_dim,
            process_group,
            bias=out_proj_bias,
            multiple_of=self.head_dim * group_size,
            **made,
        )

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        heads = (self.num_heads_kv_per_rank, self.head_dim)
        return new_cache(self.out_proj.weight, batch_size, max_seqlen, heads, dtype)

    def forward(
        self,
        x: Tensor,
        seqlen: int | None = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """x: (batch, seqlen, embed_dim), or (batch * seqlen, embed_dim) with seqlen."""
        qkv = self.Wqkv(x)
        if seqlen is not None:
            qkv = qkv.unflatten(0, (-1, seqlen))
        heads, heads_kv = self.num_heads_per_rank, self.num_heads_kv_per_rank
        if heads == heads_kv:
            qkv = qkv.unflatten(-1, (3, heads, self.head_dim))
            context = self.attend_qkv(qkv, inference_params, **kwargs)
        else:
            sizes = (heads * self.head_dim, 2 * heads_kv * self.head_dim)
            q, kv = qkv.split(sizes, dim=-1)
            q = q.unflatten(-1, (heads, self.head_dim))
            kv = kv.unflatten(-1, (2, heads_kv, self.head_dim))
            context = self.attend(q, kv, inference_params, **kwargs)
        context = context.flatten(-2)
        out: Tensor = self.out_proj(context if seqlen is None else context.flatten(0, 1))
        return out

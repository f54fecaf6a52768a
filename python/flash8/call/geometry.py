"""The sizes of an attention call."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The sizes of a call, once q, k and v have been found to agree."""

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    q_packed: bool  # (total, heads, head_dim) with cu_seqlens_q
    k_packed: bool
    paged: bool

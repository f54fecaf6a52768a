"""Runs the decode kernel on whatever driver is given, through the native host layer.

Tensors are copied into the driver's memory with guards of NaN on both sides of every one of them,
which are compared after the launch. Outputs and the partial results are NaN before it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash8 import _native
from forward_launch import Launch

#: Tokens that share a descale of a block.
BLOCK = 128


@dataclass(frozen=True)
class Call:
    """Attention of q over a cache: (batch, seqlen, heads, d), or pages."""

    q: Tensor  # or packed (total, heads, d)
    k: Tensor
    v: Tensor
    softmax_scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    attention_chunk: int = 0
    alibi_slopes: Tensor | None = None  # (heads) or (batch, heads)
    #: cu_seqlens_q, seqused_k, leftpad_k, kv_batch_idx: int32
    indices: dict[str, Tensor] = field(default_factory=dict)
    page_table: Tensor | None = None
    max_seqlen_q: int | None = None
    s_aux: Tensor | None = None
    #: Scalar, (batch, heads_kv); by key (pages, page_size, heads_kv) or (pages, heads_kv, blocks).
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    k_mean: Tensor | None = None  # (batch, heads_kv, head_dim): what k lacks
    v_mean: Tensor | None = None
    qv: Tensor | None = None  # as q, head_dim_v
    q_descale: Tensor | None = None  # of an e4m3 q: scalar, (batch, heads) or by block of queries
    out_dtype: torch.dtype | None = None  # q's, unless it is e4m3
    tree_mask: Tensor | None = None  # int32, as q without heads and channels
    split_keys: int = 0
    scheduler_metadata: Tensor | None = None  # int32

    @property
    def batch(self) -> int:
        packed = self.indices.get("cu_seqlens_q")
        return self.q.shape[0] if packed is None else packed.numel() - 1


class DecodeKernel:
    """A compiled variant, loaded by `driver`."""

    def __init__(self, driver: _native.Driver, image: bytes) -> None:
        self._driver = driver
        self._kernel = _native.Library(driver, image).kernel()
        info = self._kernel.info
        assert info is not None
        self.info = info
        self._multiprocessors = driver.devices()[0].multiprocessors

    def __call__(self, *calls: Call, ctas: int = 3) -> list[tuple[Tensor, Tensor]]:
        """O and LSE of each call, launched one after the other with one workspace, without waiting
        in between. Every element of both was NaN before, and all tickets are zero in the end."""
        given = Launch(self._driver)
        margin = max(0, self._multiprocessors - ctas)
        described = [self._describe(given, call) for call in calls]
        sizes = [
            _native.decode_workspace(self._kernel, 0, params, margin) for params, _, _ in described
        ]
        partials = given.upload(torch.full((max(s["partials"] for s in sizes) // 4,), torch.nan))
        tickets = torch.zeros(max(s["tickets"] for s in sizes) // 4, dtype=torch.int32)
        tickets_memory = given.upload(tickets)
        for params, _, _ in described:
            params.partials, params.tickets = partials.address, tickets_memory.address
            _native.launch_decode(self._kernel, 0, 0, params, margin)
        self._driver.synchronize()
        given.check()
        left = tickets_memory.read(tickets)
        assert not left.any(), f"the tickets are left at {left.tolist()}"
        return [
            (o_memory.read(o), lse_memory.read(lse))
            for _, (o_memory, o), (lse_memory, lse) in described
        ]

    def _describe(self, given: Launch, call: Call) -> tuple:
        params = _native.DecodeParams()
        rows, heads = call.q.shape[-3:-1]
        o = torch.full(
            (*call.q.shape[:-1], call.v.shape[-1]), torch.nan, dtype=call.out_dtype or call.q.dtype
        )
        lse = torch.full((*call.q.shape[:-3], heads, rows), torch.nan)
        for name in ("q", "k", "v"):
            given.tensor(params, name, getattr(call, name))
        if call.qv is not None:
            given.tensor(params, "qv", call.qv)
        o_memory, lse_memory = given.tensor(params, "o", o), given.upload(lse)
        params.lse = (lse_memory.address, heads * rows if o.dim() == 4 else 0, rows)
        params.heads_q, params.heads_kv = heads, call.k.shape[-2]
        params.head_dim, params.head_dim_v = call.q.shape[-1], call.v.shape[-1]
        pages = params.pages
        pages.num_pages, pages.page_size = call.k.shape[:2]
        sequences = params.sequences
        for name, x in call.indices.items():
            setattr(sequences, name, given.upload(x).address)
        sequences.batch = call.batch
        packed = "cu_seqlens_q" in call.indices
        sequences.total_q = rows if packed else 0
        sequences.max_seqlen_q = call.max_seqlen_q if packed else rows
        if call.page_table is None:
            sequences.batch_k, sequences.max_seqlen_k = call.k.shape[:2]
        else:
            pages.page_table = given.upload(call.page_table).address
            pages.page_table_stride = call.page_table.shape[1]
            pages.max_pages = call.page_table.shape[1]
            sequences.batch_k = call.page_table.shape[0]
            sequences.max_seqlen_k = call.page_table.shape[1] * call.k.shape[1]
        given.scores(params.scores, call)  # type: ignore[arg-type]
        for name in ("k_descale", "v_descale"):
            descale = getattr(call, name)
            if descale is not None:
                address = given.upload(descale.reshape(-1)).address
                steps = (*descale.stride(), 0, 0, 0)[:3]
                if descale.dim() == 3:
                    by_token = descale.shape == call.k.shape[:3]
                    page, x, y = steps
                    steps = (
                        (page, y, x) if by_token else (page, x, 0 if descale.shape[2] == 1 else y)
                    )
                    setattr(params, f"{name[0]}_scale_rows", 1 if by_token else BLOCK)
                setattr(params, name, (address, *steps))
        params.q_is_e4m3 = int(call.q.dtype == torch.float8_e4m3fn)
        params.heads_per_q_descale = 1
        if call.q_descale is not None:
            steps = (*call.q_descale.stride(), 0, 0, 0)[:3]
            if call.q_descale.dim() == 3:
                if packed:
                    steps = (0, *steps[1:])
            else:
                params.heads_per_q_descale = heads // call.q_descale.shape[-1] if steps[1] else 1
            params.q_descale = (given.upload(call.q_descale.reshape(-1)).address, *steps)
        if call.tree_mask is not None:
            params.tree_mask = given.upload(call.tree_mask).address
            params.tree_mask_stride = 0 if packed else rows
        params.split_keys = call.split_keys
        if call.scheduler_metadata is not None:
            params.scheduler_metadata = given.upload(call.scheduler_metadata).address
        for name in ("k_mean", "v_mean"):
            mean = getattr(call, name)
            if mean is not None:
                setattr(params, name, (given.upload(mean).address, *mean.stride()[:2]))
        return params, (o_memory, o), (lse_memory, lse)

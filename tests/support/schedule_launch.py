"""Runs the kernel that makes scheduler metadata on whatever driver is given, through the native
host layer, and counts what it counts key by key."""

import itertools

import torch
from torch import Tensor

import oracle
from decode_launch import Call
from flash8 import _native
from flash8.backends.hopper.decode_variants import DecodeVariant
from forward_launch import Launch

VERSION = 1
ROOM = 1 << 30  # of a sequence, as get_scheduler_metadata has it
MOST = 2**31 - 1


class ScheduleKernel:
    """hopper/decode/schedule.cu, loaded by `driver`."""

    def __init__(self, driver: _native.Driver, image: bytes) -> None:
        self._driver = driver
        self._kernel = _native.Library(driver, image).kernel()

    def __call__(
        self,
        variant: DecodeVariant,
        call: Call,
        *,
        new: Tensor | int = 0,
        **changes: int,
    ) -> Tensor:
        """The metadata of a call: each word was -1 before. `new` are the keys that calls append,
        `changes` other fields of DecodeParams."""
        given = Launch(self._driver)
        params = _native.ScheduleParams()
        counted = params.call
        counted.heads_q, counted.heads_kv = call.q.shape[-2], call.k.shape[-2]
        counted.split_keys = call.split_keys
        sequences = counted.sequences
        for name, x in call.indices.items():
            setattr(sequences, name, given.upload(x).address)
        packed = "cu_seqlens_q" in call.indices
        sequences.batch, sequences.batch_k = call.batch, MOST
        sequences.max_seqlen_q = call.max_seqlen_q if packed else call.q.shape[1]
        sequences.max_seqlen_k, sequences.total_q = ROOM, MOST
        given.scores(counted.scores, call)  # type: ignore[arg-type]
        params.block_m = variant.rows
        params.tile_head_dim, params.tile_head_dim_v = variant.head_dim, variant.head_dim_v
        params.qv, params.element_bytes = int(variant.qv), 1 if variant.cache == "e4m3" else 2
        if isinstance(new, Tensor):
            params.cu_seqlens_k_new = given.upload(new).address
        else:
            params.seqlen_k_new = new
        for name, value in changes.items():
            setattr(counted, name, value)
        metadata = torch.full((call.batch + 1,), -1, dtype=torch.int32)
        memory = given.upload(metadata)
        params.scheduler_metadata = memory.address
        _native.launch_schedule(self._kernel, 0, 0, params)
        self._driver.synchronize()
        given.check()
        return memory.read(metadata)


def counted(call: Call, block_m: int, block_n: int) -> list[int]:
    """What the metadata of a call with right indices holds, by the masks of its queries."""
    pieces = (_pieces(call, b, block_m, block_n) for b in range(call.batch))
    return [VERSION << 16 | block_m << 8 | block_n, *itertools.accumulate(pieces)]


def _pieces(call: Call, b: int, block_m: int, block_n: int) -> int:
    def index(name: str, otherwise: int) -> int:
        x = call.indices.get(name)
        return otherwise if x is None else int(x[b])

    cu_seqlens = call.indices.get("cu_seqlens_q")
    rows = call.q.shape[1] if cu_seqlens is None else int(cu_seqlens[b + 1] - cu_seqlens[b])
    padding = index("leftpad_k", 0)
    keys = index("seqused_k", call.k.shape[1]) - padding
    if rows == 0 or index("kv_batch_idx", 0) < 0:
        return 0
    mask = oracle.visible(rows, keys, call.causal, call.window, call.attention_chunk)
    seen = mask.any(dim=0).nonzero().flatten() + padding
    if seen.numel() == 0:
        return 0
    tiles = int(seen[-1]) // block_n - int(seen[0]) // block_n + 1
    if call.split_keys:
        tiles = -(-tiles // (call.split_keys // block_n))
    heads_kv = call.k.shape[-2]
    return tiles * -(-rows * (call.q.shape[-2] // heads_kv) // block_m) * heads_kv

"""Runs the forward kernel on whatever driver is given, through the native host layer.

Tensors are copied into the driver's memory with guards of NaN on both sides of every one of them,
which are compared after the launch. Outputs are poisoned before it and copied back after it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import oracle
from flash8 import _native
from flash8.tensors import v_colmajor
from flash8.tensors.tokens import Tokens
from guarded import GUARD_BYTES

_TYPES = {
    torch.float16: _native.ElementType.FLOAT16,
    torch.bfloat16: _native.ElementType.BFLOAT16,
}


@dataclass(frozen=True)
class Call:
    """One attention call: (batch, seqlen, heads, d), or packed (total, heads, d). With a page_table
    k and v are pages, and there are seqused_k."""

    q: Tensor
    k: Tensor
    v: Tensor  # by token; a kernel that takes it v_colmajor gets it so
    softmax_scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    attention_chunk: int = 0
    alibi_slopes: Tensor | None = None  # (heads) or (batch, heads)
    indices: dict[str, Tensor] = field(default_factory=dict)  # cu_seqlens_q, seqused_k, ...: int32
    page_table: Tensor | None = None  # (rows of the cache, columns): int32
    v_offsets: Tensor | None = None  # by which V becomes v_colmajor, where it is not cu_seqlens_k
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    s_aux: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int = 0
    # e4m3 only. descales by name: scalar, (batch, heads) or (batch, heads, blocks)
    descales: dict[str, Tensor] = field(default_factory=dict)
    v_mean: Tensor | None = None  # (batch, heads_kv, head_dim_v)
    k_mean: Tensor | None = None  # (batch, heads_kv, head_dim)
    v_channel_descale: Tensor | None = None  # (batch, heads_kv, head_dim_v)
    out_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Schedule:
    """How the host asks for the tiles to be handed out."""

    num_ctas: int = 2
    dynamic: bool = True
    heads_per_section: int = 1
    longest_first: bool = True  # of packed sequences
    first_draw: int = 0  # what the counter holds before the launch; anything but 0 is a bug


class Uploaded:
    """A tensor's bytes in the driver's memory, with guards."""

    def __init__(self, driver: _native.Driver, data: bytes) -> None:
        self._guard = b"\xff" * GUARD_BYTES
        self._size = len(data)
        self._memory = _native.DeviceMemory(driver, self._size + 2 * GUARD_BYTES)
        self._memory.write(self._guard + data + self._guard)
        self.address = self._memory.address + GUARD_BYTES

    def read(self, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        raw = torch.frombuffer(bytearray(self._memory.read(size, GUARD_BYTES)), dtype=torch.uint8)
        return raw.view(like.dtype).view(like.shape)

    def check(self) -> None:
        before = self._memory.read(GUARD_BYTES)
        behind = self._memory.read(GUARD_BYTES, GUARD_BYTES + self._size)
        whole = before == self._guard and behind == self._guard
        assert whole, "a kernel wrote beside its output"


class Launch:
    """The tensors of a launch in the driver's memory, with guards that are compared after it."""

    def __init__(self, driver: _native.Driver) -> None:
        self._driver = driver
        self._memory: list[Uploaded] = []

    def check(self) -> None:
        for memory in self._memory:
            memory.check()

    def sequences(self, sequences: _native.SequenceParams, call: Call) -> None:
        for name, x in call.indices.items():
            setattr(sequences, name, self.upload(x).address)
        for side, x in (("q", call.q), ("k", call.k)):
            if f"cu_seqlens_{side}" in call.indices:
                setattr(sequences, f"total_{side}", x.shape[0])
                setattr(sequences, f"max_seqlen_{side}", getattr(call, f"max_seqlen_{side}"))
            else:
                setattr(sequences, f"max_seqlen_{side}", x.shape[1])
        packed = call.indices.get("cu_seqlens_q")
        sequences.batch = call.q.shape[0] if packed is None else packed.numel() - 1
        sequences.batch_k = call.k.shape[0]
        table = getattr(call, "page_table", None)
        if table is not None:
            sequences.batch_k = table.shape[0]
            sequences.max_seqlen_k = table.shape[1] * call.k.shape[1]

    def pages(self, pages: _native.PageParams, call: Call) -> None:
        if call.page_table is not None:
            pages.num_pages, pages.page_size = call.k.shape[:2]
            pages.max_pages = pages.page_table_stride = call.page_table.shape[1]
            pages.page_table = self.upload(call.page_table).address

    def scores(self, scores: _native.ScoreParams, call: Call) -> None:
        scores.softmax_scale = call.softmax_scale
        scores.softcap = call.softcap
        scores.window_left = call.window[0]
        scores.window_right = 0 if call.causal else call.window[1]
        scores.attention_chunk = call.attention_chunk
        if call.alibi_slopes is not None:
            scores.alibi_slopes = self.upload(call.alibi_slopes).address
            shared = call.alibi_slopes.dim() == 1
            scores.alibi_batch_stride = 0 if shared else call.alibi_slopes.shape[1]
        if call.s_aux is not None:
            scores.sinks = self.upload(call.s_aux).address

    def dropout(self, dropout: _native.DropoutParams, call: Call) -> None:
        if call.dropout_p > 0.0:
            seed = torch.tensor([call.dropout_seed], dtype=torch.int64)
            dropout.seed = self.upload(seed).address
            dropout.threshold = oracle.threshold(call.dropout_p)
            dropout.keep_scale = oracle.keep_scale(call.dropout_p)

    def upload(self, x: Tensor) -> Uploaded:
        data = x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
        memory = Uploaded(self._driver, data)
        self._memory.append(memory)
        return memory

    def tensor(self, params: Any, name: str, x: Tensor) -> Uploaded:
        """Uploads x as it lies in memory, strides and all."""
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        memory = self.upload(x.as_strided((extent if x.numel() else 0,), (1,)))
        batch_stride = x.stride(0) if x.dim() == 4 else 0
        setattr(params, name, (memory.address, batch_stride, x.stride(-3), x.stride(-2)))
        return memory


class ForwardKernel:
    """A compiled variant, loaded by `driver`."""

    def __init__(self, driver: _native.Driver, image: bytes) -> None:
        self._driver = driver
        self._kernel = _native.Library(driver, image).kernel()
        info = self._kernel.info
        assert info is not None
        self.info = info
        self._multiprocessors = driver.devices()[0].multiprocessors

    def __call__(self, call: Call, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """O and LSE. Every element of both was NaN before the launch, and the counter of tiles is
        zero after it."""
        given = Launch(self._driver)
        params = self.describe(given, call)
        o_dtype = call.out_dtype if call.q.element_size() == 1 else call.q.dtype
        params.o_type = _TYPES[o_dtype]
        o = torch.full((*call.q.shape[:-1], call.v.shape[-1]), float("nan"), dtype=o_dtype)
        o_memory = given.tensor(params, "o", o)
        lse, lse_memory = self.lse(given, params, call)
        self.run(given, params, schedule)
        return o_memory.read(o), lse_memory.read(lse)

    def lse(self, given: Launch, params: Any, call: Call) -> tuple[Tensor, Uploaded]:
        """NaN in the shape of LSE, and where it is written."""
        rows, heads = call.q.shape[-3:-1]
        lse = torch.full((*call.q.shape[:-3], heads, rows), float("nan"), dtype=torch.float32)
        memory = given.upload(lse)
        params.lse = (memory.address, heads * rows, rows)
        return lse, memory

    def describe(self, given: Launch, call: Call) -> Any:
        """The parameters of a call, but for what is written."""
        params = _native.ForwardParams()
        for name in ("q", "k"):
            given.tensor(params, name, getattr(call, name))
        given.tensor(params, "v", _colmajor(call) if self.info.v_colmajor else call.v)
        params.heads_q, params.heads_kv = call.q.shape[-2], call.k.shape[-2]
        params.head_dim, params.head_dim_v = call.q.shape[-1], call.v.shape[-1]
        given.sequences(params.sequences, call)
        given.pages(params.pages, call)
        given.scores(params.scores, call)
        given.dropout(params.dropout, call)
        descales(given, params, call)
        return params

    def run(self, given: Launch, params: Any, schedule: Schedule) -> None:
        """Launches it and waits, and looks at what the kernel leaves behind."""
        counter = given.upload(torch.tensor([schedule.first_draw, 0], dtype=torch.int32))
        params.scheduler.tile_count = counter.address if schedule.dynamic else 0
        params.scheduler.heads_per_section = schedule.heads_per_section
        params.scheduler.longest_first = int(schedule.longest_first)
        margin = self._multiprocessors - schedule.num_ctas
        _native.launch_forward(self._kernel, 0, 0, params, sm_margin=margin)
        self._driver.synchronize()
        given.check()
        left = counter.read(torch.zeros(2, dtype=torch.int32)).tolist()
        assert left == [0, 0], f"the counters are left at {left}"


def descales(given: Launch, params: Any, call: Call) -> None:
    """Descales and means of an FP8 call."""
    heads = call.q.shape[-2]
    params.heads_per_q_descale = 1
    for name, descale in call.descales.items():
        steps = [0 if n == 1 else s for n, s in zip(descale.shape, descale.stride(), strict=True)]
        steps += [0] * (3 - len(steps))
        setattr(params, name, (given.upload(descale.reshape(-1)).address, *steps))
        if name == "q_descale" and descale.dim() > 1:
            params.heads_per_q_descale = heads // descale.shape[1]
    for name in ("k_mean", "v_mean", "v_channel_descale"):
        channels = getattr(call, name)
        if channels is not None:
            channels = channels.contiguous()
            strides = channels.stride(0), channels.stride(1)
            setattr(params, name, (given.upload(channels).address, *strides))


def _colmajor(call: Call) -> Tensor:
    """V as the quantizer would write it, but with NaN where it writes zeros; (..., d, heads, keys)
    as the struct has it."""
    offsets = call.indices.get("cu_seqlens_k") if call.v_offsets is None else call.v_offsets
    tokens = Tokens(offsets)
    written = v_colmajor.to_colmajor(torch.ones_like(call.v, dtype=torch.uint8), tokens)
    keys = v_colmajor.to_colmajor(call.v, tokens)
    keys.view(torch.uint8)[written == 0] = 0x7F
    return keys.transpose(-3, -2)

"""Runs the forward kernel on whatever driver is given: the tests' own host code.

Tensors are copied into the driver's memory with a guard of NaN behind every one of them, outputs
are poisoned before the launch and copied back after it.
"""

import math
import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash8 import _native

_LAYOUT = _native.layout()
_GUARD_BYTES = 4096
_ELEMENTS = {
    torch.float16: _native.ElementType.FLOAT16,
    torch.bfloat16: _native.ElementType.BFLOAT16,
}
_FORMATS = {4: "<i", 8: "<q"}


@dataclass
class Params:
    """The bytes of a ForwardParams, written by the layout that the extension reports."""

    data: bytearray = field(default_factory=lambda: bytearray(_LAYOUT["ForwardParams"]["size"]))

    def set(self, path: str, value: int | float | bytes) -> None:
        """`path` is a field, or "field.field" of one of the structs within."""
        outer, _, inner = path.partition(".")
        offset, size = _LAYOUT["ForwardParams"]["fields"][outer]
        if inner:
            start, size = _LAYOUT[_STRUCTS[outer]]["fields"][inner]
            offset += start
        if isinstance(value, bytes):
            encoded = value
        else:
            encoded = struct.pack("<f" if isinstance(value, float) else _FORMATS[size], value)
        if len(encoded) != size:
            raise ValueError(f"{path} has {size} bytes, got {len(encoded)}")
        self.data[offset : offset + size] = encoded


_STRUCTS = {
    **dict.fromkeys(("q", "k", "v", "o"), "TensorRef"),
    "lse": "RowRef",
    "sequences": "SequenceParams",
    "scores": "ScoreParams",
    "scheduler": "SchedulerParams",
}


@dataclass(frozen=True)
class Call:
    """One attention call: (batch, seqlen, heads, d), or packed (total, heads, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    indices: dict[str, Tensor] = field(default_factory=dict)  # cu_seqlens_q, seqused_k, ...: int32
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    s_aux: Tensor | None = None


class ForwardKernel:
    """A compiled variant, loaded by `driver`."""

    def __init__(self, driver: _native.Driver, image: bytes) -> None:
        self._driver = driver
        self._kernel = _native.Library(driver, image).kernel()
        info = self._kernel.info
        assert info is not None
        self.info = info

    def __call__(self, call: Call, *, num_ctas: int = 2) -> tuple[Tensor, Tensor]:
        """O and LSE. Every element of both was NaN before the launch."""
        self._memory: list[_native.DeviceMemory] = []
        params = Params()
        batch = self._describe(params, call)
        packed = call.q.dim() == 3
        rows, heads = call.q.shape[-3:-1]
        o = call.q.new_full((*call.q.shape[:-1], call.v.shape[-1]), float("nan"))
        shape = (heads, rows) if packed else (call.q.shape[0], heads, rows)
        lse = torch.full(shape, float("nan"), dtype=torch.float32)
        o_memory, lse_memory = self._tensor(params, "o", o), self._upload(lse)
        params.set("lse.ptr", lse_memory.address)
        params.set("lse.batch_stride", heads * rows)
        params.set("lse.head_stride", rows)
        longest = call.max_seqlen_q if packed else rows
        assert longest is not None
        m_blocks = -(-longest // self.info.block_m)
        params.set("scheduler.max_m_blocks", m_blocks)
        grid = max(1, min(num_ctas, m_blocks * heads * batch))
        self._kernel.launch((grid, 1, 1), [bytes(params.data)])
        self._driver.synchronize()
        return _download(o_memory, o), _download(lse_memory, lse)

    def _describe(self, params: Params, call: Call) -> int:
        q, k, v = call.q, call.k, call.v
        for name, x, rows in (("q", q, self.info.block_m), ("k", k, self.info.block_n)):
            self._map(params, name, x, self._tensor(params, name, x), rows)
        self._map(params, "v", v, self._tensor(params, "v", v), self.info.block_n)
        for name, x in call.indices.items():
            params.set(f"sequences.{name}", self._upload(x).address)
        packed_q, packed_k = q.dim() == 3, k.dim() == 3
        batch = call.indices["cu_seqlens_q"].numel() - 1 if packed_q else q.shape[0]
        params.set("sequences.batch", batch)
        for side, x, packed in (("q", q, packed_q), ("k", k, packed_k)):
            longest = getattr(call, f"max_seqlen_{side}") if packed else x.shape[1]
            params.set(f"sequences.max_seqlen_{side}", longest)
        params.set("scores.softmax_scale", call.softmax_scale)
        params.set("scores.softmax_scale_log2", call.softmax_scale * math.log2(math.e))
        params.set("scores.softcap", call.softcap)
        params.set("scores.window_left", call.window[0])
        params.set("scores.window_right", 0 if call.causal else call.window[1])
        if call.s_aux is not None:
            params.set("scores.sinks", self._upload(call.s_aux.float()).address)
        params.set("heads_q", q.shape[-2])
        params.set("heads_kv", k.shape[-2])
        params.set("head_dim", q.shape[-1])
        params.set("head_dim_v", v.shape[-1])
        return batch

    def _upload(self, x: Tensor) -> _native.DeviceMemory:
        data = x.contiguous().view(torch.uint8).numpy().tobytes()
        memory = _native.DeviceMemory(self._driver, max(len(data), 1) + _GUARD_BYTES)
        memory.write(data + b"\xff" * _GUARD_BYTES)
        self._memory.append(memory)
        return memory

    def _tensor(self, params: Params, name: str, x: Tensor) -> _native.DeviceMemory:
        memory = self._upload(x)
        rows, heads, head_dim = x.shape[-3:]
        params.set(f"{name}.ptr", memory.address)
        params.set(f"{name}.batch_stride", rows * heads * head_dim)
        params.set(f"{name}.row_stride", heads * head_dim)
        params.set(f"{name}.head_stride", head_dim)
        return memory

    def _map(
        self, params: Params, name: str, x: Tensor, memory: _native.DeviceMemory, block: int
    ) -> None:
        """The rank-4 tensor map (head_dim, row, head, batch)."""
        batch = x.shape[0] if x.dim() == 4 else 1
        rows, heads, head_dim = x.shape[-3:]
        size = x.element_size()
        tile = self.info.head_dim_v if name == "v" else self.info.head_dim
        panel = 64 if tile % 64 == 0 else 32
        encoded = _native.encode_tensor_map(
            self._driver,
            element_type=_ELEMENTS[x.dtype],
            address=memory.address,
            dims=(head_dim, rows, heads, batch),
            strides=tuple(size * s for s in (heads * head_dim, head_dim, rows * heads * head_dim)),
            box=(panel, block, 1, 1),
            swizzle=_native.Swizzle.B128 if panel == 64 else _native.Swizzle.B64,
        )
        params.set(f"tma_{name}", encoded)


def _download(memory: _native.DeviceMemory, like: Tensor) -> Tensor:
    size = like.numel() * like.element_size()
    raw = torch.frombuffer(bytearray(memory.read(size)), dtype=torch.uint8)
    return raw.view(like.dtype).view(like.shape)

"""Runs the kernels of the backward on whatever driver is given, straight from their params struct.

Inputs, outputs and workspace lie in the driver's memory with guards on both sides, which are
compared after the launches. Outputs and workspace are NaN before them.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash8 import _native
from forward_launch import Call, Uploaded

_LOG2_E = math.log2(math.e)


class _TensorRef(ctypes.Structure):
    _fields_ = [
        ("ptr", ctypes.c_uint64),
        ("batch_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    ]


class _RowRef(ctypes.Structure):
    _fields_ = [
        ("ptr", ctypes.c_uint64),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    ]


class _SequenceParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q")),
        *((name, ctypes.c_uint64) for name in ("seqused_k", "leftpad_k", "kv_batch_idx")),
        *((name, ctypes.c_int64) for name in ("total_q", "total_k")),
        *((name, ctypes.c_int32) for name in ("batch", "batch_k")),
        *((name, ctypes.c_int32) for name in ("max_seqlen_q", "max_seqlen_k")),
    ]


class _ScoreParams(ctypes.Structure):
    _fields_ = [
        ("sinks", ctypes.c_uint64),
        ("alibi_slopes", ctypes.c_uint64),
        ("alibi_batch_stride", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("softmax_scale", "softmax_scale_log2", "softcap")),
        *((name, ctypes.c_int32) for name in ("window_left", "window_right", "attention_chunk")),
    ]


class _SchedulerParams(ctypes.Structure):
    _fields_ = [
        ("tile_count", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("max_m_blocks", "heads_per_section")),
        *((name, ctypes.c_int32) for name in ("num_ctas", "reserved")),
    ]


class BackwardParams(ctypes.Structure):
    """hopper/backward/params.h."""

    _fields_ = [
        *((f"tma_{name}", ctypes.c_char * 128) for name in ("q", "k", "v", "dout")),
        *((name, _TensorRef) for name in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")),
        *((name, _RowRef) for name in ("lse", "dlse", "k_mean")),
        *((name, ctypes.c_uint64) for name in ("row_stats", "dq_accum", "dq_semaphore")),
        *((name, ctypes.c_uint64) for name in ("dsinks_partial", "dsinks")),
        ("sequences", _SequenceParams),
        ("scores", _ScoreParams),
        ("scheduler", _SchedulerParams),
        ("query_blocks", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("max_n_blocks", "heads_q", "heads_kv")),
        *((name, ctypes.c_int32) for name in ("head_dim", "head_dim_v")),
        ("zero", ctypes.c_int32),
        ("reserved", ctypes.c_int32 * 6),
    ]


@dataclass(frozen=True)
class Gradients:
    """What a backward gives."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None = None
    dq_sums: Tensor | None = None  # in fp32, as they lie in the workspace


@dataclass(frozen=True)
class Images:
    """The three kernels of a variant."""

    preprocess: bytes
    kernel: bytes
    postprocess: bytes


class BackwardKernels:
    """Compiled kernels, loaded by `driver`."""

    def __init__(self, driver: _native.Driver, images: Images) -> None:
        self._driver = driver
        self._preprocess, self._kernel, self._postprocess = (
            _native.Library(driver, image).kernel()
            for image in (images.preprocess, images.kernel, images.postprocess)
        )
        info = self._kernel.info
        assert info is not None
        self.info = info

    def __call__(
        self,
        call: Call,
        o: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None = None,
        k_mean: Tensor | None = None,
    ) -> Gradients:
        """Every element of the outputs and of the workspace was NaN before the launches."""
        self._memory: list[Uploaded] = []
        params = BackwardParams()
        rows, heads = call.q.shape[-3:-1]
        params.heads_q, params.heads_kv = heads, call.k.shape[-2]
        params.head_dim, params.head_dim_v = call.q.shape[-1], call.v.shape[-1]
        given = {"q": call.q, "k": call.k, "v": call.v, "o": o, "dout": dout}
        for name, x in given.items():
            self._tensor(params, name, x)
        outputs = {}
        for name, like in (("dq", call.q), ("dk", call.k), ("dv", call.v)):
            filled = torch.full_like(like, math.nan)
            outputs[name] = (self._tensor(params, name, filled), filled)
        if k_mean is not None:
            strides = k_mean.stride(0), k_mean.stride(1)
            params.k_mean = _RowRef(self._upload(k_mean).address, *strides)
        for name, x in (("lse", lse), ("dlse", dlse)):
            if x is not None:
                setattr(params, name, _RowRef(self._upload(x).address, heads * rows, rows))
        self._sequences(params, call)
        self._scores(params.scores, call)
        self._workspace(params, call)
        self._maps(params, call)
        packed_k = "cu_seqlens_k" in call.indices
        key_blocks = (
            call.k.shape[0] // self.info.block_n + params.sequences.batch
            if packed_k
            else params.sequences.batch * params.max_n_blocks
        )
        by_queries = (heads * params.query_blocks, 1, 1)
        by_keys = (params.heads_kv * key_blocks, 1, 1)
        for kernel, grid in (
            (self._preprocess, by_queries),
            (self._kernel, by_keys),
            (self._postprocess, by_queries),
        ):
            if grid[0] > 0:
                self.launch(kernel, grid, params)
        for memory in self._memory:
            memory.check()
        sinks = None
        if call.s_aux is not None:
            sinks = self._dsinks.read(torch.zeros(heads))
        read = (m.read(x) if x.numel() else x for m, x in [*outputs.values(), self._dq_sums])
        dq, dk, dv, dq_sums = read
        return Gradients(dq, dk, dv, sinks, dq_sums)

    def launch(self, kernel, grid, params: BackwardParams) -> None:
        kernel.launch(grid, [bytes(params)])
        self._driver.synchronize()

    def _sequences(self, params: BackwardParams, call: Call) -> None:
        sequences = params.sequences
        for name, x in call.indices.items():
            setattr(sequences, name, self._upload(x).address)
        for side, x in (("q", call.q), ("k", call.k)):
            if f"cu_seqlens_{side}" in call.indices:
                setattr(sequences, f"total_{side}", x.shape[0])
                setattr(sequences, f"max_seqlen_{side}", getattr(call, f"max_seqlen_{side}"))
            else:
                setattr(sequences, f"max_seqlen_{side}", x.shape[1])
        packed = call.indices.get("cu_seqlens_q")
        sequences.batch = call.q.shape[0] if packed is None else packed.numel() - 1
        sequences.batch_k = call.k.shape[0]
        block_m, block_n = self.info.block_m, self.info.block_n
        params.scheduler.max_m_blocks = -(-sequences.max_seqlen_q // block_m)
        params.scheduler.heads_per_section = 2
        params.max_n_blocks = -(-sequences.max_seqlen_k // block_n)
        params.query_blocks = (
            sequences.batch * params.scheduler.max_m_blocks
            if packed is None
            else call.q.shape[0] // block_m + sequences.batch
        )

    def _scores(self, scores: _ScoreParams, call: Call) -> None:
        scores.softmax_scale = call.softmax_scale
        scores.softmax_scale_log2 = call.softmax_scale * _LOG2_E
        scores.softcap = call.softcap
        scores.window_left = call.window[0]
        scores.window_right = 0 if call.causal else call.window[1]
        scores.attention_chunk = call.attention_chunk
        if call.alibi_slopes is not None:
            scores.alibi_slopes = self._upload(call.alibi_slopes).address
            shared = call.alibi_slopes.dim() == 1
            scores.alibi_batch_stride = 0 if shared else call.alibi_slopes.shape[1]
        if call.s_aux is not None:
            scores.sinks = self._upload(call.s_aux).address

    def _workspace(self, params: BackwardParams, call: Call) -> None:
        blocks = params.heads_q * params.query_blocks
        block_m, head_dim = self.info.block_m, self.info.head_dim
        for name, count in (
            ("row_stats", 2 * block_m),
            ("dq_accum", block_m * head_dim),
            ("dq_semaphore", 1),
        ):
            nan = torch.full((blocks * count,), math.nan)
            memory = self._upload(nan)
            setattr(params, name, memory.address)
            if name == "dq_accum":
                self._dq_sums = (memory, nan)
        if call.s_aux is not None:
            params.dsinks_partial = self._upload(torch.full((blocks,), math.nan)).address
            self._dsinks = self._upload(torch.full((params.heads_q,), math.nan))
            params.dsinks = self._dsinks.address

    def _maps(self, params: BackwardParams, call: Call) -> None:
        block_m, block_n = self.info.block_m, self.info.block_n
        # The channels of which a product takes all: panels hold no others.
        split = max(self.info.head_dim, self.info.head_dim_v) > 128
        by_product = [d // 2 if split else d for d in (self.info.head_dim, self.info.head_dim_v)]
        half = self.info.head_dim // 2 if block_m < 128 else self.info.head_dim
        for name, panel, box_rows in (
            ("q", by_product[0], block_m),
            ("k", half, block_n),
            ("v", by_product[1], block_n),
            ("dout", by_product[1], block_m),
        ):
            x = getattr(call, name) if name != "dout" else call.q
            ref, side = getattr(params, name), "k" if name in "kv" else "q"
            packed = f"cu_seqlens_{side}" in call.indices
            rows, heads = x.shape[-3:-1]
            columns = params.head_dim if name in "qk" else params.head_dim_v
            batch = 1 if packed else x.shape[0]
            bytes_of_row = next(b for b in (128, 64, 32) if 2 * panel % b == 0)
            empty = rows == 0 or batch == 0
            dims = (columns, 1, 1, 1) if empty else (columns, rows, heads, batch)
            strides = [2 * s for s in (ref.row_stride, ref.head_stride, ref.batch_stride)]
            if packed:
                strides[2] = strides[0] * rows
            element = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}[call.q.dtype]
            encoded = _native.encode_tensor_map(
                self._driver,
                element_type=getattr(_native.ElementType, element),
                address=params.dq.ptr if empty else ref.ptr,
                dims=dims,
                strides=[s or 64 for s in strides],
                box=(bytes_of_row // 2, box_rows, 1, 1),
                swizzle=getattr(_native.Swizzle, f"B{bytes_of_row}"),
            )
            field = getattr(BackwardParams, f"tma_{name}")
            ctypes.memmove(ctypes.addressof(params) + field.offset, encoded, 128)

    def _upload(self, x: Tensor) -> Uploaded:
        data = x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
        memory = Uploaded(self._driver, data)
        self._memory.append(memory)
        return memory

    def _tensor(self, params: BackwardParams, name: str, x: Tensor) -> Uploaded:
        memory = self._upload(x)
        batch_stride = x.stride(0) if x.dim() == 4 else 0
        ref = _TensorRef(memory.address, batch_stride, x.stride(-3), x.stride(-2))
        setattr(params, name, ref)
        return memory

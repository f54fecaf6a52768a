"""The FP8 peers of the attention benchmark, each with and without its quantization.

Quantization is flash8's for all of them, by the granularity that a peer takes.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attention_cases import Call
from attention_peers import (
    Absent,
    Attention,
    Peer,
    RefusedError,
    if_importable,
    refuse_without_backward,
    refuse_without_kernel,
    varlen_arguments,
)

#: From quantized q, k and v, as `flash8.fp8.quantize` returns them, to O.
Attend = Callable[[Any, Any, Any], Tensor]
_OUTPUT_IN_FP8 = 0.15  # O is rounded to three bits, and much of it is near e4m3's smallest values


def peers(on_gpu: bool) -> Iterator[Peer | Absent]:
    for granularity, v_colmajor in itertools.product(("head", "block"), (False, True)):
        name = f"flash8 e4m3 {granularity}" + (", v_colmajor" if v_colmajor else "")
        prepare = functools.partial(_flash8, v_colmajor=v_colmajor)
        for peer in _with_and_without_quantization(name, prepare, granularity, v_colmajor):
            yield peer if on_gpu else Absent(peer.name, _ON_A_CPU)
    training = Peer("flash8 fp8_attention", _training, _DENSE_AND_PACKED, **_TRAINING_BOUNDS)
    yield training if on_gpu else Absent(training.name, _ON_A_CPU)
    for name, module, prepare_with, kinds, tolerance in (
        ("flash_attn_3 e4m3", "flash_attn_interface", _flash_attention_3, _DENSE_AND_PACKED, 0.1),
        ("cudnn e4m3", "cudnn", _cudnn, ("dense",), _OUTPUT_IN_FP8),
    ):
        if not on_gpu:
            yield Absent(name, _ON_A_CPU)
            continue
        for inside in (False, True):
            full_name = name + (_INSIDE if inside else "")
            make = functools.partial(_make, prepare_with, inside, kinds, tolerance)
            yield if_importable(full_name, module, make, grad=False)


_INSIDE = ", with quantization"
_DENSE_AND_PACKED = ("dense", "packed")
_TRAINING_BOUNDS = {"tolerance": 0.1, "gradient_tolerance": 0.15}
_ON_A_CPU = "FP8 products are emulated on a CPU: their time says nothing"


def _make(
    prepare_with: Any, inside: bool, kinds: tuple[str, ...], tolerance: float, module: Any
) -> Peer:
    prepare = functools.partial(prepare_with, module)
    quantized = functools.partial(_quantized, prepare, "tensor", False, inside)
    return Peer("", quantized, kinds, backward=False, tolerance=tolerance)


def _with_and_without_quantization(
    name: str, prepare: Callable[[Call, Any], Attend], granularity: str, v_colmajor: bool
) -> Iterator[Peer]:
    for inside in (False, True):
        quantized = functools.partial(_quantized, prepare, granularity, v_colmajor, inside)
        full_name = name + (_INSIDE if inside else "")
        yield Peer(full_name, quantized, _DENSE_AND_PACKED, backward=False, tolerance=0.1)


def _quantized(
    prepare: Callable[[Call, Any], Attend],
    granularity: str,
    v_colmajor: bool,
    inside: bool,
    call: Call,
) -> Attention:
    """`v_colmajor`: the quantizer transposes v. `inside`: quantization is part of what is timed."""
    from flash8 import fp8

    def quantize(*tensors: Tensor) -> list[Any]:
        ends = call.cu_seqlens
        return [
            fp8.quantize(x, granularity, cu_seqlens=ends, v_colmajor=v_colmajor and name == "v")
            for name, x in zip("qkv", tensors, strict=True)
        ]

    ready = quantize(call.q, call.k, call.v)
    attend = prepare(call, ready)
    if inside:
        return lambda q, k, v: attend(*quantize(q, k, v))
    return lambda q, k, v: attend(*ready)


def _flash8(call: Call, ready: list[Any], *, v_colmajor: bool) -> Attend:
    import flash8

    refuse_without_kernel(call, *(x.by_token() for x in ready))
    if call.cu_seqlens is None:
        return functools.partial(flash8.flash_attn_func, causal=call.causal)
    return functools.partial(flash8.flash_attn_varlen_func, **varlen_arguments(call))


def _training(call: Call) -> Attention:
    """Quantizes inside, keeps what it has quantized, and is differentiable."""
    import flash8

    refuse_without_kernel(call, call.q, call.k, call.v)
    refuse_without_backward(call)
    options = {"causal": call.causal} if call.cu_seqlens is None else varlen_arguments(call)
    return functools.partial(flash8.fp8_attention, **options)


def _flash_attention_3(module: Any, call: Call, ready: list[Any]) -> Attend:
    batch = call.case.batch if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    if call.cu_seqlens is None:
        function = functools.partial(module.flash_attn_func, causal=call.causal)
    else:
        function = functools.partial(module.flash_attn_varlen_func, **varlen_arguments(call))

    def attend(*scaled: Any) -> Tensor:
        names = ("q_descale", "k_descale", "v_descale")
        shape = (batch, call.case.heads_kv)  # for q too
        descales = {n: x.descale.expand(shape) for n, x in zip(names, scaled, strict=True)}
        out = function(*(x.data for x in scaled), **descales)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _cudnn(module: Any, call: Call, ready: list[Any]) -> Attend:
    try:
        return _CudnnGraph(module, call, ready)
    except Exception as error:  # of cuDNN's own types: not supported, or another version's API
        raise RefusedError(f"{type(error).__name__}: {error}"[:200]) from None


class _CudnnGraph:
    """cuDNN's FP8 attention, one descale per tensor, O in e4m3 as Hopper has it."""

    _PROBABILITY_SCALE = 256.0

    def __init__(self, cudnn: Any, call: Call, ready: list[Any]) -> None:
        self._cudnn, device = cudnn, call.q.device
        self._handle = cudnn.create_handle()
        e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        graph = self._graph = cudnn.pygraph(
            io_data_type=e4m3,
            intermediate_data_type=fp32,
            compute_data_type=fp32,
            handle=self._handle,
        )
        one = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1), "data_type": fp32}
        q, k, v = (x.data.transpose(1, 2) for x in ready)  # (batch, heads, seqlen, head_dim)
        self._inputs = {
            name: graph.tensor(name=name, dim=x.shape, stride=x.stride(), data_type=e4m3)
            for name, x in (("q", q), ("k", k), ("v", v))
        }
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        self._scales = {name: graph.tensor(name=name, **one) for name in names}
        out, _, *amaxes = graph.sdpa_fp8(
            **self._inputs,
            **self._scales,
            attn_scale=call.case.head_dim**-0.5,
            use_causal_mask=call.causal,
            generate_stats=False,
        )
        out.set_output(True).set_dim(q.shape).set_stride(q.stride()).set_data_type(e4m3)
        for amax in amaxes:
            amax.set_output(True).set_dim(one["dim"]).set_stride(one["stride"]).set_data_type(fp32)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        size = max(1, graph.get_workspace_size())
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self._out, self._amaxes = out, amaxes
        scale = self._PROBABILITY_SCALE
        self._constants = [
            torch.full((1, 1, 1, 1), value, device=device) for value in (1 / scale, scale, 1.0)
        ]
        self._amax_memory = [torch.zeros(1, 1, 1, 1, device=device) for _ in amaxes]

    def __call__(self, *scaled: Any) -> Tensor:
        out = torch.empty_like(scaled[0].data)
        descales = [x.descale.view(1, 1, 1, 1) for x in scaled]
        pack = dict(zip(self._inputs.values(), (x.data for x in scaled), strict=True))
        pack |= dict(zip(self._scales.values(), descales + self._constants, strict=True))
        pack |= dict(zip(self._amaxes, self._amax_memory, strict=True))
        pack[self._out] = out
        if out.is_cuda:
            stream = torch.cuda.current_stream(out.device).cuda_stream
            self._cudnn.set_stream(handle=self._handle, stream=stream)
        self._graph.execute(pack, self._workspace, handle=self._handle)
        return out

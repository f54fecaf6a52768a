"""The peers of the attention benchmark: flash8, and everything else that the machine has.

A peer prepares a call once (plans, block masks, quantized copies) and then is a function of q, k
and v, in the call's layout, that is timed.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_cases import Call, Case, shows_order

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class RefusedError(Exception):
    """Why a peer does not serve a call here."""


@dataclass(frozen=True)
class Peer:
    """A named implementation. `prepare` raises RefusedError for calls it does not serve."""

    name: str
    prepare: Callable[[Call], Attention]
    kinds: tuple[str, ...] = ("dense", "packed", "decode")
    wants: Callable[[Case], bool] = lambda case: True  # of the cases of these kinds
    forward: bool = True  # timed by itself
    backward: bool = True
    tolerance: float = 0.02  # relative error of O that still is the same function
    gradient_tolerance: float = 0.03  # of dQ, dK and dV, each
    slow: bool = False  # compiles for every shape, or materialises the scores: measured last


@dataclass(frozen=True)
class Absent:
    """A peer that this machine does not have."""

    name: str
    reason: str


def peers(device: str) -> Iterator[Peer | Absent]:
    """flash8 first."""
    import attention_peers_fp8  # which needs what is defined here

    on_gpu = device == "cuda"
    yield Peer("flash8", _flash8)
    ordered = functools.partial(_flash8, deterministic=True)
    name = "flash8" + _ORDERED
    yield _in_order(name, ordered) if on_gpu else Absent(name, "on a CPU there is one order")
    yield from attention_peers_fp8.peers(on_gpu)
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("torch_flash", SDPBackend.FLASH_ATTENTION),
        ("unfused", SDPBackend.MATH),
    ):
        if on_gpu or name != "cudnn":
            slow = backend is SDPBackend.MATH
            yield Peer(name, functools.partial(_sdpa, backend), ("dense", "decode"), slow=slow)
    if not on_gpu:
        for name in ("cudnn", "flex_attention", "varlen_attn", *_FLASH_ATTENTIONS, "flashinfer"):
            yield Absent(name, "needs a CUDA device")
        return
    yield Peer("flex_attention", _flex, ("dense", "packed"), slow=True)
    yield if_importable(
        "varlen_attn", "torch.nn.attention.varlen", lambda m: Peer("", _varlen(m), ("packed",))
    )
    for name, module in _FLASH_ATTENTIONS.items():
        yield if_importable(name, module, lambda m: Peer("", _flash_attention(m)))
    for name in ("flash_attn_3", "flash_attn_2"):
        yield if_importable(name + _ORDERED, _FLASH_ATTENTIONS[name], _flash_attention_in_order)
    yield if_importable("flashinfer", "flashinfer", lambda m: Peer("", _flashinfer(m)), grad=False)


_FLASH_ATTENTIONS = {
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
    "flash_attn_2": "flash_attn",
}
_ORDERED = ", deterministic"


def _in_order(name: str, prepare: Callable[[Call], Attention]) -> Peer:
    """With gradients added up in one order, which the forward knows nothing of."""
    return Peer(name, prepare, ("dense", "packed"), wants=shows_order, forward=False)


def _flash_attention_in_order(module: Any) -> Peer:
    return _in_order("", _flash_attention(module, deterministic=True))


def if_importable(
    name: str, module: str, make: Callable[[Any], Peer], *, grad: bool = True
) -> Peer | Absent:
    try:
        made = make(importlib.import_module(module))
    except Exception as error:  # a broken installation must not stop the others
        return Absent(name, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return replace(made, name=name, backward=grad)


# -------------------------------------------------------------------------------------- flash8


def _flash8(call: Call, **options: Any) -> Attention:
    import flash8

    refuse_without_kernel(call, call.q, call.k, call.v)
    if call.case.kind == "decode":
        return functools.partial(flash8.flash_attn_with_kvcache, causal=True)
    refuse_without_backward(call)
    if call.case.kind == "dense":
        return functools.partial(flash8.flash_attn_func, causal=call.causal, **options)
    return functools.partial(flash8.flash_attn_varlen_func, **varlen_arguments(call), **options)


def refuse_without_kernel(call: Call, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Tiled PyTorch serves what has no kernel; on a GPU its time would say nothing."""
    if not q.is_cuda:
        return
    from flash8 import backends
    from flash8.backends.hopper import forward as hopper

    if not backends.kernels_wanted(q):
        raise RefusedError("FLASH8_KERNELS lets no kernel serve this device")
    reason = hopper.refusal(q, k, v, None, _options(call))
    if reason is not None:
        raise RefusedError(reason)


def refuse_without_backward(call: Call) -> None:
    """The same for gradients."""
    if not call.q.is_cuda:
        return
    from flash8.backends.hopper import backward as hopper

    reason = hopper.refusal(call.q, call.k, call.v, None, _options(call))
    if reason is not None:
        raise RefusedError(reason)


def _options(call: Call) -> Any:
    from flash8.call.options import Options

    ends = {"cu_seqlens_q": call.cu_seqlens, "cu_seqlens_k": call.cu_seqlens}
    return Options(causal=call.causal, **ends)


def varlen_arguments(call: Call) -> dict[str, Any]:
    return {
        "cu_seqlens_q": call.cu_seqlens,
        "cu_seqlens_k": call.cu_seqlens,
        "max_seqlen_q": call.max_seqlen,
        "max_seqlen_k": call.max_seqlen,
        "causal": call.causal,
    }


# --------------------------------------------------------------------------------------- torch


def _heads_first(attention: Attention) -> Attention:
    """From (batch, heads, seqlen, head_dim) to the layout of a call, without copies."""
    return lambda *tensors: attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


def _sdpa(backend: SDPBackend, call: Call) -> Attention:
    causal = call.causal and call.case.kind != "decode"  # a single query sees every key
    grouped = call.case.heads != call.case.heads_kv

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return _heads_first(attend)


def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # beyond a few shapes it would stop compiling and run unfused
    return torch.compile(flex_attention, dynamic=False)


def _flex(call: Call) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    if call.q.is_cuda and call.case.head_dim != 128:
        raise RefusedError("is compiled anew for every shape, so only head_dim 128 is measured")
    flex = functools.partial(_compiled_flex(), enable_gqa=call.case.heads != call.case.heads_kv)
    rows, device = call.q.shape[-3], str(call.q.device)
    if call.case.kind == "packed":
        document = call.document

        def seen(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return (m >= n) & (document[m] == document[n])

        mask = create_block_mask(seen, None, None, rows, rows, device=device)
        attend = _heads_first(functools.partial(flex, block_mask=mask))
        return lambda *tensors: attend(*(x[None] for x in tensors))[0]
    mask = None
    if call.causal:
        mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, rows, rows, device=device)
    return _heads_first(functools.partial(flex, block_mask=mask))


def _varlen(module: Any) -> Callable[[Call], Attention]:
    def prepare(call: Call) -> Attention:
        return lambda q, k, v: module.varlen_attn(
            q,
            k,
            v,
            call.cu_seqlens,
            call.cu_seqlens,
            call.max_seqlen,
            call.max_seqlen,
            window_size=(-1, 0) if call.causal else (-1, -1),
            enable_gqa=call.case.heads != call.case.heads_kv,
        )

    return prepare


# -------------------------------------------------------------------------------------- others


def _flash_attention(module: Any, **options: Any) -> Callable[[Call], Attention]:
    """FlashAttention-2, -3 and -4, which return O or (O, LSE)."""
    dense, packed = module.flash_attn_func, module.flash_attn_varlen_func

    def prepare(call: Call) -> Attention:
        if call.case.kind == "dense":
            function = functools.partial(dense, causal=call.causal, **options)
        elif call.case.kind == "packed":
            function = functools.partial(packed, **varlen_arguments(call), **options)
        elif hasattr(module, "flash_attn_with_kvcache"):
            function = functools.partial(module.flash_attn_with_kvcache, causal=True)
        else:
            raise RefusedError("has no function for a KV cache")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(q, k, v)
            return out[0] if isinstance(out, tuple) else out

        return attend

    return prepare


_WORKSPACE_BYTES = 256 << 20
_PAGE_SIZE = 64


def _flashinfer(module: Any) -> Callable[[Call], Attention]:
    """Ragged prefill for dense and packed, paged decoding over the cache cut into pages."""

    def prepare(call: Call) -> Attention:
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=call.q.device)
        plan = _plan_decode if call.case.kind == "decode" else _plan_prefill
        return plan(module, workspace, call)

    return prepare


def _plan_prefill(module: Any, workspace: Tensor, call: Call) -> Attention:
    case, ends = call.case, call.cu_seqlens
    if ends is None:
        ends = torch.arange(case.batch + 1, dtype=torch.int32, device=call.q.device) * case.seqlen_q
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        ends,
        ends,
        case.heads,
        case.heads_kv,
        case.head_dim,
        causal=call.causal,
        q_data_type=call.q.dtype,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        return wrapper.run(*rows).view(q.shape)

    return attend


def _plan_decode(module: Any, workspace: Tensor, call: Call) -> Attention:
    case, device = call.case, call.q.device
    if case.seqlen_k % _PAGE_SIZE != 0:
        raise RefusedError(f"seqlen_k is {case.seqlen_k}; pages have {_PAGE_SIZE} tokens")
    pages = case.seqlen_k // _PAGE_SIZE
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * pages
    indices = torch.arange(case.batch * pages, dtype=torch.int32, device=device)
    last = torch.full((case.batch,), _PAGE_SIZE, dtype=torch.int32, device=device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        starts,
        indices,
        last,
        case.heads,
        case.heads_kv,
        case.head_dim,
        _PAGE_SIZE,
        q_data_type=call.q.dtype,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = tuple(x.reshape(-1, _PAGE_SIZE, *x.shape[-2:]) for x in (k, v))
        return wrapper.run(q[:, 0], cache)[:, None]

    return attend

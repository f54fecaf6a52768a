"""`F.scaled_dot_product_attention` on flash8 inside a context, on any device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flash8.attention import flash_attn_func, flash_attn_varlen_func
from flash8.call.checks import MAX_HEAD_DIM
from flash8.integrations.autocast import cast_for_autocast
from flash8.varlen import cu_seqlens_from_mask, max_seqlen_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class Report:
    """What a `sdpa` context has seen: calls that flash8 served, and why others went to torch."""

    served: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


@contextmanager
def sdpa(*, strict: bool = False) -> Iterator[Report]:
    """Within the context, this thread's `F.scaled_dot_product_attention` runs on flash8.

    A call goes to flash8 if that computes what torch documents: the same shapes (broadcast batch
    dimensions excepted), enable_gqa, scale, dropout (with the same probability, from other random
    numbers), is_causal (torch aligns it top-left, so with more queries than keys it is torch's),
    and attn_mask if it is None or a bool mask that hides keys from all queries alike. All other
    calls go to torch.

    Args:
        strict: raise instead of handing a call to torch.

    Yields:
        A `Report` that counts calls, with the reason of each fallback.

    Raises:
        ValueError: with strict, for a call that flash8 does not serve; the message says why.

    `nn.MultiheadAttention` is one overridable function to torch, and what it calls inside is out
    of reach of any function mode: it is counted as a fallback.
    """
    report = Report()
    with _SdpaMode(report, strict):
        yield report


@dataclass(frozen=True)
class _Call:
    """The arguments of F.scaled_dot_product_attention, under its names and with its defaults."""

    query: Tensor  # (batch, heads, seqlen_q, head_dim), or without heads
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class _SdpaMode(TorchFunctionMode):
    def __init__(self, report: Report, strict: bool) -> None:
        super().__init__()
        self._report = report
        self._strict = strict

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._fall_back("the call is inside nn.MultiheadAttention")
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _Call(*args, **kwargs)
        reason = _reason_against(call)
        if reason is not None:
            self._fall_back(reason)
            return func(*args, **kwargs)
        self._report.served += 1
        return _attend(call)

    def _fall_back(self, reason: str) -> None:
        if self._strict:
            raise ValueError(f"flash8 does not serve this scaled_dot_product_attention: {reason}")
        self._report.fallbacks[reason] += 1


def _reason_against(call: _Call) -> str | None:
    """Why flash8 does not serve the call, or None."""
    return _reason_in_tensors(call) or _reason_in_shapes(call) or _reason_in_options(call)


def _reason_in_tensors(call: _Call) -> str | None:
    tensors = (call.query, call.key, call.value)
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return "query, key and value are not plain tensors"
    if any(x.layout is not torch.strided for x in tensors):
        return "query, key and value are not strided tensors"
    if call.query.device.type not in ("cpu", "cuda") or len({x.device for x in tensors}) > 1:
        return "query, key and value are not on one cpu or cuda device"
    dtypes = {x.dtype for x in cast_for_autocast(*tensors)}
    if len(dtypes) > 1 or not dtypes.issubset(_DTYPES):
        return f"dtypes {sorted(map(str, dtypes))}"
    return None


def _reason_in_shapes(call: _Call) -> str | None:
    q, k, v = call.query.shape, call.key.shape, call.value.shape
    if len({len(q), len(k), len(v)}) > 1 or len(q) not in (3, 4):
        return "query, key and value do not have 3 or 4 dimensions each"
    if q[0] != k[0] or q[-1] != k[-1] or k[:-1] != v[:-1]:
        return "batch dimensions are broadcast, or sizes do not fit"
    if call.query.numel() == 0 or call.key.numel() == 0 or call.value.numel() == 0:
        return "a tensor is empty"
    if max(q[-1], v[-1]) > MAX_HEAD_DIM:
        return f"head_dim is greater than {MAX_HEAD_DIM}"
    same_heads = len(q) == 3 or q[1] == k[1]
    if not same_heads and not (call.enable_gqa and q[1] % k[1] == 0):
        return "heads of query and key differ without enable_gqa"
    return None


def _reason_in_options(call: _Call) -> str | None:
    seqlen_q, seqlen_k = call.query.shape[-2], call.key.shape[-2]
    if call.attn_mask is not None:
        if call.is_causal:
            return "attn_mask and is_causal are both given"
        if _hidden_keys(call) is None:
            return "attn_mask is no bool mask that hides keys from all queries alike"
    if call.is_causal and seqlen_q > seqlen_k:
        return "is_causal (top-left) with more queries than keys"
    if call.scale is not None and not 0.0 < call.scale < float("inf"):
        return f"scale {call.scale}"
    if not 0.0 <= call.dropout_p < 1.0:
        return f"dropout_p {call.dropout_p}"
    return None


def _hidden_keys(call: _Call) -> Tensor | None:
    """attn_mask as (batch, seqlen_k), True for keys that count; None if queries differ in it."""
    mask = call.attn_mask
    if type(mask) is not Tensor or mask.dtype is not torch.bool or mask.dim() < 2:
        return None
    try:
        mask = mask.expand(*call.query.shape[:-1], call.key.shape[-2])
    except RuntimeError:
        return None
    for dimension in range(1, mask.dim() - 1):
        if mask.shape[dimension] > 1 and mask.stride(dimension) != 0:
            return None
        mask = mask.narrow(dimension, 0, 1)
    return mask.reshape(mask.shape[0], -1)


def _attend(call: _Call) -> Tensor:
    q, k, v = cast_for_autocast(call.query, call.key, call.value)
    has_heads = q.dim() == 4
    q, k, v = (x.transpose(1, 2) if has_heads else x.unsqueeze(2) for x in (q, k, v))
    mask = _hidden_keys(call)
    options: dict[str, Any] = dict(softmax_scale=call.scale, dropout_p=call.dropout_p)
    out: Any
    if mask is not None and not mask.all():
        out = _attend_packed_keys(q, k, v, mask, options)
    else:
        if call.is_causal:
            # Top-left: keys past the last query are seen by none, and then both alignments agree.
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        out = flash_attn_func(q, k, v, causal=call.is_causal, **options)
    return cast(Tensor, out.transpose(1, 2) if has_heads else out.squeeze(2))


def _attend_packed_keys(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]
) -> Any:
    cu_seqlens = cu_seqlens_from_mask(mask)
    indices = mask.flatten().nonzero().flatten()
    k, v = (x.flatten(0, 1).index_select(0, indices) for x in (k, v))
    return flash_attn_varlen_func(
        q, k, v, None, cu_seqlens, q.shape[1], max_seqlen_of(cu_seqlens), **options
    )

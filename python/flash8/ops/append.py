"""The torch op of the appending kernel: new rows into caches, and the queries rotated.

It is traced as it is; which kernel is trusted is asked when it runs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash8 import backends
from flash8.backends import index_checks
from flash8.backends.cpu import append as portable
from flash8.backends.hopper import append as hopper
from flash8.backends.hopper.verify import trust
from flash8.call import derivatives
from flash8.call.request import Appended, Queries
from flash8.tensors.rms_norm import norm_of
from flash8.tensors.rotary import Rope

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? q, Tensor k, Tensor v, Tensor starts, "
    "Tensor? cu_seqlens, Tensor? page_table, Tensor? kv_batch_idx, Tensor? k_descale, "
    "Tensor? v_descale, Tensor? k_mean, Tensor? v_mean, Tensor? cos, Tensor? sin, Tensor? offsets, "
    "bool interleaved, Tensor? cu_seqlens_q, bool q_advances, Tensor? q_norm_weight, "
    "Tensor? k_norm_weight, float norm_eps) -> (Tensor, Tensor)"
)


def append(k: Appended, v: Appended, queries: Queries | None) -> tuple[Tensor | None, Tensor]:
    """Writes new rows into the two caches of a call. Returns the rotated queries, and the lengths
    of the sequences from now on. Only keys and queries have a position and a norm."""
    rope = (None, None, None, True) if k.rope is None else k.rope
    norms = (None if queries is None else queries.norm, k.norm)
    rotated, lengths = torch.ops.flash8.append(
        k.cache,
        v.cache,
        None if queries is None else queries.x,
        k.x,
        v.x,
        k.starts,
        k.cu_seqlens,
        k.page_table,
        k.kv_batch_idx,
        k.descale,
        v.descale,
        k.mean,
        v.mean,
        *rope,
        None if queries is None else queries.cu_seqlens,
        queries is None or queries.advances,
        *(None if norm is None else norm.weight for norm in norms),
        next((norm.eps for norm in norms if norm is not None), 0.0),
    )
    return None if queries is None else rotated, lengths


def launch(k: Appended, v: Appended, queries: Queries | None) -> hopper.Launched | None:
    """The same without the op, where nobody has to see it. None where no kernel serves the call,
    and nothing was done."""
    if not _serves(k, v, queries=queries):
        return None
    launched = hopper.launch(k, v, queries=queries)
    increment_version((k.cache, v.cache))
    return launched


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    k_mean: Tensor | None,
    v_mean: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    offsets: Tensor | None,
    interleaved: bool,
    cu_seqlens_q: Tensor | None,
    q_advances: bool,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    rope = None if cos is None or sin is None else Rope(cos, sin, offsets, interleaved)
    where = (starts, cu_seqlens, page_table, kv_batch_idx)
    both = (
        Appended(k_cache, k, *where, k_descale, k_mean, rope, norm_of(k_norm_weight, norm_eps)),
        Appended(v_cache, v, *where, v_descale, v_mean),
    )
    queries = None
    if q is not None:
        norm = norm_of(q_norm_weight, norm_eps)
        queries = Queries(q, rope, cu_seqlens_q, q_advances, norm)
    # What refuses one of them has to be met before either is written.
    for appended in both:
        index_checks.check_append(appended.cache, appended.x, *where, appended.descale)
    backend = hopper if _serves(*both, queries=queries) else portable
    rotated, lengths = backend.append(*both, queries=queries)
    return starts.new_empty((0,)) if rotated is None else rotated, lengths


def _serves(k: Appended, v: Appended, *, queries: Queries | None) -> bool:
    """Whether kernels serve the call, as far as they have to see memory for it."""
    reason = hopper.refusal_of_address(k.cache) or hopper.refusal_of_address(v.cache)
    if reason is not None:
        backends.tell_about_refusal(reason)
        return False
    wanted = hopper.variants(k, v, queries=queries)
    trusted = [trust.is_trusted(variant, k.x.device) for variant in wanted]
    return all(trusted)


def _append_fake(
    k_cache: Tensor, v_cache: Tensor, q: Tensor | None, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    starts = rest[0]
    rotated = starts.new_empty((0,)) if q is None else q.new_empty(q.shape)
    return rotated, starts.new_empty(starts.shape)


for _key in ("CPU", "CUDA"):
    _library.impl("append", _append, _key)
torch.library.register_fake("flash8::append", _append_fake, lib=_library)
derivatives.refuse(
    _library,
    "append",
    "flash8 writes keys into a cache in place here, which has no derivative; append under "
    "torch.no_grad(), and detach what is differentiated",
)

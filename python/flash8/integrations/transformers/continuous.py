"""transformers' continuous batching (`model.generate_batch`) on flash8.

There the requests of a step are packed into one row, over pages that `PagedAttentionCache` gives
out. A step of one new token each comes with a block table: one call appends and attends. In any
other step, layers with full attention write their tokens and read the pages where they lie; those
with a sliding window have a ring of slots that no page table describes, so transformers copies the
few keys of each window.

transformers decides by the name of an implementation what continuous batching gives it: "flash"
makes it leave out mask tensors, a 2 or 3 after that adds the block table. So flash8 has a name of
its own there, which the manager sets, and takes back when it stops.
"""

import functools
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flash8.attention import flash_attn_func, flash_attn_varlen_func
from flash8.integrations.transformers.attention import refuse_unsupported, sinks_of, window_of
from flash8.kvcache import flash_attn_with_kvcache

#: What continuous batching calls flash8. It is set by the manager, not by users.
PAGED_NAME = "f8_paged_flash_attention_3"

_WRAPPED = "_flash8_wraps"

Shared = tuple[Tensor, ...]


def enter(name: str) -> None:
    """Has continuous batching take models whose implementation is `name`.

    Two functions of transformers are wrapped: the manager's choice of an implementation, and the
    import of a package by the name of one.
    """
    import transformers
    from transformers import modeling_flash_attention_utils
    from transformers.generation import ContinuousBatchingManager

    transformers.AttentionInterface.register(PAGED_NAME, attend_pages)
    _wrap(ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switching(name))
    _wrap(modeling_flash_attention_utils, "_lazy_imports", _importing)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, _WRAPPED):
        wrapped = functools.wraps(original)(wrapper(original))
        setattr(wrapped, _WRAPPED, True)
        setattr(owner, name, wrapped)


def _switching(name: str) -> Callable[[Any], Any]:
    def wrapper(original: Any) -> Any:
        def switch(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            if model.config._attn_implementation != name:
                original(self, model, *args, **kwargs)
                return
            # Not by set_attn_implementation, which replaces a name with "flash" in it for models
            # that list the packages they work with.
            model.config._attn_implementation = PAGED_NAME
            self._original_attn_impl = name

        return switch

    return wrapper


def _importing(original: Any) -> Any:
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != PAGED_NAME:
            return original(implementation, *args, **kwargs)
        # Only asked whether there is a function with a block table: `attend_pages` makes the calls.
        return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, None, None

    return lazy_imports


# Compiling would copy the cache, which is written through views of one tensor.
@torch.compiler.disable
def attend_pages(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in a step of continuous batching. Args as in `attention.attend`, and:
        query, key, value: (1, heads, tokens, head_dim), the new tokens of all requests.
        cache: transformers' PagedAttentionCache, which takes up the new keys and values.
        kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, and block_table or else
            read_index and write_index, as `PagedAttentionArgs` of transformers describes them.

    Raises:
        ValueError: a call outside continuous batching; what `attention.attend` refuses.
    """
    if cache is None:
        raise ValueError(
            f"attn_implementation={PAGED_NAME!r} is for continuous batching (generate_batch), and "
            "is set there; use what flash8.integrations.transformers.register() returns"
        )
    refuse_unsupported(attention_mask, kwargs)
    new = [x[0].transpose(0, 1) for x in (query, key, value)]
    options: dict[str, Any] = dict(
        softmax_scale=scaling,
        causal=True,
        window_size=window_of(sliding_window, causal=True),
        softcap=softcap or 0.0,
        s_aux=sinks_of(s_aux, query),
    )
    layer = cast(int, module.layer_idx)
    attend = _one_token_each if kwargs.get("block_table") is not None else _some_tokens_each
    return attend(cache, layer, new, kwargs, options)[None], None


def _one_token_each(
    cache: Any, layer: int, new: list[Tensor], kwargs: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    allocator = cache.layer_to_allocator[layer]
    q, k, v = (x[:, None] for x in new)
    step, block_table = kwargs["cu_seq_lens_k"], kwargs["block_table"][allocator.index]

    def rows() -> Shared:
        """Lengths before this step; rows of the table, -1 for those that pad the batch of a CUDA
        graph; and the table."""
        after = step[allocator.layer_type].to(torch.int32).diff()[: len(q)]
        row = torch.arange(len(q), dtype=torch.int32, device=q.device)
        table = block_table // _pages_of_a_block(allocator)
        return (after - 1).clamp(min=0), torch.where(after > 0, row, -1), table

    cache_seqlens, row, table = _once_a_step(cache, step, allocator, q, rows)
    k_cache, v_cache = _pages(allocator, layer)
    out = flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=cache_seqlens,
        cache_batch_idx=row,
        page_table=table,
        **options,
    )
    return cast(Tensor, out)[:, 0]


def _some_tokens_each(
    cache: Any, layer: int, new: list[Tensor], kwargs: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    allocator = cache.layer_to_allocator[layer]
    read_index = kwargs["read_index"][allocator.index]
    options |= dict(cu_seqlens_q=kwargs["cu_seq_lens_q"], max_seqlen_q=kwargs["max_length_q"])
    if allocator.supports_block_table and read_index.numel() > 0:
        return _over_pages(cache, layer, new, kwargs, options)
    k, v = cache.update(*(x.transpose(0, 1)[None] for x in new[1:]), layer, kwargs)
    out = flash_attn_varlen_func(
        *(new[0], k[0].transpose(0, 1), v[0].transpose(0, 1)),
        cu_seqlens_k=kwargs["cu_seq_lens_k"],
        max_seqlen_k=kwargs["max_length_k"],
        **options,
    )
    return cast(Tensor, out)


def _over_pages(
    cache: Any, layer: int, new: list[Tensor], kwargs: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    allocator = cache.layer_to_allocator[layer]
    kind, index = allocator.layer_type, allocator.index
    for slots, x in zip(allocator.get_cache_for_block_table(layer), new[1:], strict=True):
        slots.flatten(0, 1).index_copy_(0, kwargs["write_index"][index], x)
    step, max_seqlen_k = kwargs["cu_seq_lens_k"], kwargs["max_length_k"][kind]

    def used_pages() -> Shared:
        """Used lengths, and the table: a page is that of its first key."""
        slots, ends = kwargs["read_index"][index], step[kind].to(torch.int64)
        last = (ends[1:, None] - 1).clamp(0, slots.numel() - 1)
        page_starts = torch.arange(0, max_seqlen_k, allocator.tokens_per_page, device=ends.device)
        firsts = torch.minimum(ends[:-1, None] + page_starts, last)
        table = slots[firsts] // allocator.block_physical_stride
        return ends.diff().to(torch.int32), table.to(torch.int32)

    used, table = _once_a_step(cache, step, allocator, new[0], used_pages)
    k_cache, v_cache = _pages(allocator, layer)
    out = flash_attn_varlen_func(
        *(new[0], k_cache, v_cache),
        cu_seqlens_k=None,
        max_seqlen_k=max_seqlen_k,
        seqused_k=used,
        page_table=table,
        num_splits=0,
        **options,
    )
    return cast(Tensor, out)


def _pages(allocator: Any, layer: int) -> list[Tensor]:
    """The layer's pages of keys and of values, one of each for a block. transformers' own views
    have the pages of all layers, keys among values."""
    step = _pages_of_a_block(allocator)
    return [pages[::step] for pages in allocator.get_cache_for_block_table(layer)]


def _pages_of_a_block(allocator: Any) -> int:
    return cast(int, allocator.block_physical_stride // allocator.tokens_per_page)


#: By cache: the step, whether it is being captured, and what its layers share.
_shared: WeakKeyDictionary[Any, tuple[Any, bool, dict[int, Shared]]] = WeakKeyDictionary()


def _once_a_step(
    cache: Any, step: Any, allocator: Any, q: Tensor, make: Callable[[], Shared]
) -> Shared:
    """What the layers of an allocator share. `step` is an object that each step has anew. What was
    made outside a CUDA graph does not serve inside, where replays must make it of other indices."""
    captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
    known = _shared.get(cache)
    if known is None or known[0] is not step or known[1] != captured:
        known = _shared[cache] = (step, captured, {})
    if allocator.index not in known[2]:
        known[2][allocator.index] = make()
    return known[2][allocator.index]

"""A small server loop: continuous batching of a transformers model over flash8's paged KV cache.

    python examples/serving/server.py [--cache e4m3]

Prompts that fit are prefilled together, packed into one row. Then every running sequence gets one
token a step. A step of decoding has always the same shapes and addresses: a slot for each sequence
there may be, a page table of full width, -1 in the slots that idle. So on a GPU it is one CUDA
graph, replayed. Attention is one call for both, which appends to the pages and attends over them.
"""

import argparse
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flash8 import flash_attn_with_kvcache
from flash8.nn import CacheStep, PagedKVCache
from flash8.varlen import cu_seqlens_from_lengths, position_ids_from_cu_seqlens

PAGE_SIZE = 16


def attend(
    module: Any,
    query: Tensor,  # (batch, heads, seqlen, head_dim)
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    step: CacheStep,
    cu_seqlens: Tensor | None = None,  # int32 (sequences + 1,), of packed prompts
    max_seqlen: int | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it; step, cu_seqlens and max_seqlen come from
    the call of the model."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if cu_seqlens is not None:
        q, k, v = q[0], k[0], v[0]
    cache = step.layer(module.layer_idx)
    out = flash_attn_with_kvcache(
        *(q, cache.k, cache.v, k, v),
        cache_seqlens=cache.cache_seqlens,
        cache_batch_idx=cache.cache_batch_idx,
        page_table=cache.page_table,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k_new=cu_seqlens,
        max_seqlen_q=max_seqlen,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
        s_aux=s_aux,
        k_descale=cache.k_descale,
        v_descale=cache.v_descale,
    )
    return (out if cu_seqlens is None else out[None]), None


# No mask is registered beside it, so transformers makes none. (A name with "flash" in it would be
# taken for a package.)
AttentionInterface.register("f8_server", attend)


@dataclass
class Request:
    prompt: list[int]
    max_new_tokens: int
    written: list[int] = field(default_factory=list)
    row: int = -1  # of the cache, while it runs

    @property
    def longest(self) -> int:
        """Tokens that the cache holds in the end; the last one written is never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def pages(self) -> int:
        return -(-self.longest // PAGE_SIZE)


class Server:
    """Serves requests with up to `slots` of them running, greedily.

    Args:
        model: a causal language model of transformers; its attention is replaced.
        num_pages: pages of PAGE_SIZE tokens in the pool.
        max_seqlen: the longest that a sequence may become.
        prefill_tokens: prompts are packed up to so many tokens, or else come alone.
        cache_options: more arguments of `flash8.nn.PagedKVCache`; see `e4m3_cache`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        num_pages: int,
        max_seqlen: int,
        prefill_tokens: int = 2048,
        eos_token_id: int | None = None,
        **cache_options: Any,
    ) -> None:
        model.set_attn_implementation("f8_server")
        self.model, self.eos = model.eval(), eos_token_id
        self.prefill_tokens = prefill_tokens
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.cache = PagedKVCache(
            *(model.config.num_hidden_layers, num_pages, PAGE_SIZE, slots, max_seqlen),
            *(model.config.num_key_value_heads, model.config.head_dim),
            **dict(dtype=model.dtype, device=model.device) | cache_options,
        )
        # What a step of decoding reads: a slot for each sequence that there may be, with the row of
        # the page table in it, -1 where it idles. A token's position is the length before it.
        self.tokens = torch.zeros(slots, 1, dtype=torch.int64, device=model.device)
        lengths, rows = self.tokens.new_zeros(2, slots, dtype=torch.int32)
        pages = lengths.new_zeros(slots, -(-max_seqlen // PAGE_SIZE))
        every = tuple(range(slots))
        self.step = CacheStep(self.cache, every, (1,) * slots, lengths, rows.fill_(-1), pages)
        self.decode = _graphed(self._decode) if model.device.type == "cuda" else self._decode

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> None:
        """Fills `written` of each."""
        most = min(self.cache.max_seqlen, self.cache.allocator.num_pages * PAGE_SIZE)
        if any(request.longest > most for request in requests):
            raise ValueError(f"there is no room for more than {most} tokens of a request")
        self.waiting.extend(requests)
        while self.waiting or self.running:
            if admitted := self._admit():
                self._keep(admitted, self._prefill(admitted))
            if self.running:
                self._fill_slots()
                self._keep(self.running, self.decode()[: len(self.running)])

    def _admit(self) -> list[Request]:
        """Those whose prompts are next: as long as slots last, and pages for the longest that all
        who run may become, so that none has to be stopped."""
        admitted: list[Request] = []
        free, tokens = self.cache.allocator.num_pages - sum(r.pages for r in self.running), 0
        while self.waiting and len(self.running) + len(admitted) < self.cache.max_batch:
            request = self.waiting[0]
            free, tokens = free - request.pages, tokens + len(request.prompt)
            if free < 0 or (admitted and tokens > self.prefill_tokens):
                break
            request.row = self.cache.add_sequence()
            admitted.append(self.waiting.popleft())
        self.running += admitted
        return admitted

    def _prefill(self, requests: list[Request]) -> Tensor:
        """The next token of each, from one pass over all prompts."""
        lengths = [len(request.prompt) for request in requests]
        cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths)).to(self.tokens.device)
        reserved = self.cache.prepare([request.row for request in requests], lengths)
        result = self.model(
            input_ids=self.tokens.new_tensor([[t for r in requests for t in r.prompt]]),
            position_ids=position_ids_from_cu_seqlens(cu_seqlens, sum(lengths))[None],
            step=reserved,
            cu_seqlens=cu_seqlens,
            max_seqlen=max(lengths),
            logits_to_keep=cu_seqlens[1:].long() - 1,
            use_cache=False,
        )
        reserved.commit()
        return result.logits[0].argmax(-1)

    def _fill_slots(self) -> None:
        """Puts the running sequences into the slots; their lengths grow."""
        count = len(self.running)
        reserved = self.cache.prepare([request.row for request in self.running], 1)
        self.tokens[:count, 0] = self.tokens.new_tensor([r.written[-1] for r in self.running])
        self.step.cache_seqlens[:count] = reserved.cache_seqlens
        self.step.page_table[:count] = reserved.page_table
        torch.arange(count, out=self.step.cache_batch_idx[:count])
        self.step.cache_batch_idx[count:] = -1
        reserved.commit()

    def _decode(self) -> Tensor:
        """The next token of every slot."""
        positions = self.step.cache_seqlens[:, None].long()
        result = self.model(self.tokens, position_ids=positions, step=self.step, use_cache=False)
        return result.logits[:, -1].argmax(-1)

    def _keep(self, requests: list[Request], tokens: Tensor) -> None:
        for request, token in zip(list(requests), tokens.tolist(), strict=True):
            request.written.append(token)
            if token == self.eos or len(request.written) >= request.max_new_tokens:
                self.cache.remove_sequence(request.row)
                self.running.remove(request)


@torch.inference_mode()
def _graphed(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The function as a CUDA graph. Captured while all slots idle, so it leaves no trace."""
    function()  # compiles and checks kernels, which cannot be done in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def e4m3_cache(model: PreTrainedModel, sample: list[int]) -> dict[str, Any]:
    """A cache of e4m3, with room for twice the K and V of a sample."""
    pages = -(-len(sample) // PAGE_SIZE)
    server = Server(model, slots=1, num_pages=pages, max_seqlen=len(sample))
    server.run([Request(sample, 1)])
    k, v = (2 / 448 * x.abs().amax((1, 2, 4)).float() for x in (server.cache.k, server.cache.v))
    return dict(dtype=torch.float8_e4m3fn, k_descale=k, v_descale=v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", choices=["model", "e4m3"], default="model")
    e4m3 = parser.parse_args().cache == "e4m3"
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2),
        **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    )
    where = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_config(config).to(*where)
    requests = [Request(torch.randint(2, 256, (n,)).tolist(), 16) for n in (40, 7, 19, 33, 4, 64)]
    options = e4m3_cache(model, requests[0].prompt) if e4m3 else {}
    server = Server(model, slots=4, num_pages=24, max_seqlen=128, **options)
    server.run(requests)
    for request in requests:
        print(f"{len(request.prompt):3} tokens ->", *request.written)


if __name__ == "__main__":
    main()

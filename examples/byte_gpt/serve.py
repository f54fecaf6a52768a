"""Text from the model: continuous batching over a paged KV cache."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor
from tqdm import tqdm

import data
from config import Config, device, mixed_precision
from flash8 import varlen
from flash8.nn import PagedKVCache
from model import ByteGPT


@dataclass
class Request:
    """A prompt (length,) and what has been written behind it."""

    prompt: Tensor
    row: int = -1
    written: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def text(self) -> str:
        return data.decode(self.written)

    @property
    def finished(self) -> bool:
        return bool(self.written) and self.written[-1] == data.END

    def tokens(self) -> Tensor:
        return torch.cat((self.prompt, torch.tensor(self.written, dtype=torch.int64)))


@dataclass
class Served:
    """Counts and seconds of one run."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    most_pages: int = 0
    most_rows: int = 0


class Server:
    """Admits prompts while rows and pages last; the others wait until a text is finished.

    A sequence is admitted only if the pool can hold its longest possible text beside those of
    all running ones, so growth never fails; the pages themselves are taken as it grows.
    """

    def __init__(
        self, model: ByteGPT, config: Config, cache: PagedKVCache, label: str = "serve"
    ) -> None:
        self._model = model.eval()
        self._config = config
        self._label = label
        self.cache = cache
        self._random = torch.Generator().manual_seed(config.seed)
        self._running: list[Request] = []
        self.served = Served()

    @torch.no_grad()
    def run(self, prompts: list[Tensor]) -> list[Request]:
        """Write up to ``new_tokens`` behind each prompt."""
        requests = [Request(prompt) for prompt in prompts]
        for request in requests:
            self._refuse_if_hopeless(request)
        waiting = deque(requests)
        total = len(prompts) * self._config.new_tokens
        with tqdm(total=total, desc=self._label, unit="B") as progress:
            while waiting or self._running:
                admitted = self._admit(waiting)
                self._prefill(admitted) if admitted else self._decode()
                progress.update(len(admitted) or len(self._running))
                progress.set_postfix(rows=len(self._running), pages=self.cache.allocator.num_used)
                self._retire()
        return requests

    def _admit(self, waiting: deque[Request]) -> list[Request]:
        admitted = []
        while waiting and self.cache.num_sequences < self._config.serve_rows:
            promised = sum(self._pages_at_most(request) for request in self._running)
            if promised + self._pages_at_most(waiting[0]) > self._config.pool_pages:
                break
            request = waiting.popleft()
            request.row = self.cache.add_sequence()
            self._running.append(request)
            admitted.append(request)
        return admitted

    def _prefill(self, requests: list[Request]) -> None:
        """All admitted prompts in one packed call."""
        began = perf_counter()
        lengths = [request.prompt.shape[0] for request in requests]
        step = self.cache.prepare([request.row for request in requests], lengths)
        tokens, cu_seqlens, max_seqlen = varlen.pack([request.prompt for request in requests])
        with mixed_precision(device()):
            logits = self._model(tokens.to(device()), cu_seqlens.to(device()), max_seqlen, step)
        step.commit()
        self._write(requests, logits[cu_seqlens[1:].long() - 1])
        self.served.prefill_tokens += sum(lengths)
        self.served.prefill_seconds += perf_counter() - began

    def _decode(self) -> None:
        """One more token for every running sequence."""
        began = perf_counter()
        requests = self._running
        step = self.cache.prepare([request.row for request in requests], 1)
        tokens = torch.tensor([request.written[-1:] for request in requests]).to(device())
        with mixed_precision(device()):
            logits = self._model(tokens, step=step)
        step.commit()
        self._write(requests, logits[:, 0])
        self.served.decode_steps += 1
        self.served.decode_tokens += len(requests)
        self.served.decode_seconds += perf_counter() - began
        self.served.most_rows = max(self.served.most_rows, len(requests))

    def _write(self, requests: list[Request], logits: Tensor) -> None:
        logits = logits.float().cpu()
        chances = (logits / self._config.temperature).softmax(-1)
        chosen = torch.multinomial(chances, 1, generator=self._random)[:, 0].tolist()
        for request, row, token in zip(requests, logits, chosen, strict=True):
            request.logits.append(row)
            request.written.append(token)
        self.served.most_pages = max(self.served.most_pages, self.cache.allocator.num_used)

    def _retire(self) -> None:
        def done(request: Request) -> bool:
            return request.finished or len(request.written) >= self._config.new_tokens

        for request in filter(done, self._running):
            self.cache.remove_sequence(request.row)
        self._running = [request for request in self._running if not done(request)]

    def _pages_at_most(self, request: Request) -> int:
        longest = request.prompt.shape[0] + self._config.new_tokens
        return -(-longest // self._config.page_size)

    def _refuse_if_hopeless(self, request: Request) -> None:
        length = request.prompt.shape[0] + self._config.new_tokens
        if length > self.cache.max_seqlen or self._pages_at_most(request) > self._config.pool_pages:
            raise ValueError(f"a prompt of {request.prompt.shape[0]} bytes does not fit the cache")


@torch.no_grad()
def largest_difference(model: ByteGPT, requests: list[Request]) -> float:
    """Between the logits of paged decoding and those of one forward pass over the whole texts."""
    tokens, cu_seqlens, max_seqlen = varlen.pack([request.tokens()[:-1] for request in requests])
    with mixed_precision(device()):
        logits = model(tokens.to(device()), cu_seqlens.to(device()), max_seqlen)
    texts = varlen.unpack(logits.float().cpu(), cu_seqlens)
    return max(
        (whole[-len(request.logits) :] - torch.stack(request.logits)).abs().max().item()
        for whole, request in zip(texts, requests, strict=True)
    )


@torch.no_grad()
def seconds_without_cache(model: ByteGPT, requests: list[Request], repeats: int = 3) -> float:
    """One decoding step if every text so far had to be read again, halfway through."""
    halves = [request.tokens()[: -(len(request.written) // 2) or None] for request in requests]
    tokens, cu_seqlens, max_seqlen = varlen.pack(halves)
    began = perf_counter()
    for _ in range(repeats):
        with mixed_precision(device()):
            model(tokens.to(device()), cu_seqlens.to(device()), max_seqlen).sum().item()
    return (perf_counter() - began) / repeats

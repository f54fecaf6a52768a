"""Summaries from the model: continuous batching over a paged KV cache."""

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
    """A document, of which the report is read, and what has been written behind it."""

    document: data.Document
    row: int = -1
    written: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def prompt(self) -> Tensor:
        return self.document.prompt

    @property
    def finished(self) -> bool:
        return bool(self.written) and self.written[-1] == data.END

    @property
    def right_words(self) -> int:
        """How many of the words to be found stand where they should."""
        answer = self.document.answer
        words = data.is_answer(torch.tensor(answer)).tolist()
        pairs = zip(answer, self.written, words, strict=False)
        return sum(is_word and a == b for a, b, is_word in pairs)

    @property
    def is_exact(self) -> bool:
        return self.written == self.document.answer

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
        self._running: list[Request] = []
        self.served = Served()

    @torch.no_grad()
    def run(self, documents: list[data.Document]) -> list[Request]:
        """Write up to ``new_tokens`` behind each prompt, always the likeliest."""
        requests = [Request(document) for document in documents]
        for request in requests:
            self._refuse_if_hopeless(request)
        waiting = deque(requests)
        total = sum(len(request.document.answer) for request in requests)
        with tqdm(total=total, desc=self._label, unit="token", disable=None) as progress:
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
        for request, row, token in zip(requests, logits, logits.argmax(-1).tolist(), strict=True):
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
            raise ValueError(f"a prompt of {request.prompt.shape[0]} tokens does not fit the cache")


@torch.no_grad()
def largest_difference(model: ByteGPT, requests: list[Request]) -> float:
    """Between the logits of paged decoding and those of one forward pass over the whole texts."""
    texts = [request.tokens()[:-1] for request in requests]
    _, cu_seqlens, _ = varlen.pack(texts)
    found = varlen.unpack(_whole(model, texts).float().cpu(), cu_seqlens)
    return max(
        (whole[-len(request.logits) :] - torch.stack(request.logits)).abs().max().item()
        for whole, request in zip(found, requests, strict=True)
    )


@torch.no_grad()
def read_again(
    model: ByteGPT, documents: list[data.Document], rows: int, repeats: int = 3
) -> tuple[float, list[Request]]:
    """Without a cache: seconds of a step in which so many texts are read as a whole, and what is
    written. The likeliest words behind the true ones are those that would be written as long as all
    are right, so one reading tells which summaries come out exact."""
    requests = [Request(document) for document in documents]
    texts = [document.tokens[:-1] for document in documents]
    seconds = float("inf")
    for _ in range(repeats):
        began = perf_counter()
        _whole(model, texts[:rows]).sum().item()
        seconds = min(seconds, perf_counter() - began)
    for begin in range(0, len(texts), rows):
        part = texts[begin : begin + rows]
        _, cu_seqlens, _ = varlen.pack(part)
        found = varlen.unpack(_whole(model, part).float().cpu(), cu_seqlens)
        for request, logits in zip(requests[begin:], found, strict=False):
            request.written = logits[request.document.prompt_length - 1 :].argmax(-1).tolist()
    return seconds, requests


def _whole(model: ByteGPT, texts: list[Tensor]) -> Tensor:
    tokens, cu_seqlens, max_seqlen = varlen.pack(texts)
    with mixed_precision(device()):
        return model(tokens.to(device()), cu_seqlens.to(device()), max_seqlen)

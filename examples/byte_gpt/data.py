"""Reports in a small language, whose right answers are known.

A report names one word of every topic, somewhere among other words, and ends with a summary that
lists topics and words in order. The summary follows from the report, so it can be checked word by
word; to write it, a model has to find twelve words wherever they stand. A token is one byte, which
stands for a word.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash8 import varlen

_TOPICS = """
animal: fox owl cat dog hen cow ram bee rat elk ant pig
colour: red blue green black white pink brown gray gold violet teal beige
food: bread rice soup cheese pasta honey salad pizza plum pear olive bean
weather: rain snow wind fog hail storm sun frost mist heat thunder drizzle
city: paris rome oslo cairo lima delhi tokyo berlin madrid quito dublin seoul
tool: hammer saw drill rake axe chisel spade wrench file brush knife needle
tree: oak pine elm birch maple cedar willow ash palm beech fir yew
drink: tea milk juice water cocoa cider lemonade coffee mead broth soda punch
metal: iron copper tin zinc lead nickel silver steel bronze brass cobalt chrome
sport: chess golf tennis rowing judo polo rugby hockey boxing fencing skiing archery
month: january february march april may june july august september october november december
music: flute harp drum piano violin horn lute cello organ guitar bell banjo
"""
_OTHERS = """
the a then we they went near under over by and on that day some later people walked home with little
old small quiet long road house garden river hill door table window early late again never always
somewhere together slowly often maybe still only after before while nobody knew where it was
"""
TOPICS = {line.split(":")[0]: line.split(":")[1].split() for line in _TOPICS.strip().splitlines()}
OTHERS = _OTHERS.split()
END, SUMMARY = 0, 1  # what a text starts after and ends with; what the summary starts after
WORDS = ["\n", "| summary:", *TOPICS, *(word for row in TOPICS.values() for word in row), *OTHERS]
_TOKENS = {word: token for token, word in enumerate(WORDS)}
_IGNORED = -100  # a target that no loss counts


@dataclass(frozen=True)
class Document:
    """END, the report, SUMMARY, the summary, END: int64 (length,)."""

    tokens: Tensor
    prompt_length: int  # through SUMMARY

    @property
    def prompt(self) -> Tensor:
        return self.tokens[: self.prompt_length]

    @property
    def answer(self) -> list[int]:
        """What has to be written behind the prompt."""
        answer: list[int] = self.tokens[self.prompt_length :].tolist()
        return answer


@dataclass(frozen=True)
class Batch:
    """Documents back to back: (total,) inputs and targets, as training wants them."""

    inputs: Tensor
    targets: Tensor  # those that do not count are negative
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def tokens(self) -> int:
        return self.inputs.shape[0]

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.inputs.to(device),
            self.targets.to(device),
            self.cu_seqlens.to(device),
            self.max_seqlen,
        )

    def padded(self) -> tuple[Tensor, Tensor]:
        """(batch, max_seqlen) inputs, and the place of each real token in them, flattened."""
        lengths = self.cu_seqlens.diff()
        mask = torch.arange(self.max_seqlen, device=lengths.device) < lengths[:, None]
        places = mask.flatten().nonzero().flatten()
        inputs = varlen.pad_input(self.inputs, places, lengths.shape[0], self.max_seqlen)
        return inputs, places


def draw(source: random.Random, length: int) -> Document:
    """A document of so many tokens."""
    chosen = {topic: source.choice(words) for topic, words in TOPICS.items()}
    report = [source.choice(OTHERS) for _ in range(length - 3 - 2 * len(TOPICS))]
    facts = source.sample(sorted(chosen.values()), len(chosen))
    for place, word in zip(source.sample(range(len(report)), len(facts)), facts, strict=True):
        report[place] = word
    summary = [word for pair in chosen.items() for word in pair]
    prompt = [END, *(_TOKENS[word] for word in report), SUMMARY]
    tokens = torch.tensor([*prompt, *(_TOKENS[word] for word in summary), END])
    return Document(tokens, len(prompt))


def documents(seed: int, count: int, shortest: int, longest: int) -> list[Document]:
    source = random.Random(seed)
    return [draw(source, _length(source, shortest, longest)) for _ in range(count)]


def next_batch(
    source: random.Random,
    batch_tokens: int,
    shortest: int,
    longest: int,
    *,
    whole_text: bool = False,
) -> Batch:
    """Whole documents, at most ``batch_tokens`` in all; their lengths spread over powers of two."""
    chosen: list[Document] = []
    filled = 0
    while True:
        length = _length(source, shortest, longest)
        if chosen and filled + length > batch_tokens:
            return make_batch(chosen, whole_text=whole_text)
        chosen.append(draw(source, length))
        filled += length


def once(chosen: list[Document], batch_tokens: int) -> Iterator[Batch]:
    """Batches that hold each document once, in order."""
    pending: list[Document] = []
    for document in chosen:
        if pending and sum(d.tokens.shape[0] for d in (*pending, document)) > batch_tokens:
            yield make_batch(pending)
            pending = []
        pending.append(document)
    yield make_batch(pending)


def make_batch(chosen: list[Document], *, whole_text: bool = False) -> Batch:
    """Each token but the last of a document predicts the one behind it; summaries count, or all."""
    inputs, cu_seqlens, max_seqlen = varlen.pack([document.tokens[:-1] for document in chosen])
    targets = []
    for document in chosen:
        following = document.tokens[1:].clone()
        if not whole_text:
            following[: document.prompt_length - 1] = _IGNORED
        targets.append(following)
    return Batch(inputs, torch.cat(targets), cu_seqlens, max_seqlen)


def is_answer(targets: Tensor) -> Tensor:
    """Whether a target is a word to be found, rather than a topic or an END."""
    return targets >= 2 + len(TOPICS)


def decode(tokens: list[int]) -> str:
    return " ".join(WORDS[token] if token < len(WORDS) else "?" for token in tokens).strip()


def _length(source: random.Random, shortest: int, longest: int) -> int:
    return round(math.exp(source.uniform(math.log(shortest), math.log(longest))))

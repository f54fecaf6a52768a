"""Documents of very different lengths that every Python installation carries.

Functions and methods of the standard library, and the sections of the reference manual that
`help()` shows. Nothing is downloaded.
"""

from __future__ import annotations

import ast
import os
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash8 import varlen

END = 0  # the byte between documents: what a text starts after, and what ends it
SHORTEST = 48
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}


@dataclass(frozen=True)
class Corpus:
    """Documents as int64 byte tensors, (length,) each, that start with END."""

    train: list[Tensor]
    heldout: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """Documents back to back: (total,) inputs and targets, as training wants them."""

    inputs: Tensor
    targets: Tensor
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


def load_corpus(total_bytes: int, heldout_bytes: int, longest: int, seed: int) -> Corpus:
    """Documents worth about ``total_bytes``, split by file, so no file is on both sides."""
    sources = _source_files()
    random.Random(seed).shuffle(sources)
    train: list[Tensor] = []
    heldout: list[Tensor] = []
    filled = 0
    for documents in _sources_and_topics(sources, seed):
        side = heldout if filled < heldout_bytes else train
        for text in documents:
            if len(text) >= SHORTEST:
                side.append(_encode(text, longest))
                filled += side[-1].shape[0]
        if filled >= total_bytes:
            break
    if not train or not heldout:
        raise RuntimeError(f"the {len(sources)} files of the standard library hold no documents")
    return Corpus(train, heldout)


def batches(documents: list[Tensor], batch_tokens: int, seed: int) -> Iterator[Batch]:
    """Endless batches of whole documents, at most ``batch_tokens`` each, shuffled every epoch."""
    shuffler = random.Random(seed)
    chosen: list[Tensor] = []
    filled = 0
    while True:
        for index in shuffler.sample(range(len(documents)), len(documents)):
            tokens = documents[index].shape[0] - 1
            if chosen and filled + tokens > batch_tokens:
                yield make_batch(chosen)
                chosen, filled = [], 0
            chosen.append(documents[index])
            filled += tokens


def once(documents: list[Tensor], batch_tokens: int) -> list[Batch]:
    """Batches that hold each document once, in order."""
    result: list[Batch] = []
    chosen: list[Tensor] = []
    for document in documents:
        if chosen and sum(d.shape[0] - 1 for d in (*chosen, document)) > batch_tokens:
            result.append(make_batch(chosen))
            chosen = []
        chosen.append(document)
    return [*result, make_batch(chosen)]


def make_batch(documents: list[Tensor]) -> Batch:
    """Each token but the last of a document predicts the one behind it."""
    inputs, cu_seqlens, max_seqlen = varlen.pack([document[:-1] for document in documents])
    targets = torch.cat([document[1:] for document in documents])
    return Batch(inputs, targets, cu_seqlens, max_seqlen)


def encode(text: str) -> Tensor:
    """A prompt as the model wants it: END, then the bytes."""
    return torch.tensor([END, *text.encode()], dtype=torch.int64)


def decode(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token != END).decode(errors="replace")


def _encode(text: str, longest: int) -> Tensor:
    """A whole document ends with END; a longer one is cut."""
    return torch.tensor([END, *text.encode()[:longest], END], dtype=torch.int64)[: longest + 1]


def _source_files() -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = set(subfolders) - _SKIPPED
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def _sources_and_topics(sources: list[Path], seed: int) -> Iterator[list[str]]:
    """The documents of each file, with a topic after every fourth."""
    topics = _topics()
    random.Random(seed).shuffle(topics)
    for index, path in enumerate(sources):
        yield _functions(path)
        if index % 4 == 0 and topics:
            yield topics.pop()


def _functions(path: Path) -> list[str]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    lines = source.splitlines(keepends=True)
    return [
        textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        for node in _outermost_functions(tree)
    ]


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost_functions(child)


def _topics() -> list[list[str]]:
    """The texts of `help()`, each cut into sections before its underlined headings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return []
    heading = re.compile(r"\n(?=[^\n]+\n[=*\-]{4,}\n)")
    return [heading.split(text) for _, text in sorted(topics.items())]

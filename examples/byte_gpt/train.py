"""Training on packed or padded batches: the same documents, the same loss.

Models that are compared are trained in lockstep: they see the same batches at the same learning
rates.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import data
from config import Config, device, mixed_precision
from flash8.nn import FlashMHA, to_fp8_linears
from model import BF16MHA, FP8MHA, ByteGPT, TorchMHA, UnfusedMHA
from muon import Muon


@dataclass(frozen=True)
class Variant:
    """One way to train: which attention, on packed or padded tokens; options of `to_fp8_linears`
    where the blocks' linear layers are in FP8."""

    label: str
    attention: type[FlashMHA]
    packed: bool
    linears: dict[str, Any] | None = None


VARIANTS = {
    "packed": Variant("flash8, packed", FlashMHA, packed=True),
    "padded": Variant("flash8, padded", FlashMHA, packed=False),
    "torch": Variant("torch SDPA, padded", TorchMHA, packed=False),
    "unfused": Variant("unfused, padded", UnfusedMHA, packed=False),
}

#: Trained side by side; the first is what the others are held against.
PRECISIONS = {
    "bf16": Variant("bf16", BF16MHA, packed=True),
    "fp8": Variant("FP8 forward", FP8MHA, packed=True),
}


class Score(NamedTuple):
    """On held-out documents: nats per token of their summaries, and the share of right words."""

    loss: float
    accuracy: float


@dataclass
class History:
    """What a training run leaves. seconds: in training steps alone."""

    label: str = ""
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    heldout_tokens: list[int] = field(default_factory=list)
    heldout_losses: list[float] = field(default_factory=list)
    heldout_accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """A model, its optimizers and one way to attend; every variant starts from equal weights."""

    def __init__(self, config: Config, variant: Variant) -> None:
        torch.manual_seed(config.seed)
        self.model = ByteGPT(config, variant.attention).to(device())
        if variant.linears is not None:
            to_fp8_linears(self.model.blocks, **variant.linears)
        self.label = variant.label
        self._packed = variant.packed
        hidden = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        known = set(hidden)
        others = [p for p in self.model.parameters() if p not in known]
        self._optimizers: Sequence[Optimizer] = (
            Muon(hidden, lr=config.matrix_rate),
            torch.optim.AdamW(others, lr=config.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        for group in self._groups():
            group["peak"] = group["lr"]

    def step(self, batch: data.Batch, rate: float = 1.0) -> float:
        """One update; ``rate`` scales the learning rates. Returns the loss."""
        for group in self._groups():
            group["lr"] = rate * group["peak"]
        loss = self._loss(batch)
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def warm_up(self, batch: data.Batch) -> None:
        """What a GPU does once, above all to compile and check kernels; trains nothing."""
        self._loss(batch).backward()
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[data.Batch]) -> Score:
        loss = right = words = counted = 0
        for batch in batches:
            logits = self._logits(batch)
            loss += F.cross_entropy(logits, batch.targets, reduction="sum").item()
            counted += (batch.targets >= 0).sum().item()
            answers = data.is_answer(batch.targets)
            right += (logits.argmax(-1) == batch.targets)[answers].sum().item()
            words += answers.sum().item()
        return Score(loss / counted, right / words)

    def _loss(self, batch: data.Batch) -> Tensor:
        """Mean over the tokens that count."""
        return F.cross_entropy(self._logits(batch), batch.targets)

    def _logits(self, batch: data.Batch) -> Tensor:
        """Of the real tokens; padding is computed and dropped."""
        with mixed_precision(batch.inputs.device):
            if self._packed:
                logits = self.model(batch.inputs, batch.cu_seqlens, batch.max_seqlen)
            else:
                inputs, places = batch.padded()
                logits = self.model(inputs).flatten(0, 1)[places]
        return logits.float()

    def _groups(self) -> Iterator[dict]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups


def train(trainers: Sequence[Trainer], config: Config) -> list[History]:
    """Train all on the same batches; validate at times."""
    chosen = data.documents(
        config.seed + 1, config.heldout_documents, config.shortest, config.longest
    )
    heldout = [batch.to(device()) for batch in data.once(chosen, 2 * config.longest)]
    if device().type == "cuda":
        for trainer in trainers:
            trainer.warm_up(heldout[0])
    histories = [History(trainer.label) for trainer in trainers]
    _validate(trainers, histories, heldout)
    source = random.Random(config.seed)
    every = max(1, config.steps // config.validations)
    with tqdm(total=config.steps, desc="train", unit="step", disable=None) as bar:
        for step in range(1, config.steps + 1):
            done = (step - 1) / config.steps
            sizes = (config.batch_tokens, config.shortest, config.longest_at(done))
            batch = data.next_batch(source, *sizes, whole_text=config.whole_text).to(device())
            for trainer, history in zip(trainers, histories, strict=True):
                _timed_step(trainer, history, batch, rate(done))
            if step % every == 0 or step == config.steps:
                _validate(trainers, histories, heldout)
                bar.set_postfix_str(_latest(histories))
            bar.update()
    return histories


def accuracy_gap(history: History, reference: History) -> float:
    """How far the last held-out accuracy is above the reference's."""
    return history.heldout_accuracies[-1] - reference.heldout_accuracies[-1]


def _timed_step(trainer: Trainer, history: History, batch: data.Batch, rate: float) -> None:
    began = perf_counter()
    history.losses.append(trainer.step(batch, rate))  # its item() waits for the device
    history.seconds += perf_counter() - began
    history.tokens.append((history.tokens or [0])[-1] + batch.tokens)


def _validate(
    trainers: Sequence[Trainer], histories: list[History], heldout: list[data.Batch]
) -> None:
    for trainer, history in zip(trainers, histories, strict=True):
        score = trainer.evaluate(heldout)
        history.heldout_tokens.append((history.tokens or [0])[-1])
        history.heldout_losses.append(score.loss)
        history.heldout_accuracies.append(score.accuracy)


def rate(done: float, climb: float = 0.04) -> float:
    """Of a run, by the share of it that is done: a short climb, then half a cosine."""
    if done < climb:
        return 0.2 + 0.8 * done / climb
    return 0.525 + 0.475 * math.cos(math.pi * (done - climb) / (1 - climb))


def _latest(histories: list[History]) -> str:
    shares = (f"{history.label} {history.heldout_accuracies[-1]:.0%}" for history in histories)
    return "right words held out: " + ", ".join(shares)

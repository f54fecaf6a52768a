"""Training on packed or padded batches: the same documents, the same loss.

Models that are compared are trained in lockstep, so whatever the clock allows, they have seen the
same batches at the same learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import data
from config import Config, device, mixed_precision
from flash8.nn import FlashMHA
from model import BF16MHA, FP8MHA, ByteGPT, TorchMHA, UnfusedMHA
from muon import Muon


@dataclass(frozen=True)
class Variant:
    """One way to train: which attention, on packed or padded tokens."""

    label: str
    attention: type[FlashMHA]
    packed: bool


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


@dataclass
class History:
    """What a training run leaves: losses in nats per byte, counted in real tokens.

    seconds: in training steps alone.
    """

    label: str = ""
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    heldout_tokens: list[int] = field(default_factory=list)
    heldout_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Trainer:
    """A model, its optimizers and one way to attend; every variant starts from equal weights."""

    def __init__(self, config: Config, variant: Variant) -> None:
        torch.manual_seed(config.seed)
        self.model = ByteGPT(config, variant.attention).to(device())
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
    def evaluate(self, batches: list[data.Batch]) -> float:
        """Nats per byte."""
        total = sum(self._loss(batch).item() * batch.tokens for batch in batches)
        return total / sum(batch.tokens for batch in batches)

    def _loss(self, batch: data.Batch) -> Tensor:
        """Mean over the real tokens; padding is computed and dropped."""
        with mixed_precision(batch.inputs.device):
            if self._packed:
                logits = self.model(batch.inputs, batch.cu_seqlens, batch.max_seqlen)
            else:
                inputs, places = batch.padded()
                logits = self.model(inputs).flatten(0, 1)[places]
            return F.cross_entropy(logits.float(), batch.targets)

    def _groups(self) -> Iterator[dict]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups


def train(trainers: Sequence[Trainer], corpus: data.Corpus, config: Config) -> list[History]:
    """Train all for `train_seconds` or `most_steps`, whichever comes first; validate at times."""
    heldout = [batch.to(device()) for batch in data.once(corpus.heldout, config.batch_tokens)]
    if device().type == "cuda":
        for trainer in trainers:
            trainer.warm_up(heldout[0])
    histories = [History(trainer.label) for trainer in trainers]
    _validate(trainers, histories, heldout)
    endless = data.batches(corpus.train, config.batch_tokens, config.seed)
    began, done, steps = perf_counter(), 0.0, 0
    with tqdm(total=100, desc="train", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while done < 1.0:
            batch = next(endless).to(device())
            for trainer, history in zip(trainers, histories, strict=True):
                _timed_step(trainer, history, batch, rate(done))
            steps += 1
            before, done = done, _progress(began, steps, config)
            if int(before * config.validations) < int(done * config.validations):
                _validate(trainers, histories, heldout)
            bar.set_postfix_str(_latest(histories, steps))
            bar.update(100 * done - bar.n)
    return histories


def loss_gap(history: History, reference: History) -> float:
    """How far the last held-out loss is above the reference's, as a share of it."""
    return history.heldout_losses[-1] / reference.heldout_losses[-1] - 1.0


def _timed_step(trainer: Trainer, history: History, batch: data.Batch, rate: float) -> None:
    began = perf_counter()
    history.losses.append(trainer.step(batch, rate))  # its item() waits for the device
    history.seconds += perf_counter() - began
    history.tokens.append((history.tokens or [0])[-1] + batch.tokens)


def _validate(
    trainers: Sequence[Trainer], histories: list[History], heldout: list[data.Batch]
) -> None:
    for trainer, history in zip(trainers, histories, strict=True):
        history.heldout_tokens.append((history.tokens or [0])[-1])
        history.heldout_losses.append(trainer.evaluate(heldout))


def rate(done: float, climb: float = 0.04) -> float:
    """Of a run, by the share of it that is done: a short climb, then half a cosine."""
    if done < climb:
        return 0.2 + 0.8 * done / climb
    return 0.525 + 0.475 * math.cos(math.pi * (done - climb) / (1 - climb))


def _progress(began: float, steps: int, config: Config) -> float:
    elapsed = (perf_counter() - began) / config.train_seconds
    return min(1.0, max(elapsed, steps / config.most_steps))


def _latest(histories: list[History], steps: int) -> str:
    losses = (
        f"{history.label} {history.losses[-1]:.2f} (held out {history.heldout_losses[-1]:.2f})"
        for history in histories
    )
    return ", ".join((f"step {steps}", *losses))

"""Trains the demo's model with FP8 in attention and in the products around it, beside bf16.

    python examples/byte_gpt/fp8_linear.py [--steps N]

Both models start from the same weights and see the same documents, short ones. One has attention on
bf16 q, k and v and plain linear layers. The other has `flash8.fp8_attention` and, in its blocks,
`flash8.nn.Fp8Linear` with scales by blocks: the forward in FP8, or gradients too. Fails if a mean
loss over the last quarter of the run ends more than 1 % above that of bf16.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from config import FULL, Config, use_all_cores
from train import PRECISIONS, History, Trainer, Variant, train

LARGEST_GAP = 0.01
VARIANTS = (
    PRECISIONS["bf16"],
    replace(PRECISIONS["fp8"], label="FP8, 16-bit gradients", linears={"scaling": "block"}),
    replace(
        PRECISIONS["fp8"],
        label="FP8, FP8 gradients",
        linears={"scaling": "block", "grad_dtype": torch.float8_e4m3fn},
    ),
)


def compare(config: Config, variants: tuple[Variant, ...] = VARIANTS) -> list[float]:
    """Trains; the final losses, those of bf16 first."""
    histories = train([Trainer(config, variant) for variant in variants], config)
    losses = [final_loss(history) for history in histories]
    for history, loss in zip(histories, losses, strict=True):
        print(f"{history.label:24} loss {loss:.4f}, {loss / losses[0] - 1:+.2%} of bf16's")
    return losses


def final_loss(history: History) -> float:
    """The mean over the last quarter of the steps."""
    last = history.losses[-max(1, len(history.losses) // 4) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    use_all_cores()
    losses = compare(replace(FULL, steps=options.steps, longest=FULL.first_longest, validations=1))
    worst = max(losses[1:]) / losses[0] - 1
    if worst > LARGEST_GAP:
        raise SystemExit(f"FP8 ended {worst:+.2%} above bf16's loss, more than {LARGEST_GAP:.0%}")


if __name__ == "__main__":
    main()

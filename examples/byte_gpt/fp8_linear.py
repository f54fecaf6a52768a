"""Trains the demo's model with FP8 in attention and in the products around it, beside bf16.

    python examples/byte_gpt/fp8_linear.py [--steps N]

Both models start from the same weights and see the same documents, short ones. One has attention on
bf16 q, k and v and plain linear layers. The other has `flash8.fp8_attention` and, in its blocks,
`flash8.nn.Fp8Linear` with scales by blocks: the forward in FP8, or gradients too.

Every word is to be predicted, as in a language model, and not only those of the summary, whose loss
falls to nothing. What words of a report are is chance, so the loss has a floor to be held against.
It fails if one ends with a loss more than 1 % above that of bf16, or, as demo.py, with a share of
right words more than 1 % below it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from config import FULL, Config, use_all_cores
from train import PRECISIONS, History, Trainer, Variant, accuracy_gap, train

VARIANTS = (
    PRECISIONS["bf16"],
    replace(PRECISIONS["fp8"], label="FP8, 16-bit gradients", linears={"scaling": "block"}),
    replace(
        PRECISIONS["fp8"],
        label="FP8, FP8 gradients",
        linears={"scaling": "block", "grad_dtype": torch.float8_e4m3fn},
    ),
)
#: Of FP8's loss above that of bf16.
LARGEST_LOSS_GAP = 0.01


def compare(config: Config, variants: tuple[Variant, ...] = VARIANTS) -> list[History]:
    """Trains; bf16 comes first."""
    histories = train([Trainer(config, variant) for variant in variants], config)
    for history in histories:
        share, loss = history.heldout_accuracies[-1], final_loss(history)
        print(f"{history.label:24} right words held out {share:.1%}, loss {loss:.4f}")
    return histories


def final_loss(history: History) -> float:
    """The mean over the last quarter of the steps."""
    last = history.losses[-max(1, len(history.losses) // 4) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=FULL.steps)
    options = parser.parse_args()
    use_all_cores()
    config = replace(
        FULL, steps=options.steps, longest=FULL.first_longest, validations=1, whole_text=True
    )
    reference, *others = compare(config)
    worst = min(accuracy_gap(history, reference) for history in others)
    if worst < -config.largest_accuracy_gap:
        raise SystemExit(f"FP8 ended with {worst:+.2%} right words beside bf16")
    for history in others:
        above = final_loss(history) / final_loss(reference) - 1.0
        if not above <= LARGEST_LOSS_GAP:
            raise SystemExit(f"FP8 ended with a loss {above:+.2%} beside bf16")


if __name__ == "__main__":
    main()

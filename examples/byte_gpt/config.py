"""Every number of the demo in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

OUT_DIR = Path(__file__).resolve().parent / "out"


@dataclass(frozen=True)
class Config:
    """Sizes in tokens: one token is one byte, which is one word of the language."""

    # the language: documents of so many tokens, short ones first
    shortest: int = 48
    longest: int = 1024
    first_longest: int = 128
    heldout_documents: int = 48
    whole_text: bool = False  # training predicts every word, not only those of summaries
    # the model
    layers: int = 2
    dim: int = 64
    heads: int = 2
    # training
    steps: int = 450
    batch_tokens: int = 2048
    matrix_rate: float = 0.06
    other_rate: float = 0.03
    validations: int = 12
    largest_accuracy_gap: float = 0.01  # of FP8's held-out accuracy against that of bf16
    # the comparison of attention variants: one step to warm up, then the measured ones
    compare_steps: int = 3
    compare_tokens: int = 4096
    # serving
    page_size: int = 16
    pool_pages: int = 400
    serve_rows: int = 6
    serve_texts: int = 12
    serve_shortest: int = 768
    new_tokens: int = 32
    calibration_documents: int = 8
    seed: int = 2025

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def longest_at(self, done: float) -> int:
        """The longest document of a run's training when so much of it is done. To find a word
        among few is learned first."""
        growth = min(1.0, max(0.0, (done - 0.5) / 0.35))
        return round(self.first_longest * (self.longest / self.first_longest) ** growth)


FULL = Config()
QUICK = replace(
    FULL,
    longest=64,
    first_longest=64,
    heldout_documents=16,
    steps=12,
    batch_tokens=512,
    validations=2,
    compare_steps=1,
    compare_tokens=1024,
    pool_pages=24,
    serve_rows=3,
    serve_texts=5,
    serve_shortest=48,
)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(where: torch.device) -> torch.autocast:
    """bf16 products on a GPU, fp32 throughout on a CPU."""
    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == "cuda")


def use_all_cores() -> int:
    """One thread for each core this process may run on, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        allowed = getattr(os, "sched_getaffinity", None)
        torch.set_num_threads(len(allowed(0)) if allowed else os.cpu_count() or 1)
    return torch.get_num_threads()

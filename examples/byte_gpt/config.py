"""Every number of the demo in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

OUT_DIR = Path(__file__).resolve().parent / "out"


@dataclass(frozen=True)
class Config:
    """Sizes in tokens (one token is one byte), times in seconds."""

    # the text
    corpus_bytes: int = 2_000_000
    heldout_bytes: int = 20_000
    longest_document: int = 1536
    # the model
    layers: int = 4
    dim: int = 128
    heads: int = 2
    # training
    batch_tokens: int = 2048
    matrix_rate: float = 0.04
    other_rate: float = 0.02
    train_seconds: float = 50.0  # of all the models together
    most_steps: int = 2000
    validations: int = 4
    largest_loss_gap: float = 0.01  # of FP8's held-out loss against that of bf16
    # the comparison of attention variants: one step to warm up, then the measured ones
    compare_steps: int = 1
    compare_tokens: int = 4096
    # serving
    page_size: int = 16
    pool_pages: int = 96
    serve_rows: int = 6
    new_tokens: int = 80
    temperature: float = 0.5
    # the held-out loss through a cache: texts of so many tokens, read so many at a time
    cached_tokens: int = 192
    cached_chunk: int = 8
    calibration_documents: int = 8
    seed: int = 2025

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


FULL = Config()
QUICK = replace(
    FULL,
    corpus_bytes=60_000,
    heldout_bytes=4_000,
    longest_document=256,
    layers=2,
    dim=64,
    batch_tokens=512,
    train_seconds=60.0,
    most_steps=12,
    validations=2,
    compare_steps=1,
    compare_tokens=1024,
    pool_pages=24,
    serve_rows=3,
    new_tokens=12,
    cached_tokens=48,
    cached_chunk=5,
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

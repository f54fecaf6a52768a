"""Speed and memory of one variant, in a process of its own so that its peak is its own.

python measure.py VARIANT BATCHES.pt RESULT.json [--quick]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

import data
from config import FULL, QUICK, device, use_all_cores
from train import VARIANTS, Trainer


@dataclass(frozen=True)
class Measurement:
    """One row of the comparison. Losses are those of every step, the warm-up's first."""

    variant: str
    label: str
    real_tokens: int
    computed_tokens: int
    seconds: float
    peak_mib: float
    losses: list[float]

    @property
    def tokens_per_second(self) -> float:
        return self.real_tokens / self.seconds


def measure(variant: str, batches: list[data.Batch], trainer: Trainer, baseline: float) -> dict:
    """Time all batches but the first, which warms up."""
    packed = VARIANTS[variant].packed
    losses, seconds = [], 0.0
    for index, batch in enumerate(
        tqdm(batches, desc=VARIANTS[variant].label, unit="step", disable=None)
    ):
        batch = batch.to(device())
        _wait()
        began = perf_counter()
        losses.append(trainer.step(batch))
        _wait()
        seconds += perf_counter() - began if index > 0 else 0.0
    timed = batches[1:]
    computed = sum(
        batch.tokens if packed else (batch.cu_seqlens.numel() - 1) * batch.max_seqlen
        for batch in timed
    )
    result = Measurement(
        variant=variant,
        label=VARIANTS[variant].label,
        real_tokens=sum(batch.tokens for batch in timed),
        computed_tokens=computed,
        seconds=seconds,
        peak_mib=_peak_mib() - baseline,
        losses=losses,
    )
    return asdict(result)


def save_batches(batches: list[data.Batch], path: Path) -> None:
    torch.save([vars(batch) for batch in batches], path)


def load_batches(path: Path) -> list[data.Batch]:
    return [data.Batch(**fields) for fields in torch.load(path)]


def _peak_mib() -> float:
    """The most memory this process has held so far: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent, which Linux hands down on exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("batches", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    use_all_cores()
    batches = load_batches(options.batches)
    baseline = _peak_mib()
    trainer = Trainer(QUICK if options.quick else FULL, VARIANTS[options.variant])
    result = measure(options.variant, batches, trainer, baseline)
    options.result.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

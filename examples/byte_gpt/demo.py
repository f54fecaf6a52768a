"""Trains a small GPT to summarise reports of a small language, then serves it.

    python examples/byte_gpt/demo.py [--quick] [--steps N]

Shows what packing and flash8 save beside padding and unfused attention, that bf16 and FP8-forward
training end with the same share of right words, and long reports summarised from a bf16 and from an
e4m3 KV cache, and without one. Writes pictures and numbers to examples/byte_gpt/out/; fails if FP8
ends with a share more than 1 % away from that of bf16.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import textwrap
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import caches
import data
import report
from config import FULL, OUT_DIR, QUICK, Config, device, use_all_cores
from flash8.backends.describe import describe, serving
from measure import Measurement, save_batches
from model import BF16MHA, ByteGPT
from serve import Request, Server, largest_difference, read_again
from train import PRECISIONS, VARIANTS, History, Trainer, accuracy_gap, train

#: What kernels do in a training step.
JOBS = ("forward", "backward", "quantize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=OUT_DIR, help="folder for the results")
    parser.add_argument("--steps", type=int, help="train so many steps")
    options = parser.parse_args()
    config = QUICK if options.quick else FULL
    if options.steps is not None:
        config = replace(config, steps=options.steps)
    run(config, options.out, options.quick)


def run(config: Config, out: Path, quick: bool) -> None:
    began = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    heading("The language")
    describe_language(config)

    heading("The same training steps in four ways, each in its own process")
    rows = compare(config, out, quick)
    print(report.table(rows))
    print(report.verdict(rows))

    heading("Training on packed documents: bf16, and FP8 in the forward of attention")
    trainers = [Trainer(config, variant) for variant in PRECISIONS.values()]
    histories, kernels = train_and_tell(trainers, config)

    heading("Serving the model that FP8 trained, with a paged KV cache of 16 and of 8 bits")
    model = ByteGPT(config, BF16MHA).to(device())
    model.load_state_dict(trainers[-1].model.state_dict())
    served, sample = serve_all(model, config)

    report.plot_training(histories, out / "training.png")
    report.plot_comparison(rows, out / "comparison.png")
    (out / "sample.txt").write_text(sample)
    gap = accuracy_gap(histories[1], histories[0])
    results = {
        "machine": machine,
        "config": asdict(config),
        "comparison": [asdict(row) for row in rows],
        "training": {name: asdict(h) for name, h in zip(PRECISIONS, histories, strict=True)},
        "kernels": kernels,
        "fp8_accuracy_gap": gap,
        "serving": served,
        "seconds": perf_counter() - began,
    }
    report.write_json(results, out / "results.json")
    heading(f"Done in {results['seconds']:.0f} s")
    for name in ("training.png", "comparison.png", "sample.txt", "results.json"):
        print(f"  {out / name}")
    if abs(gap) > config.largest_accuracy_gap:
        raise SystemExit(
            f"FP8-forward training ended with {gap:+.2%} right words beside bf16, more than "
            f"{config.largest_accuracy_gap:.0%} away"
        )


def heading(text: str) -> None:
    print(f"\n=== {text} ===", flush=True)


def describe_machine() -> dict[str, str]:
    cores = use_all_cores()
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device()),
        "name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": str(cores),
        "dtype": "bfloat16 products" if torch.cuda.is_available() else "float32",
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    heading("Which backend serves which call")
    services = [(row.call, row.backend, row.reason) for row in describe()]
    print(report.align([("call", "backend", "reason"), *services], left=3))
    return machine


def describe_language(config: Config) -> None:
    example = data.draw(random.Random(config.seed), config.shortest)
    print(
        f"Reports of {config.shortest} to {config.longest} words name one word of each of "
        f"{len(data.TOPICS)} topics, {len(next(iter(data.TOPICS.values())))} to choose from; the "
        "summary has to find them. The shortest:"
    )
    print(textwrap.fill(data.decode(example.tokens.tolist()), 96, initial_indent="  "))


def batches_to_compare(config: Config) -> list[data.Batch]:
    source = random.Random(config.seed)
    sizes = (config.compare_tokens, config.shortest, config.longest)
    return [data.next_batch(source, *sizes) for _ in range(config.compare_steps + 1)]


def compare(config: Config, out: Path, quick: bool) -> list[Measurement]:
    """Every variant on the same batches, from the same weights."""
    inputs, result = out / "batches.pt", out / "measurement.json"
    save_batches(batches_to_compare(config), inputs)
    rows = []
    for variant in VARIANTS:
        script = Path(__file__).with_name("measure.py")
        command = [sys.executable, str(script), variant, str(inputs), str(result)]
        subprocess.run([*command, "--quick"] if quick else command, check=True)
        rows.append(Measurement(**json.loads(result.read_text())))
    inputs.unlink()
    result.unlink()
    return rows


def train_and_tell(
    trainers: list[Trainer], config: Config
) -> tuple[list[History], dict[str, list[str]]]:
    """Trains; says how far it came, which kernels served, and what they did not serve."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        histories = train(trainers, config)
    print(report.training_table(histories))
    found = serving()
    kernels = {job: [name for name in found if name.startswith(job)] for job in JOBS}
    for job, names in kernels.items():
        print(f"{job}: {', '.join(names) or 'the CPU backend, no kernel'}")
    for warning in told:
        print(f"{warning.category.__name__}: {warning.message}")
    return histories, kernels


def serve_all(model: ByteGPT, config: Config) -> tuple[dict, str]:
    """The same long reports through both caches, and without one: results by cache, and texts."""
    texts = data.documents(
        config.seed + 2, config.serve_texts, config.serve_shortest, config.longest
    )
    seen = data.documents(
        config.seed + 3, config.calibration_documents, config.shortest, config.longest
    )
    seconds, read = read_again(model, texts, config.serve_rows)
    served: dict[str, dict[str, Any]] = {"none": count(read) | {"seconds_per_step": seconds}}
    for label, cache in (
        ("bf16", caches.paged_cache(config, torch.bfloat16)),
        ("e4m3", caches.e4m3_cache(model, config, seen)),
    ):
        server = Server(model, config, cache, f"{label} cache")
        requests = server.run(texts)
        served[label] = count(requests) | costs(server)
        served[label]["largest_logit_difference"] = largest_difference(model, requests)
    print(report.cache_table(served))
    print(f"the last report, of {texts[-1].prompt_length} words, read through e4m3:")
    shown = [data.decode(texts[-1].prompt.tolist())[-100:], data.decode(requests[-1].written)]
    print(textwrap.fill(f"... {' '.join(shown)}", 96, initial_indent="  ", subsequent_indent="  "))
    sample = "".join(write_sample(request) for request in requests)
    return served, sample


def count(requests: list[Request]) -> dict[str, int]:
    """Summaries that are right to the last word, and right words."""
    return {
        "texts": len(requests),
        "exact": sum(request.is_exact for request in requests),
        "words": len(requests) * len(data.TOPICS),
        "right_words": sum(request.right_words for request in requests),
    }


def costs(server: Server) -> dict[str, Any]:
    served, cache = server.served, server.cache
    page_bytes = 2 * cache.k[:, 0].nbytes
    return {
        **asdict(served),
        "seconds_per_step": served.decode_seconds / served.decode_steps,
        "page_bytes": page_bytes,
        "most_bytes": served.most_pages * page_bytes,
    }


def write_sample(request: Request) -> str:
    verdict = "right" if request.is_exact else "wrong"
    prompt, summary = data.decode(request.prompt.tolist()), data.decode(request.written)
    return f"{textwrap.fill(f'{prompt} {summary}', 96)}\n-> {verdict}\n\n"


if __name__ == "__main__":
    main()

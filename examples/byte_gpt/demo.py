"""Trains a small GPT on the texts of this Python installation, then serves it.

    python examples/byte_gpt/demo.py [--quick] [--steps N]

Shows what packing and flash8 save beside padding and unfused attention, the loss curves of bf16 and
of FP8-forward training, and text written from a bf16 and from an e4m3 KV cache. Writes pictures and
numbers to examples/byte_gpt/out/; fails if FP8 ends more than 1 % away from bf16's loss.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

import caches
import data
import report
from config import FULL, OUT_DIR, QUICK, Config, device, use_all_cores
from flash8.backends.describe import describe, serving
from flash8.nn import PagedKVCache
from measure import Measurement, save_batches
from model import BF16MHA, ByteGPT
from serve import Request, Server, largest_difference, seconds_without_cache
from train import PRECISIONS, VARIANTS, History, Trainer, loss_gap, train

PROMPTS = (
    "def ",
    "def __init__(self, ",
    "class ",
    "The ",
    "async def ",
    'def parse(text):\n    """Return ',
    "Note that ",
)

#: What kernels do in a training step.
JOBS = ("forward", "backward", "quantize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=OUT_DIR, help="folder for the results")
    parser.add_argument("--steps", type=int, help="train so many steps, however long they take")
    options = parser.parse_args()
    config = QUICK if options.quick else FULL
    if options.steps is not None:
        config = replace(config, most_steps=options.steps, train_seconds=float("inf"))
    run(config, options.out, options.quick)


def run(config: Config, out: Path, quick: bool) -> None:
    began = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    heading("Documents")
    corpus = data.load_corpus(
        config.corpus_bytes, config.heldout_bytes, config.longest_document, config.seed
    )
    text = describe_corpus(corpus)

    heading("The same training steps in four ways, each in its own process")
    rows = compare(corpus, config, out, quick)
    print(report.table(rows))
    print(report.verdict(rows))

    heading("Training on packed documents: bf16, and FP8 in the forward of attention")
    trainers = [Trainer(config, variant) for variant in PRECISIONS.values()]
    histories, kernels = train_and_tell(trainers, corpus, config)

    heading("Serving the model that FP8 trained, with a paged KV cache of 16 and of 8 bits")
    model = ByteGPT(config, BF16MHA).to(device())
    model.load_state_dict(trainers[-1].model.state_dict())
    served, sample = serve_both(model, corpus, config)

    report.plot_losses(histories, out / "loss.png", config.largest_loss_gap)
    report.plot_comparison(rows, out / "comparison.png")
    (out / "sample.txt").write_text(sample)
    gap = loss_gap(histories[1], histories[0])
    results = {
        "machine": machine,
        "config": asdict(config),
        "documents": text,
        "comparison": [asdict(row) for row in rows],
        "training": {name: asdict(h) for name, h in zip(PRECISIONS, histories, strict=True)},
        "kernels": kernels,
        "fp8_loss_gap": gap,
        "serving": served,
        "seconds": perf_counter() - began,
    }
    report.write_json(results, out / "results.json")
    heading(f"Done in {results['seconds']:.0f} s")
    for name in ("loss.png", "comparison.png", "sample.txt", "results.json"):
        print(f"  {out / name}")
    if abs(gap) > config.largest_loss_gap:
        raise SystemExit(
            f"FP8-forward training ended {gap:+.2%} away from bf16's held-out loss, more than "
            f"{config.largest_loss_gap:.0%}"
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


def describe_corpus(corpus: data.Corpus) -> dict[str, float]:
    lengths = torch.tensor([document.shape[0] - 1 for document in corpus.train]).double()
    quantiles = lengths.quantile(torch.tensor([0.1, 0.5, 0.9, 1.0]).double()).tolist()
    text = {
        "train_documents": len(corpus.train),
        "train_bytes": int(lengths.sum()),
        "heldout_documents": len(corpus.heldout),
        **dict(zip(("p10", "median", "p90", "longest"), quantiles, strict=True)),
    }
    print(
        f"{text['train_documents']:,} functions and help sections of this Python, "
        f"{text['train_bytes'] / 1e6:.1f} MB; {text['heldout_documents']} more held out; lengths: "
        f"median {text['median']:.0f}, 10 % under {text['p10']:.0f}, 10 % over {text['p90']:.0f}, "
        f"cut at {text['longest']:.0f} bytes"
    )
    return text


def compare(corpus: data.Corpus, config: Config, out: Path, quick: bool) -> list[Measurement]:
    """Every variant on the same batches, from the same weights."""
    batches = data.batches(corpus.train, config.compare_tokens, config.seed)
    inputs, result = out / "batches.pt", out / "measurement.json"
    save_batches(list(islice(batches, config.compare_steps + 1)), inputs)
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
    trainers: list[Trainer], corpus: data.Corpus, config: Config
) -> tuple[list[History], dict[str, list[str]]]:
    """Trains; says how far it came, which kernels served, and what they did not serve."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        histories = train(trainers, corpus, config)
    print(report.training_table(histories))
    found = serving()
    kernels = {job: [name for name in found if name.startswith(job)] for job in JOBS}
    for job, names in kernels.items():
        print(f"{job}: {', '.join(names) or 'tiled PyTorch, no kernel'}")
    for warning in told:
        print(f"{warning.category.__name__}: {warning.message}")
    return histories, kernels


def serve_both(model: ByteGPT, corpus: data.Corpus, config: Config) -> tuple[dict, str]:
    """The same prompts and held-out texts through both caches: results by cache, and the texts."""
    served, samples = {}, []
    for label, cache in (
        ("bf16", caches.paged_cache(config, torch.bfloat16)),
        ("e4m3", caches.e4m3_cache(model, config, corpus.train)),
    ):
        served[label], requests = serve(model, corpus, config, cache, f"{label} cache")
        samples.append(f"--- {label} cache ---\n{write_sample(requests)}")
    print("\n".join(samples))
    print(report.cache_table(served))
    first = next(iter(served.values()))
    print(
        f"held out: nats per byte of {config.serve_rows} texts read through the cache; logits: "
        "largest difference to one full bf16 forward pass over the finished texts; a step without "
        f"a cache: {1e3 * first['seconds_per_step_without_cache']:.0f} ms"
    )
    return served, "\n".join(samples)


def serve(
    model: ByteGPT, corpus: data.Corpus, config: Config, cache: PagedKVCache, label: str
) -> tuple[dict, list[Request]]:
    """Finish prompts of very different lengths: short beginnings and halves of held-out texts."""
    loss = caches.loss_through(cache, model, config, corpus.heldout, label)
    server = Server(model, config, cache, label)
    halves = [document[: document.shape[0] // 2] for document in corpus.heldout[:5]]
    requests = server.run([*map(data.encode, PROMPTS), *halves])
    served = server.served
    page_bytes = 2 * cache.k[:, 0].nbytes
    dense_pages = config.serve_rows * -(-cache.max_seqlen // config.page_size)
    return {
        **asdict(served),
        "decode_tokens_per_second": served.decode_tokens / served.decode_seconds,
        "seconds_per_step": served.decode_seconds / served.decode_steps,
        "seconds_per_step_without_cache": seconds_without_cache(
            model, requests[: config.serve_rows]
        ),
        "page_bytes": page_bytes,
        "most_bytes": served.most_pages * page_bytes,
        "dense_bytes": dense_pages * page_bytes,
        "largest_logit_difference": largest_difference(model, requests),
        "heldout_loss": loss,
    }, requests


def write_sample(requests: list[Request]) -> str:
    """Prompt and continuation of each request, set off by a bar."""
    return "\n".join(f"{show(request.prompt)}|{request.text}\n" for request in requests)


def show(prompt: Tensor, longest: int = 60) -> str:
    text = data.decode(prompt.tolist())
    return text if len(text) <= longest else f"[{len(text)} bytes] ...{text[-longest:]}"


if __name__ == "__main__":
    main()

"""Trains a small GPT on the texts of this Python installation, then serves it.

    python examples/byte_gpt/demo.py [--quick]

Shows what packing and flash8 save beside padding and unfused attention, the loss curve, and text
written by paged decoding. Writes pictures and numbers to examples/byte_gpt/out/.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

import data
import report
from config import FULL, OUT_DIR, QUICK, Config, device, use_all_cores
from flash8 import backends
from measure import Measurement, save_batches
from model import ByteGPT
from serve import Request, Server, largest_difference, seconds_without_cache
from train import VARIANTS, History, Trainer, train

PROMPTS = (
    "def ",
    "def __init__(self, ",
    "class ",
    "The ",
    "async def ",
    'def parse(text):\n    """Return ',
    "Note that ",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=OUT_DIR, help="folder for the results")
    options = parser.parse_args()
    run(QUICK if options.quick else FULL, options.out, options.quick)


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

    heading("Training on packed documents")
    trainer = Trainer(config, VARIANTS["packed"])
    history = train(trainer, corpus, config)
    print(describe_history(history))

    heading("Serving with a paged KV cache")
    served = serve(trainer.model, corpus, config)

    report.plot_loss(history, out / "loss.png")
    report.plot_comparison(rows, out / "comparison.png")
    (out / "sample.txt").write_text(served.pop("sample"))
    results = {
        "machine": machine,
        "config": asdict(config),
        "documents": text,
        "comparison": [asdict(row) for row in rows],
        "training": asdict(history),
        "serving": served,
        "seconds": perf_counter() - began,
    }
    report.write_json(results, out / "results.json")
    heading(f"Done in {results['seconds']:.0f} s")
    for name in ("loss.png", "comparison.png", "sample.txt", "results.json"):
        print(f"  {out / name}")


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
    services = [(row.call, row.backend, row.reason) for row in backends.describe()]
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


def describe_history(history: History) -> str:
    return (
        f"{len(history.losses)} steps, {history.tokens[-1]:,} bytes of text in "
        f"{history.seconds:.0f} s = {history.tokens[-1] / history.seconds:,.0f} tokens/s; held-out "
        f"loss {history.heldout_losses[0]:.2f} -> {history.heldout_losses[-1]:.2f} nats per byte"
    )


def serve(model: ByteGPT, corpus: data.Corpus, config: Config) -> dict:
    """Finish prompts of very different lengths: short beginnings and halves of held-out texts."""
    server = Server(model, config)
    halves = [document[: document.shape[0] // 2] for document in corpus.heldout[:5]]
    requests = server.run([*map(data.encode, PROMPTS), *halves])
    gap = largest_difference(model, requests)
    served = server.served
    rereading = seconds_without_cache(model, requests[: config.serve_rows])
    decode = served.decode_tokens / served.decode_seconds
    cached_step = served.decode_seconds / served.decode_steps
    lengths = [request.prompt.shape[0] for request in requests]
    sample = write_sample(requests)
    print(sample)
    page_bytes = 2 * server.cache.k[:, 0].nbytes
    dense_pages = config.serve_rows * -(-server.cache.max_seqlen // config.page_size)
    print(
        f"{len(requests)} prompts of {min(lengths)} to {max(lengths)} bytes over "
        f"{config.serve_rows} rows: prefill {served.prefill_tokens / served.prefill_seconds:,.0f} "
        f"tokens/s, decoding {decode:,.0f} tokens/s ({cached_step * 1e3:.0f} ms a step; without a "
        f"cache {rereading * 1e3:.0f} ms)\n"
        f"pages of {config.page_size} tokens: at most {served.most_pages} of {config.pool_pages} "
        f"used = {served.most_pages * page_bytes / 2**20:.1f} MiB; a dense cache for as many rows "
        f"takes {dense_pages * page_bytes / 2**20:.1f} MiB\n"
        f"largest difference to the logits of one full forward pass: {gap:.1e}"
    )
    return {
        **asdict(served),
        "decode_tokens_per_second": decode,
        "seconds_per_step_without_cache": rereading,
        "page_bytes": page_bytes,
        "dense_pages": dense_pages,
        "largest_logit_difference": gap,
        "sample": sample,
    }


def write_sample(requests: list[Request]) -> str:
    """Prompt and continuation of each request, set off by a bar."""
    return "\n".join(f"{show(request.prompt)}|{request.text}\n" for request in requests)


def show(prompt: Tensor, longest: int = 60) -> str:
    text = data.decode(prompt.tolist())
    return text if len(text) <= longest else f"[{len(text)} bytes] ...{text[-longest:]}"


if __name__ == "__main__":
    main()

"""The parts of examples/byte_gpt on a tiny model and little text."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch

import flash8
from repository import ROOT

pytest.importorskip("tqdm", reason="the demo needs flash8[demo]")
pytest.importorskip("matplotlib", reason="the demo needs flash8[demo]")

FOLDER = ROOT / "examples" / "byte_gpt"


@pytest.fixture(scope="module")
def demo():
    """The script; its siblings hang off it."""
    return importlib.import_module("demo")


@pytest.fixture(scope="module")
def config(demo):
    return demo.QUICK


@pytest.fixture(scope="module")
def corpus(demo, config):
    return demo.data.load_corpus(
        config.corpus_bytes, config.heldout_bytes, config.longest_document, config.seed
    )


@pytest.fixture
def batches(demo, corpus, config):
    return list(islice(demo.data.batches(corpus.train, config.batch_tokens, config.seed), 3))


def test_corpus_is_whole_documents_of_many_lengths(demo, corpus, config):
    lengths = [document.shape[0] for document in (*corpus.train, *corpus.heldout)]
    assert config.corpus_bytes <= sum(lengths) < 2 * config.corpus_bytes
    assert max(lengths) == config.longest_document + 1
    assert min(lengths) >= demo.data.SHORTEST
    for document in corpus.train:
        assert document[0] == demo.data.END
        whole = document[-1] == demo.data.END
        assert whole or document.shape[0] == config.longest_document + 1
        assert (document[1:-1] != demo.data.END).all()
    seen = {document.numpy().tobytes() for document in corpus.train}
    shared = [d for d in corpus.heldout if d.numpy().tobytes() in seen]
    assert len(shared) < 0.05 * len(corpus.heldout)  # files may share short functions


def test_batches_hold_whole_documents_and_shifted_targets(demo, corpus, batches, config):
    known = {tuple(document.tolist()) for document in corpus.train}
    for batch in batches:
        assert 0 < batch.tokens <= config.batch_tokens
        bounds = batch.cu_seqlens.tolist()
        for low, high in zip(bounds, bounds[1:], strict=False):
            tokens = (*batch.inputs[low:high].tolist(), int(batch.targets[high - 1]))
            assert tokens in known
        inputs, places = batch.padded()
        assert inputs.shape == (len(bounds) - 1, batch.max_seqlen)
        assert torch.equal(inputs.flatten()[places], batch.inputs)


def test_once_holds_every_document_once(demo, corpus, config):
    batches = demo.data.once(corpus.heldout, config.batch_tokens)
    assert sum(b.cu_seqlens.numel() - 1 for b in batches) == len(corpus.heldout)
    assert sum(b.tokens for b in batches) == sum(d.shape[0] - 1 for d in corpus.heldout)


def test_variants_have_the_same_loss_and_gradients(demo, batches, config):
    trainers = [demo.Trainer(config, variant) for variant in demo.VARIANTS.values()]
    with torch.no_grad():
        for trainer in trainers:  # the head starts at zero and would hide the rest
            torch.manual_seed(3)
            trainer.model.head.weight.normal_(std=0.1)
    results = []
    for trainer in trainers:
        loss = trainer._loss(batches[0])
        loss.backward()
        gradients = [parameter.grad for parameter in trainer.model.parameters()]
        results.append([loss.detach(), *gradients])
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_training_learns(demo, corpus, config):
    trainer = demo.Trainer(config, demo.VARIANTS["packed"])
    longer = dataclasses.replace(config, most_steps=20, train_seconds=1e6)
    (history,) = demo.train([trainer], corpus, longer)
    assert history.heldout_losses[0] == pytest.approx(math.log(256), abs=1e-3)
    assert history.heldout_losses[-1] < 3.9
    assert len(history.losses) == len(history.tokens) == 20
    assert history.heldout_tokens[-1] == history.tokens[-1]


def test_training_stops_in_time(demo, corpus, config):
    trainer = demo.Trainer(config, demo.VARIANTS["packed"])
    (history,) = demo.train([trainer], corpus, dataclasses.replace(config, train_seconds=1e-6))
    assert len(history.losses) == 1
    assert len(history.heldout_losses) == 2


def train_as(precision, demo, corpus, config, steps=40):
    trainer = demo.Trainer(config, demo.PRECISIONS[precision])
    longer = dataclasses.replace(config, most_steps=steps, train_seconds=1e6)
    (history,) = demo.train([trainer], corpus, longer)
    return history


@pytest.fixture(scope="module")
def wide(demo, corpus, config):
    return train_as("bf16", demo, corpus, config)


def test_fp8_forward_trains_within_one_percent_of_bf16(demo, corpus, config, wide):
    narrow = train_as("fp8", demo, corpus, config)
    assert wide.tokens == narrow.tokens
    assert wide.losses[-1] != narrow.losses[-1]
    assert wide.heldout_losses[-1] < 3.4
    assert abs(demo.loss_gap(narrow, wide)) < config.largest_loss_gap == 0.01


@pytest.mark.parametrize("forgotten", ["k", "v"])
def test_fp8_without_a_descale_ends_further_away(
    demo, corpus, config, wide, monkeypatch, forgotten
):
    import model

    class Broken(flash8.fp8.CurrentScaling):
        def quantize(self, name, x, cu_seqlens):
            scaled = super().quantize(name, x, cu_seqlens)
            if name != forgotten:
                return scaled
            return dataclasses.replace(scaled, descale=torch.ones_like(scaled.descale))

    monkeypatch.setattr(model.FP8MHA, "recipe", Broken())
    narrow = train_as("fp8", demo, corpus, config)
    assert demo.loss_gap(narrow, wide) > 5 * config.largest_loss_gap


def test_muon_steps_by_orthogonal_matrices(demo):
    from muon import Muon, orthogonalised

    for shape in ((8, 24), (24, 8), (16, 16)):
        singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert singular.min() > 0.2
        assert singular.median() > 0.7
        assert singular.max() < 1.3
    parameter = torch.nn.Parameter(torch.zeros(8, 8))
    parameter.grad = torch.eye(8) * 1e-4
    Muon([parameter], lr=0.5).step()
    assert (parameter.diagonal() < -0.3).all()


def test_serving_is_the_full_forward_and_gives_pages_back(demo, corpus, config):
    torch.manual_seed(0)
    model = demo.ByteGPT(config)
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)
    server = demo.Server(model, config, demo.caches.paged_cache(config, torch.float32))
    lengths = (4, 47, 20, 33, 16)
    prompts = [text[:length] for text, length in zip(corpus.heldout, lengths, strict=False)]
    requests = server.run(prompts)
    for request, prompt in zip(requests, prompts, strict=True):
        assert torch.equal(request.prompt, prompt)
        assert request.finished or len(request.written) == config.new_tokens
    assert demo.largest_difference(model, requests) < 1e-4
    assert server.cache.allocator.num_used == 0
    assert server.cache.num_sequences == 0
    assert server.served.most_rows == config.serve_rows
    assert server.served.prefill_tokens == sum(prompt.shape[0] for prompt in prompts)


def test_serving_waits_for_pages(demo, config):
    tight = dataclasses.replace(config, pool_pages=3, serve_rows=3)
    cache = demo.caches.paged_cache(tight, torch.float32)
    server = demo.Server(demo.ByteGPT(tight), tight, cache)
    requests = server.run([demo.data.encode("x" * 20)] * 3)
    assert all(request.written for request in requests)
    assert server.served.most_rows == 1
    with pytest.raises(ValueError, match="does not fit the cache"):
        server.run([demo.data.encode("x" * 60)])


def test_e4m3_cache_has_descales_and_half_the_bytes(demo, corpus, config):
    torch.manual_seed(0)
    model = demo.ByteGPT(config, demo.BF16MHA)
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)
    wide = demo.caches.paged_cache(config, torch.bfloat16)
    narrow = demo.caches.e4m3_cache(model, config, corpus.train)
    assert narrow.k.nbytes * 2 == wide.k.nbytes
    assert narrow.k_descale.shape == (config.layers, config.heads)
    losses = [
        demo.caches.loss_through(cache, model, config, corpus.heldout, "")
        for cache in (wide, narrow)
    ]
    assert wide.num_sequences == narrow.num_sequences == 0
    saturated = [(x.float().abs() == 448).double().mean() for x in (narrow.k, narrow.v)]
    assert max(saturated) < 1e-3
    length = config.cached_tokens
    texts = [text[: length + 1] for text in corpus.heldout if text.shape[0] > length]
    exact = demo.Trainer(config, demo.VARIANTS["packed"])
    exact.model.load_state_dict(model.state_dict())
    want = exact.evaluate([demo.data.make_batch(texts[: config.serve_rows])])
    assert losses[0] == pytest.approx(want, rel=1e-3)
    assert 0 < abs(losses[1] / losses[0] - 1) < 0.01


def test_measuring_in_a_process_of_its_own(demo, batches, config, tmp_path):
    inputs, result = tmp_path / "batches.pt", tmp_path / "result.json"
    demo.save_batches(batches, inputs)
    command = [sys.executable, str(FOLDER / "measure.py"), "packed", str(inputs), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--quick"], check=True, capture_output=True, env=environment)
    row = demo.Measurement(**json.loads(result.read_text()))
    assert row.real_tokens == row.computed_tokens == sum(b.tokens for b in batches[1:])
    assert row.peak_mib > 0
    trainer = demo.Trainer(config, demo.VARIANTS["packed"])
    expected = [trainer.step(batch) for batch in batches]
    assert row.losses == pytest.approx(expected, abs=1e-3)


def test_whole_run_writes_its_files(demo, config, tmp_path, monkeypatch, capsys):
    import measure

    def compare_here(corpus, config, out, quick):
        batches = demo.data.batches(corpus.train, config.batch_tokens, config.seed)
        batches = list(islice(batches, config.compare_steps + 1))
        return [
            demo.Measurement(
                **measure.measure(name, batches, demo.Trainer(config, variant), baseline=0.0)
            )
            for name, variant in demo.VARIANTS.items()
        ]

    monkeypatch.setattr(demo, "compare", compare_here)
    monkeypatch.setattr(demo, "use_all_cores", torch.get_num_threads)
    demo.run(config, tmp_path, quick=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["variant"] for row in results["comparison"]] == list(demo.VARIANTS)
    assert abs(results["fp8_loss_gap"]) < config.largest_loss_gap
    wide, narrow = results["serving"]["bf16"], results["serving"]["e4m3"]
    assert wide["largest_logit_difference"] < narrow["largest_logit_difference"] < 0.2
    assert abs(narrow["heldout_loss"] / wide["heldout_loss"] - 1) < 0.01
    for name in ("loss.png", "comparison.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "def |" in (tmp_path / "sample.txt").read_text()
    printed = capsys.readouterr().out
    for text in ("flash8, packed against unfused, padded", "backend", "FP8 forward", "e4m3 cache"):
        assert text in printed


def test_a_run_fails_where_fp8_ends_away_from_bf16(demo, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "compare", lambda *_: [])
    monkeypatch.setattr(demo.report, "plot_comparison", lambda *_: None)
    monkeypatch.setattr(demo.report, "verdict", lambda *_: "")
    monkeypatch.setattr(demo.report, "table", lambda *_: "")
    monkeypatch.setattr(demo, "serve_both", lambda *_: ({}, ""))
    monkeypatch.setattr(demo, "use_all_cores", torch.get_num_threads)
    strict = dataclasses.replace(config, largest_loss_gap=1e-9, most_steps=3)
    with pytest.raises(SystemExit, match="away from bf16's held-out loss, more than 0%"):
        demo.run(strict, tmp_path, quick=True)
    assert (tmp_path / "results.json").exists()


def test_verdict_says_which_way_it_fell(demo):
    def row(variant, seconds, peak):
        label = demo.VARIANTS[variant].label
        return demo.Measurement(variant, label, 100, 100, seconds, peak, [1.0])

    text = demo.report.verdict([row("packed", 2.0, 10), row("padded", 4.0, 40), row("torch", 1, 5)])
    assert "flash8, packed against flash8, padded: 2.0 x faster, 4.0 x less memory" in text
    assert "flash8, packed against torch SDPA, padded: 2.0 x slower, 2.0 x more memory" in text
    assert "on equal (padded) terms flash8 is 4.0 x slower" in text

"""The parts of examples/byte_gpt on a tiny model and little text."""

import dataclasses
import importlib
import json
import math
import os
import random
import subprocess
import sys

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


@pytest.fixture
def batches(demo, config):
    source = random.Random(config.seed)
    sizes = (config.batch_tokens, config.shortest, config.longest)
    return [demo.data.next_batch(source, *sizes) for _ in range(3)]


def test_the_language_has_a_word_for_every_byte_and_topic(demo):
    data = demo.data
    assert len(set(data.WORDS)) == len(data.WORDS) <= 256
    assert {len(words) for words in data.TOPICS.values()} == {len(data.TOPICS)} == {12}
    text = " ".join(data.WORDS[2:])
    assert data.decode(list(range(2, len(data.WORDS)))) == text


def test_summaries_follow_from_reports(demo, config):
    """Every topic has one word in the report, which the summary has behind the topic."""
    data = demo.data
    for document in data.documents(7, 50, config.shortest, 4 * config.longest):
        tokens = document.tokens.tolist()
        assert config.shortest <= len(tokens) <= 4 * config.longest
        report, answer = tokens[1 : document.prompt_length - 1], document.answer
        assert tokens[0] == answer[-1] == data.END
        assert tokens[document.prompt_length - 1] == data.SUMMARY
        named = [data.WORDS[token] for token in report]
        summary = [data.WORDS[token] for token in answer[:-1]]
        assert summary[::2] == list(data.TOPICS)
        for topic, word in zip(summary[::2], summary[1::2], strict=True):
            assert [x for x in named if x in data.TOPICS[topic]] == [word]
    assert data.documents(7, 1, 48, 64)[0].answer != data.documents(8, 1, 48, 64)[0].answer


def test_batches_hold_whole_documents_and_the_targets_of_summaries(demo, batches, config):
    data = demo.data
    for batch in batches:
        assert 0 < batch.tokens <= config.batch_tokens
        bounds = batch.cu_seqlens.tolist()
        for low, high in zip(bounds, bounds[1:], strict=False):
            inputs, targets = batch.inputs[low:high], batch.targets[low:high]
            prompt = inputs.tolist().index(data.SUMMARY) + 1
            assert (targets[: prompt - 1] == -100).all()
            assert torch.equal(targets[prompt - 1 : -1], inputs[prompt:])
            assert targets[-1] == data.END
            assert data.is_answer(targets).sum() == len(data.TOPICS)
        inputs, places = batch.padded()
        assert inputs.shape == (len(bounds) - 1, batch.max_seqlen)
        assert torch.equal(inputs.flatten()[places], batch.inputs)


def test_once_holds_every_document_once(demo, config):
    chosen = demo.data.documents(3, 9, config.shortest, config.longest)
    batches = list(demo.data.once(chosen, 150))
    assert len(batches) > 1
    assert sum(b.cu_seqlens.numel() - 1 for b in batches) == len(chosen)
    assert torch.equal(
        torch.cat([b.inputs for b in batches]), torch.cat([d.tokens[:-1] for d in chosen])
    )


def test_documents_grow_while_a_run_lasts(demo):
    full = demo.FULL
    longest = [full.longest_at(done / 10) for done in range(11)]
    assert longest == sorted(longest)
    assert longest[:6] == [full.first_longest] * 6 and longest[9:] == [full.longest] * 2


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


#: Steps after which most words are right; fewer tokens do where all documents are short.
LEARNT = {"steps": 160, "batch_tokens": 768, "matrix_rate": 0.04, "other_rate": 0.02}


def train_as(precision, demo, config, **changes):
    longer = dataclasses.replace(config, **LEARNT | changes)
    trainer = demo.Trainer(longer, demo.PRECISIONS[precision])
    (history,) = demo.train([trainer], longer)
    return history


@pytest.fixture(scope="module")
def wide(demo, config):
    return train_as("bf16", demo, config)


def test_training_learns(wide):
    assert len(wide.losses) == len(wide.tokens) == LEARNT["steps"]
    assert wide.heldout_tokens[-1] == wide.tokens[-1]
    assert wide.heldout_losses[0] == pytest.approx(math.log(256), abs=1e-3)
    assert wide.heldout_accuracies[0] < 0.05
    assert wide.heldout_accuracies[-1] > 0.9


def test_fp8_forward_learns_as_bf16_does(demo, config, wide):
    narrow = train_as("fp8", demo, config)
    assert wide.tokens == narrow.tokens
    assert wide.losses[-1] != narrow.losses[-1]
    assert abs(demo.accuracy_gap(narrow, wide)) < 0.04


@pytest.mark.parametrize("forgotten", ["k", pytest.param("v", marks=pytest.mark.slow)])
def test_fp8_without_a_descale_ends_further_away(demo, config, wide, monkeypatch, forgotten):
    import model

    class Broken(flash8.fp8.CurrentScaling):
        def quantize(self, name, x, cu_seqlens):
            scaled = super().quantize(name, x, cu_seqlens)
            if name != forgotten:
                return scaled
            return dataclasses.replace(scaled, descale=torch.ones_like(scaled.descale))

    monkeypatch.setattr(model.FP8MHA, "recipe", Broken())
    narrow = train_as("fp8", demo, config)
    assert demo.accuracy_gap(narrow, wide) < -0.2


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


@pytest.fixture
def model(demo, config):
    torch.manual_seed(0)
    model = demo.ByteGPT(config, demo.BF16MHA)
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)
    return model


def test_serving_is_the_full_forward_and_gives_pages_back(demo, config):
    torch.manual_seed(0)
    model = demo.ByteGPT(config)
    with torch.no_grad():
        model.head.weight.normal_(std=0.2)
    server = demo.Server(model, config, demo.caches.paged_cache(config, torch.float32))
    texts = demo.data.documents(3, 5, config.shortest, config.longest)
    requests = server.run(texts)
    for request, text in zip(requests, texts, strict=True):
        assert torch.equal(request.prompt, text.prompt)
        assert request.finished or len(request.written) == config.new_tokens
    assert demo.largest_difference(model, requests) < 1e-4
    assert server.cache.allocator.num_used == 0
    assert server.cache.num_sequences == 0
    assert server.served.most_rows == config.serve_rows
    assert server.served.prefill_tokens == sum(text.prompt_length for text in texts)


def test_serving_waits_for_pages(demo, model, config):
    tight = dataclasses.replace(config, pool_pages=4, serve_rows=3)
    cache = demo.caches.paged_cache(tight, torch.bfloat16)
    server = demo.Server(model, tight, cache)
    requests = server.run(demo.data.documents(3, 3, 48, 48))
    assert all(request.written for request in requests)
    assert server.served.most_rows == 1
    with pytest.raises(ValueError, match="does not fit the cache"):
        server.run(demo.data.documents(3, 1, 96, 96))


def test_what_counts_as_exact(demo):
    (text,) = demo.data.documents(3, 1, 60, 60)
    request = demo.Request(text, written=list(text.answer))
    assert request.is_exact and request.right_words == 12
    request.written[3] += 1  # a word
    assert not request.is_exact and request.right_words == 11
    request.written[2] += 1  # a topic
    assert request.right_words == 11
    request = demo.Request(text, written=text.answer[:-1])  # goes on
    assert not request.is_exact and request.right_words == 12


def test_reading_again_writes_what_a_server_does(demo, model, config):
    """As long as it is right: of random weights it is for no word."""
    texts = demo.data.documents(3, 4, config.shortest, config.longest)
    seconds, requests = demo.read_again(model, texts, 3)
    assert seconds > 0 and len(requests) == 4
    cache = demo.caches.paged_cache(config, torch.bfloat16)
    served = demo.Server(model, config, cache).run(texts)
    for again, request, text in zip(requests, served, texts, strict=True):
        assert len(again.written) == len(text.answer)
        assert again.written[0] == request.written[0]


def test_e4m3_cache_has_descales_and_half_the_bytes(demo, model, config):
    texts = demo.data.documents(3, 3, config.shortest, config.longest)
    wide = demo.caches.paged_cache(config, torch.bfloat16)
    narrow = demo.caches.e4m3_cache(model, config, texts)
    assert narrow.k.nbytes * 2 == wide.k.nbytes
    assert narrow.k_descale.shape == (config.layers, config.heads)
    written = [demo.Server(model, config, cache).run(texts) for cache in (wide, narrow)]
    assert wide.num_sequences == narrow.num_sequences == 0
    saturated = [(x.float().abs() == 448).double().mean() for x in (narrow.k, narrow.v)]
    assert max(saturated) < 1e-3
    differences = [demo.largest_difference(model, requests) for requests in written]
    assert differences[0] < differences[1] < 0.5


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

    def compare_here(config, out, quick):
        batches = demo.batches_to_compare(config)
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
    assert abs(results["fp8_accuracy_gap"]) < config.largest_accuracy_gap
    without, wide, narrow = (results["serving"][name] for name in ("none", "bf16", "e4m3"))
    assert without["words"] == wide["words"] == 12 * config.serve_texts
    assert wide["largest_logit_difference"] < narrow["largest_logit_difference"] < 0.2
    assert wide["most_bytes"] == 2 * narrow["most_bytes"]
    for name in ("training.png", "comparison.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| summary: animal" in (tmp_path / "sample.txt").read_text()
    printed = capsys.readouterr()
    for text in ("flash8, packed against unfused, padded", "backend", "FP8 forward", "e4m3"):
        assert text in printed.out
    assert printed.err == ""  # no bars where there is no terminal


def test_a_run_fails_where_fp8_ends_away_from_bf16(demo, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "compare", lambda *_: [])
    monkeypatch.setattr(demo.report, "plot_comparison", lambda *_: None)
    monkeypatch.setattr(demo.report, "verdict", lambda *_: "")
    monkeypatch.setattr(demo.report, "table", lambda *_: "")
    monkeypatch.setattr(demo, "serve_all", lambda *_: ({}, ""))
    monkeypatch.setattr(demo, "use_all_cores", torch.get_num_threads)
    monkeypatch.setattr(demo, "accuracy_gap", lambda *_: -0.02)
    short = dataclasses.replace(config, steps=3)
    with pytest.raises(SystemExit, match="right words beside bf16, more than 1% away"):
        demo.run(short, tmp_path, quick=True)
    assert (tmp_path / "results.json").exists()


def test_verdict_says_which_way_it_fell(demo):
    def row(variant, seconds, peak):
        label = demo.VARIANTS[variant].label
        return demo.Measurement(variant, label, 100, 100, seconds, peak, [1.0])

    text = demo.report.verdict([row("packed", 2.0, 10), row("padded", 4.0, 40), row("torch", 1, 5)])
    assert "flash8, packed against flash8, padded: 2.0 x faster, 4.0 x less memory" in text
    assert "flash8, packed against torch SDPA, padded: 2.0 x slower, 2.0 x more memory" in text
    assert "on equal (padded) terms flash8 is 4.0 x slower" in text

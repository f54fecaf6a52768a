"""examples/serving: its tokens are those of `generate`, in steps that a CUDA graph could replay."""

import importlib.util
import sys
from collections import Counter

import pytest
import torch

from asked_kernels import asked_kernels
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.variants import ForwardVariant
from repository import ROOT

transformers = pytest.importorskip("transformers", reason="needs flash8[transformers]")

SCRIPT = ROOT / "examples" / "serving" / "server.py"
VOCABULARY = 64
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=5),
}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("server", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["server"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def new_model(family="llama", dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for texts that do not repeat
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def new_requests(example):
    """More than run at once, with prompts of less and more than a page."""
    lengths = [(19, 6), (2, 9), (33, 4), (16, 1), (7, 8), (30, 5)]
    torch.manual_seed(1)
    return [example.Request(torch.randint(2, VOCABULARY, (n,)).tolist(), m) for n, m in lengths]


def serve(example, model, requests, **options):
    server = example.Server(model, **dict(slots=3, num_pages=7, max_seqlen=40) | options)
    server.run(requests)
    assert server.cache.allocator.num_used == server.cache.num_sequences == 0
    return [request.written for request in requests]


def generated(model, requests, eos_token_id=None):
    model.set_attn_implementation("eager")
    return [
        model.generate(
            torch.tensor([request.prompt]),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=eos_token_id,
        )[0, len(request.prompt) :].tolist()
        for request in requests
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_are_those_of_generate(example, family):
    model, requests = new_model(family), new_requests(example)
    written = serve(example, model, requests, prefill_tokens=24)
    assert written == generated(model, requests)
    assert len({token for tokens in written for token in tokens}) > 8


def test_a_request_ends_with_the_end_token(example):
    model, requests = new_model(), new_requests(example)
    end = generated(model, requests)[1][3]
    written = serve(example, model, requests, eos_token_id=end)
    assert written == generated(model, requests, end)
    assert len(written[1]) <= 4


def test_steps_of_decoding_are_shaped_for_a_graph(example):
    """One set of shapes and addresses, whoever runs; idle slots append nothing."""
    model, seen, idle = new_model(), Counter(), 0
    server = example.Server(model, slots=3, num_pages=7, max_seqlen=40)
    decode = server.decode

    def spy():
        nonlocal idle
        step = server.step
        given = (server.tokens, step.cache_seqlens, step.cache_batch_idx, step.page_table)
        seen[tuple((x.data_ptr(), x.shape, x.stride()) for x in given)] += 1
        running = len(server.running)
        idle += 3 - running
        assert step.cache_batch_idx.tolist() == [*range(running), *[-1] * (3 - running)]
        return decode()

    server.decode = spy
    server.run(new_requests(example))
    assert len(seen) == 1 and sum(seen.values()) > 8
    assert idle > 0


def test_an_e4m3_cache(example):
    """What is served beside a request changes nothing; e4m3 changes the logits a little."""
    model, requests = new_model(), new_requests(example)
    with torch.no_grad():  # the same model, whose K and V e4m3 has no bits for without descales
        for layer in model.model.layers:
            attention = layer.self_attn
            for small, large in (("k_proj", "q_proj"), ("v_proj", "o_proj")):
                getattr(attention, small).weight.mul_(2**-12)
                getattr(attention, large).weight.mul_(2**12)
    options = example.e4m3_cache(model, requests[0].prompt)
    together = serve(example, model, requests, **options)
    for request in requests:
        request.written = []
    alone = serve(example, model, requests, slots=1, **options)
    assert together == alone
    server = example.Server(model, slots=3, num_pages=7, max_seqlen=40, **options)
    assert server.cache.k.dtype == torch.float8_e4m3fn
    logits = []
    for cache in ({}, options):
        server = example.Server(model, slots=3, num_pages=7, max_seqlen=40, **cache)
        request = new_requests(example)[2]
        request.row = server.cache.add_sequence()
        server.running = [request]
        with torch.no_grad():
            request.written = server._prefill([request]).tolist()
            server._fill_slots()
            logits.append(
                model(
                    server.tokens,
                    position_ids=server.step.cache_seqlens[:, None].long(),
                    step=server.step,
                    use_cache=False,
                ).logits[0, 0]
            )
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 1e-4 < error < 0.1


def test_what_has_no_room_is_refused(example):
    with pytest.raises(ValueError, match="no room for more than 40 tokens"):
        serve(example, new_model(), [example.Request([5] * 30, 12)])


def test_which_kernels_it_reaches(example, monkeypatch):
    """Prefill: the forward that reads pages. Decoding: the append and the decode kernel."""
    model = new_model(dtype=torch.bfloat16)
    requests = [r for r in new_requests(example) if len(r.prompt) > 16]  # rows for the forward
    with asked_kernels(monkeypatch) as asked:
        serve(example, model, requests)
    assert {v.name for v in asked if isinstance(v, ForwardVariant)} == {
        "forward_bf16_d64_causal_packgqa_paged"
    }
    assert {v.name for v in asked if isinstance(v, DecodeVariant)} == {"decode_bf16_d64_rows8"}
    assert any(isinstance(v, AppendVariant) for v in asked)


@pytest.mark.parametrize("cache", ["model", "e4m3"])
def test_the_script_runs(example, cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["server.py", "--cache", cache])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split("->")[1].split()) for line in lines] == [16] * 6

"""transformers' continuous batching and caches: tokens, and the kernels that they reach."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed: flash8[transformers]")

from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
)
from transformers.generation.continuous_batching import initialization
from transformers.generation.continuous_batching.model_runner import ModelRunner

from asked_kernels import asked_kernels
from flash8 import backends, flash_attn_func
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.integrations import transformers as flash8_transformers
from flash8.integrations.transformers import continuous
from flash8.integrations.transformers.attention import attend
from simulated_device import SimulatedDevice, missing_compiler
from transformers_sizes import SIZES, VOCABULARY

NEW_TOKENS = 8
LOGPROBS = dict(rtol=1e-4, atol=1e-5)
HYBRID = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "gemma2": Gemma2Config(**SIZES, **HYBRID, attn_logit_softcapping=3.0, query_pre_attn_scalar=24),
    "gpt_oss": GptOssConfig(
        **SIZES,
        **HYBRID,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters=dict(rope_type="default", rope_theta=1e4),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def name():
    return flash8_transformers.register()


def new_model(family, implementation, dtype=torch.float32):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # away from initial zeros and ones: sinks, norms
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def prompts():
    """Of several pages, and of less than one."""
    return [torch.randint(2, VOCABULARY, (n,)).tolist() for n in (21, 3, 9, 14)]


def settings(**changes):
    """Pages of 4 tokens; 16 tokens a step, so that the longest prompt comes in two pieces, the
    second one beside tokens of other requests."""
    return ContinuousBatchingConfig(
        **dict(page_size=4, num_blocks=64, max_batch_tokens=16, return_logprobs=True) | changes
    )


GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def served(model, requests, **changes):
    """Tokens and their log probabilities, of `generate_batch`."""
    results = model.generate_batch(
        requests, generation_config=GREEDY, continuous_batching_config=settings(**changes)
    )
    assert len(results) == len(requests)
    results = [results[f"req_{i}"] for i in range(len(requests))]
    assert [r.error for r in results] == [None] * len(requests)
    return [r.generated_tokens for r in results], torch.tensor([r.logprobs for r in results])


def generated(model, requests):
    """The same of `generate`, for each request alone."""
    tokens, logprobs = [], []
    for request in requests:
        result = model.generate(
            torch.tensor([request]),
            generation_config=GREEDY,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(result.sequences[0, len(request) :].tolist())
        chosen = torch.stack(result.logits)[:, 0].log_softmax(-1)
        logprobs.append(chosen.gather(1, torch.tensor(tokens[-1])[:, None])[:, 0])
    return tokens, torch.stack(logprobs)


@pytest.fixture
def block_tables(monkeypatch):
    """Steps of one token each come with a block table, for which transformers wants a GPU."""
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(initialization, "torch", SimpleNamespace(cuda=cuda))


def check_same(ours, theirs):
    assert ours[0] == theirs[0]
    torch.testing.assert_close(ours[1], theirs[1], **LOGPROBS)


@pytest.mark.parametrize("family", CONFIGS)
def test_continuous_batching_gives_the_tokens_of_generate(family, name):
    theirs, ours = new_model(family, "eager"), new_model(family, name)
    requests = prompts()
    check_same(served(ours, requests), generated(theirs, requests))
    assert ours.config._attn_implementation == name  # as before


def test_steps_with_a_block_table_give_the_tokens_of_generate(name, block_tables, monkeypatch):
    theirs, ours = new_model("llama", "eager"), new_model("llama", name)
    calls = []

    def spy(q, *args, **options):
        calls.append(q.shape[:2])
        return real(q, *args, **options)

    real = continuous.flash_attn_with_kvcache
    monkeypatch.setattr(continuous, "flash_attn_with_kvcache", spy)
    requests = prompts()
    check_same(served(ours, requests, max_blocks_per_request=8), generated(theirs, requests))
    assert (4, 1) in calls


def test_shared_prefixes(name):
    theirs, ours = new_model("llama", "eager"), new_model("llama", name)
    first = prompts()[0]
    requests = [first, [*first[:12], 5, 6], first]
    check_same(served(ours, requests, max_batch_tokens=24), generated(theirs, requests))


def test_padded_steps(name, block_tables, monkeypatch):
    """Steps as CUDA graphs have them: tokens of no request behind those of the requests, requests
    without tokens, and slots to read that belong to nobody."""
    monkeypatch.setattr(ModelRunner, "pad_inputs", PadsInputs(), raising=False)
    theirs, ours = new_model("llama", "eager"), new_model("llama", name)
    requests = prompts()[:3]
    ours = served(
        *(ours, requests),
        max_blocks_per_request=8,
        max_requests_per_batch=4,
        q_padding_interval_size=8,
        kv_padding_interval_size=16,
    )
    check_same(ours, generated(theirs, requests))


class PadsInputs:
    """A True that cannot be set."""

    def __get__(self, instance, owner):
        return True

    def __set__(self, instance, value):
        pass


def names_of(variants, kind):
    return {variant.name for variant in variants if isinstance(variant, kind)}


def test_which_kernels_continuous_batching_reaches(name, block_tables, monkeypatch):
    """The begin of a prompt: the packed forward. The rest of it: the forward that reads pages. One
    token each: the append and decode."""
    model = new_model("llama", name, torch.bfloat16)
    requests = [torch.randint(2, VOCABULARY, (n,)).tolist() for n in (55, 3)]
    with asked_kernels(monkeypatch) as asked:
        served(model, requests, page_size=8, max_blocks_per_request=8, max_batch_tokens=32)
    packed = "forward_bf16_d64_causal_packgqa"
    assert names_of(asked, ForwardVariant) == {packed, packed + "_paged"}
    assert names_of(asked, DecodeVariant) == {"decode_bf16_d64_rows8"}
    assert names_of(asked, AppendVariant)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_which_kernels_generate_reaches(family, cache, name, monkeypatch):
    model = new_model(family, name, torch.bfloat16)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    with asked_kernels(monkeypatch) as asked:
        model.generate(
            torch.randint(2, VOCABULARY, (2, 20)),  # 40 rows of Q for a KV head
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            cache_implementation=cache,
        )
    layers = SIZES["num_hidden_layers"]
    kinds = [type(variant) for variant in asked]
    assert kinds == [ForwardVariant] * layers + [DecodeVariant] * layers * 3


def test_gradients_and_dropout_over_a_dynamic_cache():
    """As prefix tuning has them."""
    layer = SimpleNamespace(config=None, is_causal=True)
    q, k, v = torch.randn(1, 4, 3, 8), *torch.randn(2, 1, 2, 7, 8)
    grads = []
    for function in (
        lambda *x: attend(layer, *x, None)[0],
        lambda *x: flash_attn_func(*(y.transpose(1, 2) for y in x), causal=True),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        function(*leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(*grads)
    kept, _ = attend(layer, q, k, v, None)
    dropped, _ = attend(layer, q, k, v, None, dropout=0.5)
    assert not torch.allclose(kept, dropped)


def test_what_layers_share_is_made_again_for_a_cuda_graph(monkeypatch):
    """What was made before the capture would be that of one step in all replays."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    cache, q, step = SimpleCache(), SimpleNamespace(is_cuda=True), {}
    made = []

    def shared(step, index=0):
        allocator = SimpleNamespace(index=index)
        return continuous._once_a_step(cache, step, allocator, q, lambda: made.append(index) or ())

    for index in (0, 1, 0, 1):
        shared(step, index)
    assert made == [0, 1]
    capturing = True
    shared(step), shared(step)
    assert made == [0, 1, 0]
    shared({})
    assert made == [0, 1, 0, 0]


class SimpleCache:
    """Can be referred to weakly."""


def test_the_implementation_is_for_continuous_batching_only(name):
    model = new_model("llama", name)
    model.config._attn_implementation = continuous.PAGED_NAME
    with pytest.raises(ValueError, match=r"is for continuous batching \(generate_batch\)"):
        model(torch.tensor([[5, 6, 7]]))


def test_other_implementations_are_switched_as_before(name):
    model = new_model("llama", "eager")
    requests = prompts()[:2]
    assert served(model, requests)[0] == generated(model, requests)[0]
    assert model.config._attn_implementation == "eager"


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_continuous_batching_on_kernels(name, block_tables, monkeypatch):
    """On the simulated device: the log probabilities of the portable code, in bf16."""
    model = new_model("llama", name, torch.bfloat16)
    requests = [torch.randint(2, VOCABULARY, (n,)).tolist() for n in (27, 3)]
    options = dict(page_size=8, max_blocks_per_request=8, max_batch_tokens=24)
    portable = served(model, requests, **options)

    def refuse(reason):
        raise AssertionError(reason)

    monkeypatch.setattr(backends, "tell_about_refusal", refuse)
    with SimulatedDevice().serving_cpu_tensors(monkeypatch):
        kernels = served(model, requests, **options)
    assert kernels[0] == portable[0]
    torch.testing.assert_close(kernels[1], portable[1], rtol=0.05, atol=0.05)

"""The demo's training on the kernels of the simulated device, step by step beside the CPU backend.

The bound on losses is the distance of the CPU backend's own from those of fp32 attention: what
rounding costs. A wrong scale of a gradient costs more.
"""

import dataclasses
import functools
import importlib
import random
from contextlib import contextmanager

import pytest
import torch

from defaults import by_default
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import kernels, mode
from flash8.nn import FlashMHA
from flash8.ops import plan_cache
from forward_cases import device
from simulated_device import missing_compiler

pytest.importorskip("tqdm", reason="the demo needs flash8[demo]")
pytest.importorskip("matplotlib", reason="the demo needs flash8[demo]")
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

STEPS, TOKENS, SHORTEST, LONGEST = 4, 400, 48, 200
CASES = ["bf16, packed", "bf16, dense", "FP8 forward, packed", "FP8 forward, dense"]
KEPT = CASES[:1]


@functools.cache
def demo():
    return importlib.import_module("demo")


@functools.cache
def config():
    """Heads of 64 channels, as many as the narrowest tiles have."""
    return dataclasses.replace(demo().QUICK, dim=128)


@functools.cache
def batches():
    """Documents of many lengths, the last block of queries and keys partly filled."""
    source = random.Random(1)
    return [demo().data.next_batch(source, TOKENS, SHORTEST, LONGEST) for _ in range(STEPS)]


def losses(attention, packed):
    """The loss before each step."""
    trainer = demo().Trainer(
        config(), importlib.import_module("train").Variant("", attention, packed)
    )
    with torch.no_grad():  # the head starts at zero, where the first step trains nothing else
        torch.manual_seed(3)
        trainer.model.head.weight.normal_(std=0.1)
    return torch.tensor([trainer.step(batch) for batch in batches()], dtype=torch.float64)


def split(case):
    """The attention of a case, and whether it is packed."""
    precision, layout = case.split(", ")
    labels = {variant.label: variant.attention for variant in demo().PRECISIONS.values()}
    return labels[precision], layout == "packed"


@functools.cache
def on_cpu(case):
    """The CPU backend's losses, and the largest distance from those of fp32 attention."""
    attention, packed = split(case)
    found = losses(attention, packed)
    return found, (found - losses(FlashMHA, packed)).abs().max().item()


@contextmanager
def served(monkeypatch, launch=hopper.launch):
    """Inside, kernels serve and nothing else may. Gives the list of backwards that were launched,
    by `launch`."""
    seen = []

    def refuse(reason):
        raise AssertionError(f"no kernel serves: {reason}")

    with device().serving_cpu_tensors(monkeypatch, seed=3), monkeypatch.context() as patch:
        patch.setattr(mode, "fall_back", refuse)
        patch.setattr(hopper, "launch", lambda *args: seen.append(1) or launch(*args))
        yield seen


def distance(case, monkeypatch, launch=hopper.launch):
    """Of the losses on kernels from the CPU backend's, as a share of what rounding costs."""
    expected, rounding = on_cpu(case)
    with served(monkeypatch, launch) as seen:
        found = losses(*split(case))
    assert len(seen) == STEPS * config().layers
    return (found - expected).abs().max().item() / rounding


@pytest.mark.parametrize("case", by_default(CASES, KEPT))
def test_losses_are_the_cpu_backends(case, monkeypatch):
    expected, rounding = on_cpu(case)
    assert rounding < 5e-3 * expected.max()
    assert distance(case, monkeypatch) < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_scale_of_gradients_is_seen(case, monkeypatch):
    """Of dQ and dK, and of the scores that they are made from."""

    def scaled(planned, stream):
        planned.call.scores.softmax_scale *= 1.3
        launch(planned, stream)

    launch = hopper.launch
    assert distance(case, monkeypatch, scaled) > 1.0


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The demo's precision there, a plan cache of the test's own, and no kernel wanted yet."""
    cache = plan_cache.new_plan_cache(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    monkeypatch.setattr(plan_cache, "_plan_cache", lambda: cache)
    monkeypatch.setattr(kernels, "_VARIANTS", {})
    train = importlib.import_module("train")
    monkeypatch.setattr(train, "mixed_precision", lambda _: torch.autocast("cpu", torch.bfloat16))
    return train


@pytest.mark.parametrize("count", by_default([1, 2], [1]))
def test_the_demo_trains_on_kernels_and_names_them(count, as_on_a_gpu, monkeypatch, capsys):
    """Two models in bf16, or one of them in FP8."""
    few = dataclasses.replace(
        config(), layers=1, steps=1, validations=1, batch_tokens=TOKENS, heldout_documents=1
    )
    with served(monkeypatch) as seen:
        precisions = list(demo().PRECISIONS.values())[:count] * (2 // count)
        trainers = [demo().Trainer(few, variant) for variant in precisions]
        for trainer in trainers:
            trainer.warm_up(batches()[0])
        _, found = demo().train_and_tell(trainers, few)
    assert len(seen) == 2 * 2 * few.layers
    forwards = ["forward_bf16_d64_causal", "forward_e4m3_d64_causal_headscales"]
    backwards = ["backward_bf16_d64_causal", "backward_bf16_d64_causal_fp8"]
    assert found["forward"] == forwards[:count] and found["backward"] == backwards[:count]
    assert bool(found["quantize"]) == (count == 2)
    printed = capsys.readouterr().out
    assert f"backward: {', '.join(found['backward'])}\n" in printed
    assert "Warning" not in printed
    assert printed.count("the CPU backend, no kernel") == 2 - count  # bf16 alone quantizes nothing


def test_a_demo_without_kernels_says_so(as_on_a_gpu, capsys):
    few = dataclasses.replace(config(), steps=1, validations=1, layers=1)
    trainers = [demo().Trainer(few, variant) for variant in demo().PRECISIONS.values()]
    _, found = demo().train_and_tell(trainers, few)
    assert found == {"forward": [], "backward": [], "quantize": []}
    assert "backward: the CPU backend, no kernel\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["packed", "padded"])
def test_what_the_demo_compares_trains_on_kernels(name, as_on_a_gpu, monkeypatch):
    trainer = demo().Trainer(config(), demo().VARIANTS[name])
    with served(monkeypatch) as seen:
        trainer.step(batches()[1])
    assert len(seen) == config().layers

"""Activation checkpointing on kernels: what is computed twice has the bits that it had."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from defaults import by_default
from flash8 import fp8_attention
from flash8.backends.hopper import backward as hopper
from flash8.nn import FlashMHA
from flash8.ops import plan_cache
from forward_cases import device, packed
from simulated_device import missing_compiler

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

#: Three blocks of keys, which add to one block of dQ; a tile with few rows; nothing.
LENGTHS = (300, 61, 0)
WAYS = [
    f"{kind}, {way}, {layout}"
    for kind in ("16 bits", "16 bits and dropout", "FP8 forward")
    for way in ("reentrant", "not reentrant")
    for layout in ("packed", "dense")
]
KEPT = ["16 bits, reentrant, dense", "16 bits, not reentrant, packed"]


class FP8MHA(FlashMHA):
    def attend(self, q, k, v, cu_seqlens, max_seqlen):
        return fp8_attention(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            causal=True,
            deterministic=self.deterministic,
        )


class Model(nn.Module):
    """Two layers, each of which may be computed again for the backward."""

    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(3)
        made = FP8MHA if kind == "FP8 forward" else FlashMHA
        options = {"num_heads_kv": 1, "head_dim": 128, "causal": True, **options}
        options.setdefault("dtype", torch.bfloat16)
        self.layers = nn.ModuleList(made(32, 2, **options) for _ in range(2))

    def forward(self, x, again=None, **sequences):
        for layer in self.layers:

            def block(x, layer=layer):
                return x + layer(x, **sequences)

            x = block(x) if again is None else checkpoint(block, x, **again)
        return x


def gradients(model, layout, again):
    """Of the parameters and the input, and the output."""
    torch.manual_seed(11)
    dtype = next(model.parameters()).dtype
    if layout == "packed":
        x = torch.randn(sum(LENGTHS), 32).to(dtype)
        sequences = {"cu_seqlens": packed(LENGTHS), "max_seqlen": max(LENGTHS)}
    else:
        x, sequences = torch.randn(1, LENGTHS[0], 32).to(dtype), {}
    x.requires_grad_()
    out = model(x, again, **sequences)
    out.float().square().mean().backward()
    found = [out.detach(), x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def on_kernels(monkeypatch, seed, *given):
    """`gradients` on the simulated device, from an empty plan cache."""
    cache = plan_cache.new_plan_cache(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    with device().serving_cpu_tensors(monkeypatch, seed=seed), monkeypatch.context() as patch:
        patch.setattr(plan_cache, "_plan_cache", lambda: cache)
        chosen, choose = [], hopper.choose_for

        def note(*args, **options):
            chosen.append(choose(*args, **options))
            return chosen[-1]

        patch.setattr(hopper, "choose_for", note)
        found = gradients(*given)
    assert chosen and all(variant.deterministic for variant in chosen)
    return found


def differences(found, expected):
    assert all(x.isfinite().all() for x in found)
    return [
        i for i, (x, y) in enumerate(zip(found, expected, strict=True)) if not torch.equal(x, y)
    ]


@needs_compiler
@pytest.mark.parametrize("way", by_default(WAYS, KEPT))
def test_gradients_have_the_bits_of_those_without(way, monkeypatch):
    """Under schedules of their own."""
    kind, again, layout = way.split(", ")
    dropout = 0.2 if kind.endswith("dropout") else 0.0
    model = Model(kind, deterministic=True, dropout=dropout)
    plain = on_kernels(monkeypatch, 1, model, layout, None)
    found = on_kernels(monkeypatch, 2, model, layout, {"use_reentrant": again == "reentrant"})
    assert differences(found, plain) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_planned_once(reentrant, fake, on_fake_driver, misses):
    gradients(Model("16 bits"), "packed", {"use_reentrant": reentrant})
    assert misses == ["launch"]
    names = [line.split()[0] for line in fake.launches]
    assert names.count("forward") == 4 and names.count("backward") == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layout", ["packed", "dense"])
def test_a_drawn_seed_of_dropout_is_drawn_again(layout, reentrant):
    """On the CPU backend."""
    model = Model("16 bits", dropout=0.3, dtype=torch.float32)
    plain = gradients(model, layout, None)
    assert differences(gradients(model, layout, {"use_reentrant": reentrant}), plain) == []
    careless = {"use_reentrant": reentrant, "preserve_rng_state": False}
    assert differences(gradients(model, layout, careless), plain)[0] == 1  # O is the same

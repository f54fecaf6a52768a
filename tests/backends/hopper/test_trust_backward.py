"""Sound kernels of the backward pass their check, and serve; wrong ones fail it, and the portable
code serves."""

import re

import pytest
import torch

from defaults import by_default
from flash8 import flash_attn_func
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper.backward_variants import SHIPPED_BACKWARDS, BackwardVariant
from flash8.backends.hopper.verify import backward as check_backward
from flash8.backends.hopper.verify import trust
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import Image, changed_image, told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
CAUSAL = BackwardVariant("bf16", 128, 128, mask="causal")
ORDERED = BackwardVariant("bf16", 128, 128, mask="causal", deterministic=True)
EVERYTHING = BackwardVariant("bf16", 64, 64, mask="local", softcap=True, alibi=True)
DROPPED = BackwardVariant("bf16", 128, 128, mask="causal", dropout=True)
OTHERS = (
    EVERYTHING,
    DROPPED,
    BackwardVariant("fp16", 128, 128, mask="causal", dq="reduced"),
    BackwardVariant("fp16", 64, 64, mask="causal"),  # the worst row of those in fp16
)


@pytest.mark.parametrize(
    "variant",
    by_default([*SHIPPED_BACKWARDS, *OTHERS], [CAUSAL, ORDERED]),
)
def test_sound_kernels_pass(variant, checked):
    with checked():
        assert trust.find_fault(variant, CPU) is None


# ------------------------------------------------------------------------------- wrong kernels


def draw(heads=(4, 2)):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, 70, n, 128, generator=g).bfloat16() for n in (*heads, heads[1])]


def trained(**options):
    """O and the gradients of a call."""

    def call():
        leaves = [x.requires_grad_() for x in draw()]
        sinks = torch.linspace(0.0, 3.0, 4, requires_grad=True)
        out = flash_attn_func(*leaves, pack_gqa=False, causal=True, s_aux=sinks, **options)
        (out.float().sin().sum()).backward()
        return [x.grad for x in (*leaves, sinks)]

    return call


PRE, POST = "backward/preprocess.cuh", "backward/postprocess.cu"
INSIDE, SCALED = "query < info.rows_q", "return dq[i]; }, r, params.scores.softmax_scale"
GROUP = "int const head = tile_.first_head + g;"
#: What is wrong: the file, what is replaced, by what, and words of what is found.
EDITS = {
    "no gradient of LSE": (PRE, "params_.dlse.ptr != nullptr", "false", "off"),
    "sums are not zeroed": (PRE, "        zero_dq();\n", "", "rows of dq are not written, or NaN"),
    "no scale": (POST, SCALED, "return dq[i]; }, r, 1.0f", "dq is off"),
    "unused rows unwritten": (POST, INSIDE, "query < info.seqlen_q", "of dq are not"),
    "mask off by one": (
        "backward/key_tile.cuh",
        "tile.diagonal = first_key - ",
        "tile.diagonal = first_key + 1 - ",
        "off|NaN",
    ),
    "another query head": (
        "backward/producer.cuh",
        GROUP,
        "int const head = tile_.head_kv + g * params_.heads_kv;",
        "off",
    ),
}
KEPT = ["no gradient of LSE", "sums are not zeroed", "unused rows unwritten"]


def image_of(folder, name) -> Image:
    """Only what the edit changes is compiled from it."""
    file, old, new, _ = EDITS[name]
    changed = changed_image(folder, (file, old, new))
    step = {PRE: "preprocess", POST: "postprocess"}.get(file, "kernel")

    def image(variant):
        source = variant.unit().source
        mine = source.parent.name == "backward" and source.stem == step
        return changed(variant) if mine else device().ptx(variant)

    return image


@pytest.mark.parametrize("name", by_default(EDITS, KEPT))
def test_wrong_kernels_fail_and_the_portable_code_serves(name, checked, tmp_path, monkeypatch):
    image = image_of(tmp_path, name)
    with checked(), monkeypatch.context() as patch:
        patch.setattr(hopper, "refusal", lambda *_: "only the forward is wanted")
        want = trained()()
    with checked(image):
        have, said = told(trained())
        _, more = told(trained())
    assert len(said) == 1 and not more
    assert f"its kernel {CAUSAL.name} on cpu: " in said[0] and "FLASH8_KERNELS" in said[0]
    assert re.search(EDITS[name][3], said[0]), said[0]
    for x, y in zip(have, want, strict=True):
        assert torch.equal(x, y)


def test_sound_kernels_serve_and_are_remembered(checked, monkeypatch):
    call = trained()
    want = call()
    seen, find_fault = [], trust.find_fault

    def seeing(variant, device):
        seen.append(variant.name)
        return find_fault(variant, device)

    monkeypatch.setattr(trust, "find_fault", seeing)
    with checked():
        have, said = told(call)
        call()
        assert device().report()["kernel"] == "flash8_backward_postprocess"
    assert not said and seen == ["forward_bf16_d128_causal", CAUSAL.name]
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x, y, atol=0.05, rtol=0.05)


def test_a_capture_wants_a_backward_before_it(checked, monkeypatch):
    with checked():
        out = flash_attn_func(*(x.requires_grad_() for x in draw()), causal=True)
        monkeypatch.setattr(trust, "is_captured", lambda device: True)
        with pytest.raises(RuntimeError, match=r"kernel backward_bf16_d128_causal has not .* once"):
            out.sum().backward()


def test_bounds_are_below_what_a_lost_gradient_costs():
    """A gradient of half the size is far outside of them."""
    want = check_backward.Gradients(*(torch.randn(40, 2, 8).double() for _ in range(4)))
    half = check_backward.Gradients(*(x / 2 for x in want))
    for variant in (CAUSAL, EVERYTHING):
        allowed = check_backward.bounds(variant)
        assert check_backward.compare(want, want, allowed) is None
        assert "dq is off by 0.5" in str(check_backward.compare(half, want, allowed))

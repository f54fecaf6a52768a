"""Sound decode kernels pass their check and serve; wrong ones fail it, and portable code serves."""

import pytest
import torch

from decode_cases import Cache, draw
from defaults import by_default
from flash8 import flash_attn_with_kvcache
from flash8.backends.hopper import decode
from flash8.backends.hopper.decode_variants import SHIPPED_DECODERS, DecodeVariant
from flash8.backends.hopper.verify import trust
from quantizer_device import device
from simulated_device import missing_compiler
from trust_cases import changed_image, told

pytest_plugins = ["trust_fixtures"]
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CPU = torch.device("cpu")
E8 = DecodeVariant("bf16", "e4m3", 128, 128, 8)
G8 = DecodeVariant("bf16", "e4m3", 128, 128, 8, load="gather")
K8 = DecodeVariant("bf16", "e4m3", 128, 128, 8, scales="key")
APPENDING = DecodeVariant("bf16", "e4m3", 128, 128, 8, append=True)
MODIFIED = DecodeVariant("fp16", "e4m3", 128, 128, 8, score_mod=True)
OTHERS = (
    MODIFIED,
    DecodeVariant("fp16", "e4m3", 64, 64, 16, load="gather"),
    DecodeVariant("fp16", "same", 96, 96, 32),
    DecodeVariant("bf16", "e4m3", 192, 128, 32, score_mod=True),
    DecodeVariant("bf16", "same", 256, 256, 16, load="gather", score_mod=True),
    DecodeVariant("fp16", "e4m3", 512, 512, 16, load="gather", score_mod=True),
    DecodeVariant("bf16", "same", 512, 512, 8),
    DecodeVariant("fp16", "same", 64, 512, 32, load="gather", score_mod=True, qv=True),
    DecodeVariant("fp16", "e4m3", 64, 64, 16, load="gather", score_mod=True, scales="key"),
    DecodeVariant("bf16", "e4m3", 256, 256, 16, scales="key"),
)
MLA = DecodeVariant("bf16", "e4m3", 64, 512, 16, qv=True)
DEFAULT = (*(v for v in SHIPPED_DECODERS if v.head_dim == 128), MODIFIED, MLA)


def faults(variant, checked, image=None):
    with checked(image):
        return trust.find_fault(variant, CPU)


@pytest.mark.parametrize("variant", by_default([*SHIPPED_DECODERS, *OTHERS], DEFAULT))
def test_a_sound_kernel_passes(variant, checked):
    assert faults(variant, checked) is None


SOFTMAX, MERGE, ROWS, WORK, LOADER = (
    f"decode/{name}.cuh" for name in ("softmax", "merge", "rows", "work", "loader")
)
SEEN = "bool const seen = position < end && position + keys > begin;"
#: What a kernel that ignores a parameter, or leaves its tickets, is found by.
WRONG = {
    "causal": (E8, (SOFTMAX, "key(i, h) < end &&", "true &&"), "row"),
    "leftpad": (E8, ("attention/seqlen_info.cuh", "begin + leftpad;", "begin;"), "row"),
    "sinks": (E8, (MERGE, "used && sinks != nullptr", "false"), "LSE"),
    "k_descale": (
        E8,
        (ROWS, "head_descale<Config>(params.k_descale, params.k_scale_rows, segment)", "0.03125f"),
        "LSE",
    ),
    "k_descale of keys": (
        K8,
        ("decode/key_scales.cuh", "checked_descale(tile.k[first + i])", "0.03125f"),
        "LSE",
    ),
    "v_descale of keys": (K8, ("decode/merge.cuh", "? sums.unit : 1.0f", "? 1.0f : 1.0f"), "O is"),
    "descales of qv": (MLA, (ROWS, "k_descale / v_descale;", "1.0f;"), "LSE"),
    "v_descale": (E8, (MERGE, "factor / total * descale", "factor / total"), "O is off"),
    "tickets": (
        E8,
        (MERGE, "ptx::store_relaxed(params_.tickets + first, 0);", ""),
        "its tickets are left",
    ),
    "new keys": (
        APPENDING,
        ("decode/new_keys.cuh", "            row.store(channel, made);\n", ""),
        "K cache differ",
    ),
    "positions of queries": (
        APPENDING,
        ("decode/new_keys.cuh", "NewToken::at(segment.batch, at.query)", "NewToken::at(0, 0)"),
        "LSE",
    ),
    "softcap": (MODIFIED, (SOFTMAX, "cap * ptx::tanh(value * per_cap)", "value"), "LSE"),
    "tree": (E8, (SOFTMAX, "params.tree_mask == nullptr || query", "true || query"), "LSE"),
    "a sequence's words of a tree": (
        E8,
        (SOFTMAX, "batch_q * params.tree_mask_stride", "batch_q * 0"),
        "LSE",
    ),
    "splits": (E8, (WORK, "of_split != 0 ? 1 : min(end", "false ? 1 : min(end"), ""),
    "order of splits": (
        E8,
        (
            MERGE,
            "float sum = 0.0f;\n            for (int part = 0; part < parts; ++part) {",
            "float sum = 0.0f;\n            for (int n = 0; n < parts; ++n) {\n"
            "                int const part = (n + static_cast<int>(gridDim.x)) % parts;",
        ),
        "depend on the number of CTAs",
    ),
    "a split left out": (E8, (MERGE, "? sequence.pieces :", "? sequence.pieces - 1 :"), ""),
    "leftpad by gather": (
        G8,
        ("attention/seqlen_info.cuh", "begin + leftpad;", "begin;"),
        "row",
    ),
    "slots before the window by gather": (G8, (LOADER, SEEN, SEEN.split(" &&")[0] + ";"), "NaN"),
    "slots after the last key by gather": (
        G8,
        (LOADER, SEEN, "bool const seen = position + keys > begin;"),
        "NaN",
    ),
    "freed pages by gather": (
        G8,
        ("attention/pages.cuh", "if (seen && index", "if (index"),
        (
            LOADER,
            "{exists ? place.page : params_.pages.num_pages,",
            "{static_cast<int>(static_cast<uint32_t>(place.page) % params_.pages.num_pages),",
        ),
        "NaN",
    ),
    "slopes": (MODIFIED, (ROWS, "scores.alibi_slopes == nullptr ?", "true ?"), "LSE"),
}


@pytest.mark.parametrize("name", by_default(WRONG, ["leftpad", "tree", "order of splits"]))
def test_a_kernel_that_ignores_something_fails(name, checked, tmp_path):
    variant, *edits, words = WRONG[name]
    fault = faults(variant, checked, changed_image(tmp_path, *edits))
    assert fault is not None and words in fault


def call_of(variant):
    call = draw(variant, (90, 0, 17), heads=8, heads_kv=2, cache=Cache(16))
    given = {"page_table": call.page_table, "cache_seqlens": call.indices["seqused_k"]}
    given |= {"k_descale": call.k_descale, "v_descale": call.v_descale}
    return lambda: flash_attn_with_kvcache(call.q, call.k, call.v, causal=True, **given)


def test_a_sound_kernel_serves_and_a_wrong_one_does_not(checked, monkeypatch):
    call, launches = call_of(E8), []
    portable = call()
    launch = decode.launch
    monkeypatch.setattr(decode, "launch", lambda *args: launches.append(1) or launch(*args))
    with checked():
        served, warnings = told(call)
    checks = len(launches) - 1
    assert warnings == [] and checks == 4
    torch.testing.assert_close(served, portable, atol=2e-2, rtol=2e-2)
    launches.clear()
    wrong = device().ptx(E8).replace(b"ex2.approx.ftz.f32", b"lg2.approx.ftz.f32")
    with checked(lambda _: wrong):
        found, warnings = told(call)
    assert torch.equal(found, portable) and len(launches) == 1
    # The forward kernel is asked next, and is the same wrong one.
    others = ("decode_bf16_e4m3_d128_rows8", "forward_bf16_e4m3_d128")
    assert len(warnings) == len(others)
    for name, warning in zip(others, warnings, strict=True):
        assert f"does not use its kernel {name}" in warning

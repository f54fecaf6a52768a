"""Every family of models that the installed transformers has, as tiny random models.

A family is served, and then equals eager attention, lets no later token move an earlier logit and
keeps packed sequences as apart as models that are run on each alone; or it is refused with a word
on what to do. What became of each is written into docs/integrations.md.
"""

import inspect
import os
import re
from pathlib import Path

import pytest

from repository import DOCS

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers", reason="transformers is not installed: flash8[transformers]")

import torch
import transformers

from flash8.integrations import transformers as flash8_transformers
from flash8.integrations.transformers.attention import REFUSED as REFUSED_ARGUMENTS
from flash8.integrations.transformers.attention import attend
from flash8.integrations.transformers.opaque import MaskUsedAsTensorError
from transformers_probes import (
    APART,
    APART_BY_MASK,
    APART_IN_ROWS,
    MIXED_ELSEWHERE,
    NAME,
    NO_POSITIONS,
    NOT_BUILT,
    OWN,
    REFUSED,
    REFUSED_CALLED,
    REFUSED_LOADING,
    SERVED,
    UNSEEN,
    Subject,
    examine,
    examine_generation,
)
from transformers_zoo import KINDS, count_calls, families, new_model, set_implementation

DOCUMENT = DOCS / "integrations.md"
HEADING = "### Families of models"

#: One family of each sort in the default suite, with what must become of it.
SLICE = {
    ("causal", "llama"): (SERVED, APART, APART),
    ("causal", "gpt_oss"): (SERVED, APART, APART),
    ("causal", "afmoe"): (SERVED, APART, APART),
    ("causal", "opt"): (SERVED, APART, APART),
    ("causal", "bert"): (SERVED, APART, APART),
    ("causal", "gemma2"): (SERVED, APART, APART),
    ("causal", "deepseek_v3"): (SERVED, APART, APART),
    ("causal", "llama4_text"): (SERVED, APART_BY_MASK, APART),
    ("causal", "jamba"): (SERVED, MIXED_ELSEWHERE, MIXED_ELSEWHERE),
    ("causal", "bigbird_pegasus"): (SERVED, NO_POSITIONS, NO_POSITIONS),
    ("causal", "mamba"): (OWN, NO_POSITIONS, NO_POSITIONS),
    ("causal", "doge"): (REFUSED_CALLED, None, None),
    ("causal", "deepseek_v32"): (REFUSED_CALLED, None, None),
    ("causal", "minimax_m3_vl_text"): (REFUSED_CALLED, None, None),
    **{
        ("causal", family): (REFUSED_LOADING, None, None)
        for family in ("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mvp", "xglm", "xlnet")
    },
    ("seq2seq", "bart"): (SERVED, NO_POSITIONS, NO_POSITIONS),
    ("seq2seq", "nllb-moe"): (SERVED, NO_POSITIONS, NO_POSITIONS),
    ("seq2seq", "t5"): (REFUSED_CALLED, None, None),
    ("masked", "bert"): (SERVED, APART, APART),
    ("masked", "distilbert"): (SERVED, UNSEEN, APART),
    ("masked", "roformer"): (REFUSED_CALLED, None, None),
    ("multimodal", "qwen3_vl"): (SERVED, APART, APART),
    ("multimodal", "gemma3"): (SERVED, APART, APART),
    ("multimodal", "paligemma"): (REFUSED_CALLED, None, None),
}
#: Families that compute attention themselves and lost causality in silence.
OWN_ATTENTION = ("bloom", "codegen", "xglm", "trocr", "mvp", "rembert", "big_bird", "megatron-bert")


@pytest.fixture(scope="module", autouse=True)
def name():
    return flash8_transformers.register()


@pytest.mark.parametrize(("kind", "family"), SLICE, ids=lambda value: value)
def test_families(kind, family):
    assert examine(kind, family) == SLICE[kind, family]


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("family", "expected"),
    [("gpt_oss", SERVED), ("gemma3", SERVED), ("deepseek_v3", SERVED), ("bloom", REFUSED)],
)
def test_generation(family, expected, cache):
    assert examine_generation("causal", family, cache) == expected


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_models_with_an_attention_of_their_own(family):
    """Refused when loaded; and when that is passed by, at the first use of the mask."""
    with pytest.raises(ValueError, match=r"attention by itself \(.*Attention.*'eager'"):
        Subject("causal", family, NAME)
    model = Subject("causal", family, "eager")
    set_implementation(model.model, NAME)
    with pytest.raises(MaskUsedAsTensorError, match=rf"type {family!r}.*use attn_implem"):
        model.logits(model.tokens)


@pytest.mark.parametrize("family", ["falcon", "gptj", "gpt_neo"])
def test_models_with_a_table_of_attention_classes(family):
    with pytest.raises(ValueError, match=r"table of its own \(\w+_ATTENTION_CLASSES\).*'eager'"):
        new_model("causal", family, NAME)


def test_parts_of_a_model_can_be_named():
    """Where an image tower has an attention of its own, the language model is served."""
    with pytest.raises(
        ValueError, match=r"GotOcr2VisionAttention.*\{'text_config': 'f8_attention'"
    ):
        new_model("multimodal", "got_ocr2", NAME)
    subject = Subject("multimodal", "got_ocr2", {"text_config": NAME})
    expected = Subject("multimodal", "got_ocr2", "eager").logits(subject.tokens)
    with count_calls(NAME) as calls:
        logits = subject.logits(subject.tokens)
    assert calls["all"] == 2
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_no_argument_of_an_attention_function_is_unknown():
    """What models pass to attention functions by name is used, refused, or known to change nothing.
    A new argument of a new release may change the result, and `attend` would ignore it."""
    used = set(inspect.signature(attend).parameters)
    packing = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    changes_nothing = {"output_attentions", "deterministic"}
    known = used | packing | changes_nothing | set(REFUSED_ARGUMENTS)
    found = {}
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for call in re.findall(
            r"= attention_interface\((.*?)\n\s+\)\n", path.read_text(), re.DOTALL
        ):
            for argument in re.findall(r"^\s+(\w+)=", call, re.MULTILINE):
                found.setdefault(argument, path.stem)
    assert {"dropout", "scaling", "position_bias", "s_aux", "block_indices"} <= set(found)
    assert {name: found[name] for name in set(found) - known} == {}


def survey(kind):
    """{what became of attention: {what became of packing: families}}"""
    found = {}
    for family in families(kind):
        attention, by_positions, by_boundaries = examine(kind, family)
        attention = attention.split(":")[0]
        packing = None
        if attention == SERVED:
            assert by_boundaries == APART or by_positions in (MIXED_ELSEWHERE, NO_POSITIONS)
            packing = by_positions
        found.setdefault(attention, {}).setdefault(packing, []).append(family)
    return found


INTRODUCTION = f"""\
Made by `test_integrations_families.py` (`FLASH8_WRITE_DOCS=1`, a slow test) from tiny random
models of transformers {transformers.__version__}. Served means: equal to eager attention without a
mask and with padding on either side; no later token moves an earlier logit of a causal model; and
packed sequences, where they are not said to mix, equal the model run on each of them alone.
Boundaries are `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`. Families are
called by their `model_type`."""
TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoder and speech models",
    "masked": "Encoders",
    "multimodal": "Image and text, called with text",
}
ROWS = {
    (SERVED, APART): "served; packed by `position_ids` or boundaries",
    (SERVED, APART_BY_MASK): "served; packed by `position_ids` where `attention_mask` is None, "
    "or by boundaries",
    (SERVED, APART_IN_ROWS): "served; packed by `position_ids` of four rows (the first in the "
    "text), or by boundaries",
    (SERVED, UNSEEN): "served; packed by boundaries only: `position_ids` reach no attention, with "
    "any implementation of transformers",
    (SERVED, MIXED_ELSEWHERE): "served; packed sequences mix in layers that are no attention",
    (SERVED, NO_POSITIONS): "served; take no `position_ids`",
    (OWN, None): "no attention that transformers dispatches",
    (REFUSED_LOADING, None): "refused when loaded: attention of their own",
    (REFUSED_CALLED, None): "refused when called: a mask, position bias or choice of keys of their "
    "own",
    (NOT_BUILT, None): "not tested: no tiny model without a package, an image or a download",
}


def table():
    """The part of the document under its heading."""
    lines = [HEADING, "", INTRODUCTION, ""]
    for kind in KINDS:
        found = survey(kind)
        lines += [f"**{TITLES[kind]}**", "", "| outcome | families |", "|---|---|"]
        for (attention, packing), title in ROWS.items():
            names = found.get(attention, {}).get(packing)
            if names:
                lines.append(f"| {title} | {', '.join(names)} |")
        lines.append("")
    return "\n".join(lines)


def written():
    _, _, rest = DOCUMENT.read_text().partition(HEADING)
    return HEADING + rest.partition("\n## ")[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_document_lists_every_family():
    """FLASH8_WRITE_DOCS=1 writes the tables."""
    if transformers.__version__ not in written() and "FLASH8_WRITE_DOCS" not in os.environ:
        pytest.skip(f"the tables are of another release than {transformers.__version__}")
    made = table()
    if os.environ.get("FLASH8_WRITE_DOCS"):
        DOCUMENT.write_text(DOCUMENT.read_text().replace(written().rstrip(), made.rstrip()))
    assert written().rstrip() == made.rstrip()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "multimodal"])
def test_generation_of_every_family(kind, cache):
    outcomes = {family: examine_generation(kind, family, cache) for family in families(kind)}
    served = [family for family, outcome in outcomes.items() if outcome == SERVED]
    assert len(served) > {"causal": 120, "seq2seq": 8, "multimodal": 30}[kind]

"""examples/byte_gpt/fp8_linear.py on a tiny model: what is in FP8, and when a run fails."""

import dataclasses
import importlib
import sys

import pytest

from flash8.nn import Fp8Linear

pytest.importorskip("tqdm", reason="the demo needs flash8[demo]")


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("fp8_linear")


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(importlib.import_module("config").QUICK, steps=2)


def test_the_blocks_products_are_fp8_and_start_alike(script, config):
    plain, *others = (script.Trainer(config, variant).model for variant in script.VARIANTS)
    for model in others:
        layers = [name for name, x in model.named_modules() if isinstance(x, Fp8Linear)]
        assert len(layers) == 4 * config.layers and not any("head" in name for name in layers)
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert one.equal(other)


@pytest.mark.slow
def test_the_first_losses_agree(script, config):
    losses = [history.losses[-1] for history in script.compare(config)]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.02)


@pytest.mark.parametrize(
    ("last", "loss", "said"),
    [
        (0.895, 3.0, None),
        (0.95, 3.02, None),
        (0.88, 2.9, r"FP8 ended with -2.00% right words"),
        (0.9, 3.06, r"FP8 ended with a loss \+2.00%"),
        (0.9, float("nan"), r"FP8 ended with a loss"),
    ],
)
def test_a_run_fails_where_fp8_ends_below(script, monkeypatch, last, loss, said):
    ends = ((0.9, 3.0), (0.9, 3.0), (last, loss))
    histories = [script.History(heldout_accuracies=[x], losses=[y]) for x, y in ends]
    monkeypatch.setattr(script, "compare", lambda config: histories)
    monkeypatch.setattr(sys, "argv", ["fp8_linear.py", "--steps", "1"])
    if said is None:
        script.main()
    else:
        with pytest.raises(SystemExit, match=said):
            script.main()


def test_every_word_is_predicted(script, config):
    """And without `whole_text` those of summaries alone, which a batch has at its end."""
    data = importlib.import_module("data")
    documents = data.documents(3, 2, config.shortest, config.longest)
    whole, summaries = (data.make_batch(documents, whole_text=x) for x in (True, False))
    assert (whole.targets >= 0).all()
    assert whole.targets[summaries.targets >= 0].equal(summaries.targets[summaries.targets >= 0])
    assert int((summaries.targets < 0).sum()) == sum(x.prompt_length - 1 for x in documents)

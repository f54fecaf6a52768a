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


@pytest.mark.parametrize("last", [0.895, 0.88, 0.95])
def test_a_run_fails_where_fp8_ends_below(script, monkeypatch, last):
    histories = [script.History(heldout_accuracies=[share]) for share in (0.9, 0.9, last)]
    monkeypatch.setattr(script, "compare", lambda config: histories)
    monkeypatch.setattr(sys, "argv", ["fp8_linear.py", "--steps", "1"])
    if last < 0.89:
        with pytest.raises(SystemExit, match=r"FP8 ended with -2.00% right words"):
            script.main()
    else:
        script.main()

"""The benchmark of the backward's choices, on the simulated device: nothing is timed there."""

import sys
import types

import pytest
import torch

import bench_backward_choices
from attention_cases import dense
from defaults import by_default
from forward_cases import device
from simulated_device import missing_compiler

CHOICES = list(bench_backward_choices.choices())
SMALL = dense("small", 1, 150, 2, 1, 128, True)


def test_choices_have_names_of_their_own():
    assert len({variant.name for variant in CHOICES}) == len(CHOICES)
    assert {(x.dq, x.deterministic) for x in CHOICES} == {
        ("staged", False),
        ("reduced", False),
        ("staged", True),
    }


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("variant", by_default(CHOICES[:3], CHOICES[:1]))
def test_a_choice_computes_gradients(variant, monkeypatch):
    with device().serving_cpu_tensors(monkeypatch):
        run = bench_backward_choices.Run(variant, SMALL, device="cpu")
        assert 0.0 < run.error() <= bench_backward_choices.TOLERANCE
        run.dout = 0.9 * run.dout  # of which the kernels have not heard
        assert run.error() > bench_backward_choices.TOLERANCE


def test_a_row_is_the_backward_alone(monkeypatch):
    """Half the pairs; five products to the forward's two."""

    class Run:
        def __init__(self, variant, case, seed=0):
            self.checked = seed

        def error(self):
            return 0.5 if case_is_wrong else 0.001

        def __call__(self):
            pass

    timing = types.SimpleNamespace(as_dict=lambda: {"median_ms": 2.0})
    module = types.SimpleNamespace(time_call=lambda call: timing)
    monkeypatch.setitem(sys.modules, "gpu_timing", module)
    monkeypatch.setattr(bench_backward_choices, "Run", Run)
    case_is_wrong = False
    long, _ = bench_backward_choices.measure(CHOICES[0])
    pairs = 2 * 16 * 8192 * 8192 / 2
    assert long["tflops"] == pytest.approx(5 * 2 * pairs * 128 / 2e-3 * 1e-12)
    case_is_wrong = True
    assert all("tflops" not in row for row in bench_backward_choices.measure(CHOICES[0]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    bench_backward_choices.main()
    assert "no CUDA device" in capsys.readouterr().out

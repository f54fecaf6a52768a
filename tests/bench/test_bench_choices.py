"""The benchmark of compile-time choices, on the simulated device: nothing is timed there."""

import pytest

import bench_choices
from attention_cases import dense
from defaults import by_default
from flash8 import _native
from flash8.compiler import compile_unit
from forward_cases import device
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

CHOICES = list(bench_choices.choices())
#: One of every kind.
RUN = [
    "forward_bf16_d128_causal",
    "forward_bf16_d128_cluster",
    "forward_e4m3_d128_causal_headscales, polynomial 1 in 4",
    "forward_e4m3_d128_vcolmajor_blockscales",
    "forward_e4m3_d128_cluster_vcolmajor_blockscales",
]


FOUND = [choice for choice in CHOICES if choice.name in RUN]
#: The polynomial and descales per block without clusters are compiled for nothing else.
KEPT = [choice for choice in FOUND if choice.name not in RUN[2:4]]


def test_choices_have_names_of_their_own():
    names = [choice.name for choice in CHOICES]
    assert len(set(names)) == len(names) and set(RUN) <= set(names)


@pytest.mark.parametrize("choice", by_default(FOUND, KEPT))
def test_every_kind_of_choice_computes_attention(choice, monkeypatch):
    image = compile_unit(choice.unit()).ptx.read_bytes() + b"\0"
    kernel = _native.Library(device().driver, image).kernel()
    case = dense("choices", 1, 150, 1, 1, 128, choice.variant.mask == "causal")
    with device().serving_cpu_tensors(monkeypatch):
        run = bench_choices.Run(choice, kernel, case, device="cpu")
        error = run.error()
    assert 0.0 < error <= choice.tolerance


def test_without_a_gpu_it_says_so(capsys):
    bench_choices.main()
    assert "no CUDA device" in capsys.readouterr().out


def test_what_is_wrong_has_no_speed():
    rows = [
        {"choice": "a", "seqlen_q": 8, "error": 0.5},
        {"choice": "a", "seqlen_q": 4, "error": 0.001, "tflops": 600.2},
    ]
    assert bench_choices.table(rows).splitlines()[-1] == "| a | 600 | wrong: 0.5 |"

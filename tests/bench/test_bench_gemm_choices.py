"""The benchmark of the GEMM kernel's choices, on the simulated device: nothing is timed there."""

import pytest
import torch

import bench_gemm_choices
from flash8.backends.hopper.gemm_variants import GemmVariant
from gemm_cases import assert_same, device, emulated
from simulated_device import missing_compiler

CHOICES = list(bench_gemm_choices.choices())
PAIR = GemmVariant("block", 128, 128, cluster=True)


def test_each_tile_alone_and_in_clusters():
    assert len(set(CHOICES)) == len(CHOICES) == 20 and PAIR in CHOICES
    assert sum(choice.cluster for choice in CHOICES) == 10


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_a_choice_multiplies(monkeypatch):
    case = bench_gemm_choices.Case(150, 140, 272)
    with device().serving_cpu_tensors(monkeypatch):
        found = bench_gemm_choices.Run(PAIR, case, device="cpu")()
    assert_same(found, emulated(bench_gemm_choices.product_of(PAIR, case, "cpu")))
    assert found.dtype == torch.bfloat16


def test_without_a_gpu_it_says_so(capsys):
    bench_gemm_choices.main()
    assert "no CUDA device" in capsys.readouterr().out


def test_what_is_wrong_has_no_speed():
    case = {"m": 8, "n": 16, "k": 32}
    rows = [{"choice": "a", **case, "tflops": 900.4}, {"choice": "b", **case, "fault": "wrong"}]
    lines = bench_gemm_choices.table(rows).splitlines()
    assert lines[0] == "| kernel | 8 x 16 x 32 |"
    assert lines[2:] == ["| a | 900 |", "| b | wrong |"]

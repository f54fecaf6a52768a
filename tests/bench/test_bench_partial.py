"""Benchmarks that end early: what is known is on disk, and the most telling comes first."""

from dataclasses import replace

import attention_cases
import bench_attention
import partial
from attention_peers import Peer
from flash8.backends.hopper.kernels import kernels_of, shipped
from gpu_steps import units


def test_without_a_limit_there_is_time(monkeypatch):
    monkeypatch.delenv("FLASH8_STEP_SECONDS", raising=False)
    assert list(partial.while_there_is_time(range(3))) == [0, 1, 2]


def test_when_the_time_is_up_the_rest_is_counted(monkeypatch, capsys):
    monkeypatch.setenv("FLASH8_STEP_SECONDS", "100")
    now = [partial._START]
    monkeypatch.setattr(partial.time, "monotonic", lambda: now[0])
    seen = []
    for item in partial.while_there_is_time(range(5)):
        seen.append(item)
        now[0] += 50
    assert seen == [0, 1] and "3 measurements are left out" in capsys.readouterr().out


def test_rows_are_kept_as_they_come_and_slow_peers_come_last(monkeypatch):
    def peer(name: str, *, slow: bool = False) -> Peer:
        return Peer(name, lambda call: lambda q, k, v: bench_attention.reference(call), slow=slow)

    small = attention_cases.dense("small", 1, 8, 1, 1, 8, False)
    cases = [small, replace(small, seqlen_q=9, seqlen_k=9)]
    kept = []

    def keep(results) -> None:
        kept.append([(row["seqlen_q"], row["peer"]) for row in results["rows"]])

    def time_call(call):
        call()
        return {"median_ms": 1.0}

    monkeypatch.setattr(bench_attention, "_MATRIX_SIZE", {"cpu": 8})
    peers = [peer("flash8"), peer("compiled", slow=True), peer("cudnn")]
    bench_attention.run(cases, peers, "cpu", time_call, keep)
    assert kept[1] == [(8, "flash8"), (8, "cudnn")]
    assert kept[3] == [(8, "flash8"), (8, "cudnn"), (9, "flash8"), (9, "cudnn")]
    assert kept[-1] == [(n, p.name) for n in (8, 9) for p in peers]


def test_long_sequences_and_head_dim_128_come_first():
    first, *rest = attention_cases.gpu_cases()
    assert (first.head_dim, first.seqlen_q, first.causal) == (128, 8192, True)
    assert [case.seqlen_q for case in rest[:6]] == [8192] * 5 + [16384]


def test_kernels_of_the_benchmarks_are_chosen_without_tensors():
    names = {variant.name for variant in units._attention()}
    assert {
        "forward_bf16_d128_causal",
        "forward_bf16_d256_cluster",
        "forward_e4m3_d64_vcolmajor_blockscales",
        "forward_bf16_d128_causal_packgqa",
        "quantize_amax_bf16_d256",
        "backward_bf16_d128_causal",
        "backward_bf16_d256",
        "backward_bf16_d64_causal_deterministic",
        "backward_bf16_d256_causal_deterministic",
        "backward_bf16_d64_fp8",
        "backward_bf16_d128_causal_fp8",
    } <= names
    assert "backward_bf16_d128_deterministic" not in names  # is not measured


def test_the_pack_has_what_the_gpu_tests_ask_for():
    found = [unit.name for unit in units.units()]
    assert len(found) == len(set(found))
    ship = {part.name for variant in shipped() for part in kernels_of(variant)}
    assert set(found[: len(ship)]) == ship
    assert {
        "forward_fp16_d64_causal_packgqa",  # test_dense_matches_the_cpu
        "forward_e4m3_d256_causal_packgqa_vcolmajor_blockscales",  # test_fp8_matches_the_cpu
        "backward_bf16_d96_causal_deterministic",  # test_ordered_gradients_have_one_bit_pattern
        "quantize_cast_fp32_d64_e5m2",  # test_special_values
        "append_bf16_to_e4m3",
        "forward_e4m3_d128_causal_vcolmajor_blockscales_polynomial4",  # bench_choices.py
        "gemm_block_cluster_256x128",  # bench_gemm_choices.py
        "qkv_projection_block",
    } <= set(found)

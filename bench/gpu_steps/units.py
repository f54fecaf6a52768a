"""Which kernels the pack brings besides those that ship: what the benchmarks and GPU tests ask for.

Choosing a kernel needs shapes and options alone, so the calls are made of tensors without contents.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from attention_cases import Case, gpu_cases, shows_order
from bench_backward_choices import choices as backward_choices
from bench_choices import choices
from bench_gemm_choices import choices as gemm_choices
from flash8.backends.hopper import backward as hopper_backward
from flash8.backends.hopper import backward_fp8
from flash8.backends.hopper import forward as hopper
from flash8.backends.hopper.append_variants import AppendVariant
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.kernels import Variant, kernels_of, shipped
from flash8.backends.hopper.qkv_variants import QkvVariant
from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
from flash8.backends.hopper.quantize_variants import QuantizeVariant
from flash8.backends.hopper.schedule_variants import ScheduleVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.call.options import Options
from flash8.compiler import Unit

from .pack import ROOT, gpu_tests

_E4M3 = torch.float8_e4m3fn


def units() -> list[Unit]:
    """Each once, the shipped ones first."""
    variants: tuple[Variant, ...] = (*shipped(), *_attention(), *backward_choices())
    variants = (*variants, *gemm_choices(), *_of_tests())
    found = [part.unit() for variant in variants for part in kernels_of(variant)]
    found += [choice.unit() for choice in choices()]
    return list(dict.fromkeys(found))


def _attention() -> Iterator[Variant]:
    """What bench_attention.py runs, at its own lengths and at those of its comparison."""
    for case in gpu_cases():
        for same in (case, case.checked()):
            call = _call(same, torch.bfloat16, Options())
            yield hopper.choose(*call)
            if case.kind != "decode":
                yield hopper_backward.choose(*call)
                if shows_order(case):
                    ordered = call[-1]._replace(deterministic=True)
                    yield hopper_backward.choose(*call[:-1], ordered)
                yield from _fp8_backward(same)
                for granularity, v_colmajor in itertools.product(("head", "block"), (False, True)):
                    yield hopper.choose(*_call(same, _E4M3, _fp8(granularity, v_colmajor)))
    for head_dim in (64, 128, 256):
        for job, v_colmajor in (("cast", False), ("cast", True), ("amax", False)):
            yield QuantizeVariant(job, "bf16", head_dim, v_colmajor=v_colmajor)


def _fp8_backward(case: Case) -> Iterator[Variant]:
    """That of fp8_attention; without one the 16-bit kernels serve."""
    q, k, v, options = _call(case, _E4M3, _fp8("head", False))
    out = torch.empty(q.shape, dtype=torch.bfloat16, device="meta")
    if backward_fp8.refusal(q, k, v, out, options) is None:
        yield backward_fp8.choose(q, v, out, options)


def _fp8(granularity: str, v_colmajor: bool) -> Options:
    descale = torch.ones((1, 1) if granularity == "head" else (1, 1, 1))
    return Options(
        q_descale=descale,
        k_descale=descale,
        v_descale=descale,
        v_colmajor_tokens=1 if v_colmajor else None,
    )


def _call(
    case: Case, dtype: torch.dtype, options: Options
) -> tuple[Tensor, Tensor, Tensor, Options]:
    """What a kernel is chosen by."""
    packed = case.kind == "packed"
    shapes = [
        ((rows,) if packed else (case.batch, seqlen)) + (heads, case.head_dim)
        for rows, seqlen, heads in (
            (case.rows[0], case.seqlen_q, case.heads),
            (case.rows[1], case.seqlen_k, case.heads_kv),
            (case.rows[1], case.seqlen_k, case.heads_kv),
        )
    ]
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    if options.v_colmajor_tokens is not None:
        v = v.transpose(-1, -2)
    ends = torch.zeros(1, dtype=torch.int32) if packed else None
    options = options._replace(
        window_right=0 if case.causal else -1, cu_seqlens_q=ends, cu_seqlens_k=ends
    )
    return q, k, v, options


def _of_tests() -> Iterator[Variant]:
    """Those of the GPU tests, which run on the CPU for it (tests/support/gpu_recorder.py)."""
    attention = (ForwardVariant, BackwardVariant, DecodeVariant)
    quantizers = (QuantizeVariant, QuantizeMatrixVariant)
    others = (AppendVariant, ScheduleVariant, GemmVariant, QkvVariant)
    kinds = {kind.__name__: kind for kind in (*attention, *quantizers, *others)}
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder) / "recorded.json"
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "gpu_recorder", "-m", "gpu"]
        command += ["-p", "no:cacheprovider", *map(str, gpu_tests())]
        environ = {**os.environ, "PYTHONPATH": "tests/support", "FLASH8_RECORDED": str(recorded)}
        environ["FLASH8_COMPILE"] = "never"
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"the GPU tests do not run on the CPU:\n{done.stdout}{done.stderr}")
        for kind, fields in json.loads(recorded.read_text()).values():
            yield kinds[kind](**fields)

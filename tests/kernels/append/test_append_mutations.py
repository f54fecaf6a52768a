"""The comparison of test_append_kernel.py must catch an appending kernel that is wrong."""

import pytest
import torch

from append_cases import assert_same, make
from cases import int32
from flash8 import _native
from flash8.tensors.float8 import E4M3
from quantizer_device import changed_kernels, device
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

KERNEL, ROW, TOKEN = "append.cu", "quantize/new_row.cuh", "quantize/new_token.cuh"
HALVES = {"rotary_dim": 32, "interleaved": False}
PACKED = {"new": (5, 0, 17), "rotary_dim": 32}
SLOW = pytest.mark.slow

# file, what is replaced, by what, the call that must notice, and when it is planted.
FAULTS = {
    "halves swapped": (ROW, "first ? -1.0f : 1.0f", "first ? 1.0f : -1.0f", HALVES, ()),
    "its own channel for the other half's": (
        ROW,
        "channel + half : entry",
        "channel : entry",
        HALVES,
        SLOW,
    ),
    "neighbours swapped": (
        ROW,
        "y[2 * c] = subtract(",
        "y[2 * c] = add(",
        {"rotary_dim": 32},
        SLOW,
    ),
    "all channels turn": (
        ROW,
        "channel < rotary.rotary_dim",
        "channel < 2 * rotary.rotary_dim",
        {"rotary_dim": 16},
        SLOW,
    ),
    "tables of 16 bits read as fp32": (
        ROW,
        "Input::kFp32 || is_fp32) {",
        "Input::kFp32 || true) {",
        {"rotary_dim": 32, "table_dtype": torch.bfloat16},
        SLOW,
    ),
    "queries turn with keys": (
        TOKEN,
        "(rows.advances ? token.index : 0)",
        "token.index",
        {"rotary_dim": 32, "advances": False},
        SLOW,
    ),
    "positions from 0": (TOKEN, "rotary.offsets != nullptr ?", "false ?", {"rotary_dim": 32}, SLOW),
    "a sequence too early": (
        TOKEN,
        "cu_seqlens[middle] <= token",
        "cu_seqlens[middle] < token",
        PACKED,
        (),
    ),
    "packed rows in no sequence": (
        TOKEN,
        "exists = index >= 0 && token < own.end",
        "exists = index >= 0",
        {"new": (5, 0, 12), "spare": True},
        SLOW,
    ),
    "a column too early": (
        TOKEN,
        "position / params.slot_tokens",
        "(position - 1) / params.slot_tokens",
        {"page_size": 3},
        (),
    ),
    "page table by sequence": (
        TOKEN,
        "params.kv_batch_idx != nullptr ?",
        "params.kv_batch_idx != nullptr && params.page_table == nullptr ?",
        {"page_size": 16, "rows": (4, 0, 2)},
        (),
    ),
    "one token further": (
        TOKEN,
        "static_cast<unsigned>(length) + token.index",
        "1u + length + token.index",
        {},
        SLOW,
    ),
    "descale of the sequence": (
        ROW,
        "rows.descale_by_slot ? place.slot : token.batch",
        "token.batch",
        {"cache": E4M3, "page_size": 16},
        SLOW,
    ),
    "descale for its inverse": (
        ROW,
        "return reciprocal(checked",
        "return (checked",
        {"cache": E4M3},
        SLOW,
    ),
    "no mean": (ROW, "rows.mean.ptr != nullptr", "false", {"cache": E4M3}, SLOW),
    "mean of another head": (
        ROW,
        "head * rows.mean.head_stride",
        "(head ^ 1) * rows.mean.head_stride",
        {"cache": E4M3},
        SLOW,
    ),
    "values are keys": (
        KERNEL,
        "params.rows[kind], kind == 0",
        "params.rows[kind == 2 ? 1 : kind], kind == 0",
        {},
        SLOW,
    ),
    "no norm of the other half": (
        ROW,
        "norm.apply(other_channel, other);",
        "",
        {"norm_dtype": torch.float32, **HALVES},
        (),
    ),
    "weights of the first channels": (
        ROW,
        "rows_.norm_weight, channel, weight",
        "rows_.norm_weight, 0, weight",
        {"norm_dtype": torch.float32},
        SLOW,
    ),
    "weights of 16 bits read as fp32": (
        ROW,
        "(rows_.norm_is_fp32,",
        "(true,",
        {"norm_dtype": torch.bfloat16},
        SLOW,
    ),
    "no eps": (
        ROW,
        "add(mean, rows.norm_eps)",
        "mean",
        {"norm_dtype": torch.float32},
        SLOW,
    ),
    "a sum of part of a row": (
        ROW,
        "channel < rows.head_dim; channel += kGroup",
        "channel < rows.head_dim - kGroup; channel += kGroup",
        {"norm_dtype": torch.float32},
        SLOW,
    ),
    "normalised behind the rotation": (
        ROW,
        "norm.apply(channel, y);\n    bool",
        "bool",
        {"norm_dtype": torch.float32, "rotary_dim": 32},
        SLOW,
    ),
    "lengths before the append": (
        TOKEN,
        "cache_seqlens[batch] + count_of(params.rows[1], batch)",
        "cache_seqlens[batch]",
        {},
        SLOW,
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=row[-1]) for name, row in FAULTS.items()]
)
def test_is_caught(monkeypatch, tmp_path, name):
    file, old, new, options, _ = FAULTS[name]
    options = dict(options)
    spare = options.pop("spare", False)
    call = make(**options)
    if spare:  # rows behind the last sequence
        call = call.changed(cu_seqlens=call.k.cu_seqlens - int32((0, 0, 0, 4)))
    want = call.copy().on_kernels(monkeypatch)
    if not spare:
        assert_same(want, call.copy().portable())
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device(), "_registry", changed_kernels(tmp_path, file, old, new))
    with pytest.raises((AssertionError, _native.DriverError)):
        assert_same(call.copy().on_kernels(monkeypatch), want)

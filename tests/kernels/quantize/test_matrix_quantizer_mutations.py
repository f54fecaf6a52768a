"""The comparisons of test_matrix_quantizer.py must catch a kernel that is wrong."""

import math

import pytest

from defaults import by_default
from flash8.backends.cpu import quantize_matrix as portable
from flash8.backends.hopper import kernels
from flash8.backends.hopper import quantize_matrix as hopper
from flash8.backends.hopper.verify.quantize_matrix import silu_fault
from matrix_quantizer_cases import draw, raw, request
from quantizer_device import changed_kernels, device
from simulated_device import missing_compiler
from sparse_tensors import sparse

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

SHORT, RAGGED, BLOCKS, WARPS, LONG = (5, 136), (3, 333), (2, 1024), (3, 4096), (1, 16400)
MATRIX, ROW, CHUNK = "matrix.cu", "matrix_row.cuh", "matrix_chunk.cuh"

# file, what is replaced, by what, and the prologue, shape and granularity that must notice.
MUTATIONS = {
    "a scale for two blocks": (
        *(MATRIX, "over_lanes(row.amax(chunk), MatrixConfig::kBlockThreads)"),
        *("over_lanes(row.amax(chunk), 2 * MatrixConfig::kBlockThreads)", "none", BLOCKS, "1x128"),
    ),
    "no barrier": (MATRIX, "__syncthreads();", "", "none", WARPS, "row"),
    "one warp's amax": (
        *(MATRIX, "slots[first + threadIdx.x % warps]", "slots[first]"),
        *("none", WARPS, "row"),
    ),
    "slots of another row": (
        *(MATRIX, "threadIdx.x / row_threads * warps", "0 * warps", "none", WARPS, "row"),
    ),
    "squares of one span": (
        *(MATRIX, "squares.add_span(row);", "if (span == 0) squares.add_span(row);"),
        *("rms_norm", LONG, "row"),
    ),
    "no eps": (MATRIX, "add(mean, params.norm_eps)", "mean", "rms_norm", SHORT, "row"),
    "x + residual is not stored": (
        *(ROW, "writes && params.sum != nullptr", "false", "residual", SHORT, "row"),
    ),
    "x + residual is not rounded": (
        *(ROW, "chunk.narrow_from(y[c]);\n                chunk.widen_into(y[c]);", ""),
        *("residual", SHORT, "row"),
    ),
    "a residual of zero where there is none": (
        *(ROW, "kNothing = Config::kNorm ? kMinusZero : 0", "kNothing = 0"),
        *("rms_norm", SHORT, "row"),
    ),
    "NaN in what K is filled up with": (
        *(ROW, "if (first + kColumns > end)", "if (false)", "rms_norm", RAGGED, "row"),
    ),
    "up is added": (
        *(ROW, "multiply(silu(y[c][i]), values[i])", "add(silu(y[c][i]), values[i])"),
        *("silu_mul", SHORT, "1x128"),
    ),
    "no sigmoid": (ROW, "return multiply(gate, sigmoid)", "return gate", "silu_mul", SHORT, "row"),
    "elements swapped": (CHUNK, "0x3254 : 0x5410", "0x5410 : 0x3254", "none", RAGGED, "row"),
    "rows by 32 bits": (
        *(ROW, "index * stride * X::kBytes", "uint32_t(index * stride * X::kBytes)"),
        *("far", (70, 136), "row"),
    ),
    "one vector too many": (
        *(CHUNK, "raw = source[i];", "raw = source[i + 1];", "none", SHORT, "row"),
    ),
}
#: Of the rows' threads, of the norm, and of what is filled up.
KEPT = ["slots of another row", "NaN in what K is filled up with"]


def made(prologue: str, shape: tuple[int, int], granularity: str):
    """With a row of NaN, and zeros of both signs."""
    x = draw(*shape)
    x[0, 3], x[-1, 5], x[-1, 6] = math.nan if shape[0] > 1 else 1.0, -0.0, 0.0
    if prologue == "far":
        far = sparse(shape, (2**26 + 256, 1), x.dtype)
        return request("none", far.copy_(draw(*shape)), granularity)
    if prologue == "residual":
        return request("rms_norm", draw(*shape), granularity, other=draw(*shape, seed=4))
    if prologue == "silu_mul":
        x[0, 3] = 1.0
    return request(prologue, x * 0.01 if prologue == "rms_norm" else x, granularity)


@pytest.mark.parametrize("mutation", by_default(MUTATIONS, KEPT))
def test_is_caught(monkeypatch, tmp_path, mutation):
    file, old, new, *case = MUTATIONS[mutation]
    given = made(*case)
    want = portable.quantize_matrix(given)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    registry = changed_kernels(tmp_path, file, old, new)
    found = []
    for seed in range(6):
        with device().serving_cpu_tensors(monkeypatch, seed=seed), monkeypatch.context() as patch:
            patch.setattr(kernels, "registry", lambda: registry)
            try:
                have = hopper.quantize_matrix(given)
            except (RuntimeError, AssertionError) as error:  # a race, or a store beside an output
                found.append(str(error))
                continue
        if given.up is not None:
            found.append(silu_fault(given, have[0], have[1]))
        elif not all(map(bytes_are_equal, have, want)):
            found.append("other bits")
    assert any(found)


def bytes_are_equal(a, b) -> bool:
    return bool((raw(a) == raw(b)).all())

"""The kernel that makes operands of products, on the simulated device: the portable code's bits."""

import math

import pytest
import torch

from flash8 import gemm
from flash8.backends.cpu import quantize_matrix as portable
from flash8.backends.hopper import quantize_matrix as hopper
from flash8.call.request import MatrixRequest
from matrix_quantizer_cases import (
    BF16,
    FP16,
    FP32,
    GRANULARITIES,
    PROLOGUES,
    check,
    draw,
    on_kernel,
    raw,
    request,
)
from quantizer_device import device
from simulated_device import missing_compiler
from sparse_tensors import sparse

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
both = pytest.mark.parametrize("granularity", GRANULARITIES)
every = pytest.mark.parametrize("prologue", PROLOGUES)

#: Rows of 8, 16, 32, 64, 128 and 256 threads; one past what 256 hold.
COLUMNS = (1, 15, 16, 17, 127, 128, 129, 509, 1024, 1032, 2049, 4099, 7168)


@both
@every
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(monkeypatch, prologue, granularity, columns):
    check(monkeypatch, request(prologue, draw(3, columns), granularity))


@both
@every
def test_rows_longer_than_their_threads_hold(monkeypatch, prologue, granularity):
    for columns in (16384, 16400, 33001):
        check(monkeypatch, request(prologue, draw(1, columns), granularity))


@both
@every
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 65])
def test_rows(monkeypatch, prologue, granularity, rows):
    check(monkeypatch, request(prologue, draw(rows, 136), granularity), seeds=(1, 2))


@every
@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.slow
def test_types(monkeypatch, prologue, dtype):
    for granularity in GRANULARITIES:
        for columns in (17, 400, 7168):
            check(monkeypatch, request(prologue, draw(5, columns, dtype=dtype), granularity))


@both
@pytest.mark.parametrize("columns", [33, 136, 1000, 17000])
@pytest.mark.parametrize("weight_dtype", [BF16, FP16, FP32])
def test_a_residual(monkeypatch, granularity, columns, weight_dtype):
    x, residual = draw(3, columns), draw(3, columns, seed=5)
    weight = draw(columns, dtype=weight_dtype, seed=6)
    check(monkeypatch, request("rms_norm", x, granularity, other=residual, weight=weight))


@every
def test_strides_and_addresses(monkeypatch, prologue):
    """Halves of one matrix, rows of odd strides, rows that are one, columns that lie apart, and an
    address that is no multiple of 16."""
    wide = draw(9, 528)
    parts = [wide[:, :264], wide[:, 264:], wide[:, 3:259], wide[::2, 8:144], wide[:, ::2]]
    parts += [wide[:1].expand(9, -1), draw(200, 9).t(), draw(9 * 264 + 1)[1:].view(9, 264)]
    for x in parts:
        other = None if prologue == "none" else draw(*x.shape, seed=3)
        check(monkeypatch, request(prologue, x, "row", other=other))
    check(monkeypatch, request("silu_mul", parts[0], other=parts[1]))


def test_rows_beyond_32_bits(monkeypatch):
    """Of both inputs, in sparse memory: the last ones begin beyond 2^32 elements."""
    far = [sparse((70, 136), (2**26 + 256, 1), BF16) for _ in range(2)]
    for seed, x in enumerate(far):
        x.copy_(draw(70, 136, seed=seed))
    check(monkeypatch, request("silu_mul", far[0], "row", other=far[1]))


SPECIAL = {
    "zeros": [0.0, -0.0],
    "infinite": [1.0, math.inf, -math.inf, 3.0],
    "nan": [2.0, math.nan, -1.0, math.inf],
    "nothing finite": [math.nan, math.inf],
    "tiny": [1e-40, -3e-39, 1e-38],
    "below the least scale": [5e-36, 1e-36, -1e-37],
    "huge": [3e38, -1e38, 1e30, 1e-3],
    "halves": [1.0, 448.0, 17.0, 18.0, 19.0, 0.0009765625, 0.0029296875, -27.0],
}


@both
@pytest.mark.parametrize("prologue", ["none", "rms_norm"])
@pytest.mark.parametrize("values", SPECIAL)
def test_special_values(monkeypatch, prologue, granularity, values):
    given = torch.tensor(SPECIAL[values])
    picks = torch.randint(len(given), (4, 300), generator=torch.Generator().manual_seed(0))
    x = given[picks].to(BF16)
    x[0] = 0.0
    x[1, 128:] = 0.0
    check(monkeypatch, request(prologue, x, granularity))
    check(monkeypatch, request(prologue, x[:, :203].contiguous(), granularity))


def test_special_values_of_silu(monkeypatch):
    """NaN, and infinities of either sign, are those of gate / (1 + exp(-gate)) * up."""
    inf, nan = math.inf, math.nan
    gate = torch.tensor([[0.0, -0.0, inf, -inf, nan, 1.0, 88.0, -88.0, -100.0, 3e38]])
    up = torch.tensor([[2.0, 2.0, 1.0, 1.0, 1.0, inf, 2.0, 0.5, 1.0, 1.0]])
    gate, up = (x.to(BF16).expand(2, -1).contiguous() for x in (gate, up))
    given = request("silu_mul", gate, "row", other=up)
    want = portable.quantize_matrix(given)
    have = on_kernel(monkeypatch, given)
    assert torch.equal(raw(have[0]), raw(want[0]))
    assert torch.equal(have[1], want[1])


@both
@every
def test_padding_is_zeros_where_a_row_is_nan(monkeypatch, prologue, granularity):
    x = draw(2, 130)
    x[0, 7] = math.nan
    data, *_ = on_kernel(monkeypatch, request(prologue, x, granularity))
    assert not data[:, 130:].view(torch.uint8).any()


@every
def test_each_value_is_read_once_and_written_once(monkeypatch, prologue):
    for granularity in GRANULARITIES:
        x = draw(4, 2000)
        residual = draw(4, 2000, seed=1) if prologue == "rms_norm" else None
        given = request(prologue, x, granularity, other=residual)
        data, scale, summed = on_kernel(monkeypatch, given)
        moved = device().report()["statistics"]["bytes"]
        inputs = 2 * x.numel() * (1 if prologue == "none" else 2)
        weights = 4 * x.numel() if prologue == "rms_norm" else 0  # a row's threads read them again
        assert moved["global load"] == inputs + weights
        outputs = data.numel() + 4 * scale.numel() + 2 * summed.numel()
        assert moved["global store"] == outputs


# ------------------------------------------------------------------------------ as users call it


@both
def test_public_functions_take_the_kernel(monkeypatch, granularity):
    x, other, weight = draw(7, 200), draw(7, 200, seed=1), draw(200, seed=2)
    calls = (
        lambda: gemm.quantize(x, granularity),
        lambda: gemm.quantize_rms_norm(x, weight, granularity=granularity),
        lambda: gemm.quantize_rms_norm(x, weight, granularity=granularity, residual=other),
    )
    for call in calls:
        want = call()
        with device().serving_cpu_tensors(monkeypatch):
            have = call()
            assert device().report()["kernel"] == "flash8_quantize_matrix"
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")()
        for found in (have, compiled):
            assert len(found) == len(want)
            assert all(torch.equal(raw(a), raw(b)) for a, b in zip(found, want, strict=True))
    with device().serving_cpu_tensors(monkeypatch):
        data, scale = gemm.quantize_silu_mul(x, other, granularity=granularity)
    want = gemm.quantize_silu_mul(x, other, granularity=granularity)
    torch.testing.assert_close(scale, want[1], rtol=2.0**-16, atol=0.0)
    assert data.shape == want[0].shape


def test_fake_tensors_agree(monkeypatch):
    x, weight = draw(7, 200), draw(200)
    with device().serving_cpu_tensors(monkeypatch):
        for arguments in (
            (x, "row", None, None, 0.0, None),
            (x, "1x128", x, None, 0.0, None),
            (x, "1x128", None, weight, 1e-6, x),
        ):
            torch.library.opcheck(
                torch.ops.flash8.quantize_matrix.default, arguments, test_utils="test_faketensor"
            )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (MatrixRequest(draw(3, 16), "tensor"), "scales by 'tensor' are made by other kernels"),
        (MatrixRequest(draw(0, 16), "row"), "nothing to quantize"),
        (MatrixRequest(draw(3, 16), "row", amax=torch.zeros(())), "an amax is given"),
    ],
)
def test_what_has_no_kernel(given, reason):
    assert reason in hopper.refusal(given)

"""The emulated FP8 tensor core, and what promotion and the reference of P are worth."""

import math
from fractions import Fraction

import pytest
import torch

import flash8
import oracle
from flash8 import fp8
from flash8.backends.cpu import tensor_core
from flash8.tensors.float8 import E4M3, E5M2, saturating_cast
from tolerances import FP8_ACCUMULATION, FP8_SINK_KEY, rel_l2

SMALLEST_EXPONENT = {E4M3: -6, E5M2: -14}


def exponent(x, smallest=-126):
    return max(math.frexp(x)[1] - 1, smallest)


def one_instruction(a, b, c, dtypes):
    """c plus 32 products by the book, in rational arithmetic: MMA-Sim's fused dot-add."""
    low_a, low_b = (SMALLEST_EXPONENT[dtype] for dtype in dtypes)
    tops = [exponent(x, low_a) + exponent(y, low_b) for x, y in zip(a, b, strict=True) if x and y]
    tops += [exponent(c)] if c else []
    if not tops:
        return 0.0
    unit = Fraction(2) ** (max(tops) - 13)
    terms = [Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)] + [Fraction(c)]
    total = sum(math.trunc(term / unit) for term in terms) * unit
    if total == 0:
        return 0.0
    last = Fraction(2) ** (exponent(float(total)) - 13)
    return float(math.trunc(total / last) * last)


def spread_values(shape, dtype, seed):
    """float8 values over most of the type's range, some of them zero or subnormal."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.randint(-9, 5, shape, generator=g).float().exp2()
    return saturating_cast(x * (torch.rand(shape, generator=g) > 0.1), dtype).float()


@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("k", [1, 32, 96, 100])
def test_tensor_core_bit_by_bit(dtypes, k):
    a, b = spread_values((5, k), dtypes[0], 1), spread_values((k, 6), dtypes[1], 2)
    c = torch.randn(5, 6) * torch.randint(-8, 12, (5, 6)).float().exp2()
    c[0] = 0.0
    got = tensor_core.matmul(a, b, c, dtypes)
    for m in range(5):
        for n in range(6):
            value = c[m, n].item()
            for start in range(0, k, 32):
                step = slice(start, start + 32)
                value = one_instruction(a[m, step].tolist(), b[step, n].tolist(), value, dtypes)
            assert got[m, n].item() == value, (m, n)


def test_tensor_core_in_batches_and_with_nan():
    a, b = spread_values((3, 2, 700, 64), E4M3, 3), spread_values((3, 1, 64, 16), E4M3, 4)
    whole = tensor_core.matmul(a, b)
    assert torch.equal(whole[2, 1, 650:], tensor_core.matmul(a[2, 1, 650:], b[2, 0]))
    a[0, 0, 5, 7] = float("nan")
    spoiled = tensor_core.matmul(a, b)
    assert spoiled[0, 0, 5].isnan().all() and spoiled.isnan().sum() == 16
    assert torch.equal(tensor_core.matmul(a[1], torch.zeros(1, 64, 16)), torch.zeros(2, 700, 16))


def biased_values(seqlen, rows=16, dv=16):
    """std-1 logits, V of mean 0.5: what a truncating accumulator gets wrong."""
    q, k = torch.randn(1, rows, 1, 128), torch.randn(1, seqlen, 1, 128)
    v = torch.randn(1, seqlen, 1, dv) + 0.5
    return [fp8.quantize(x, "head") for x in (q, k, v)]


def error(tensors, **options):
    reference, _ = oracle.attention(*map(fp8.dequantize, tensors), **options)
    return rel_l2(flash8.flash_attn_func(*tensors, out=wide_out(tensors), **options), reference)


def wide_out(tensors):
    """fp16, whose rounding is small against what is measured here."""
    q, _, v = tensors
    return torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float16)


@pytest.mark.parametrize("p_scaling", ["block_local", "running_max"])
def test_promotion_holds_the_error_at_16k_keys(p_scaling):
    tensors = biased_values(16384)
    with fp8.study(accumulation="hopper", p_scaling=p_scaling):
        FP8_ACCUMULATION.check("promoted", error(tensors))
    with fp8.study(accumulation="hopper", promotion=False, p_scaling=p_scaling):
        assert error(tensors) > 0.08
    with (
        fp8.study(accumulation="hopper", promotion=2048, p_scaling=p_scaling),
        pytest.raises(AssertionError, match="above"),
    ):
        FP8_ACCUMULATION.check("promoted every 2048 keys", error(tensors))


@pytest.mark.slow
def test_promotion_holds_the_error_at_128k_keys():
    tensors = biased_values(131072)
    with fp8.study(accumulation="hopper"):
        FP8_ACCUMULATION.check("promoted", error(tensors))
    with fp8.study(accumulation="hopper", promotion=False):
        assert error(tensors) > 0.3


def test_promotion_interval_counts_keys():
    """64 divides a block; 192 ends in the middle of one; both lose less than 512."""
    tensors = biased_values(4096 + 37)
    errors = {}
    for keys in (64, 192, 512):
        with fp8.study(accumulation="hopper", promotion=keys):
            errors[keys] = error(tensors)
    assert errors[64] < errors[192] < errors[512]


def test_without_rounding_promotion_changes_nothing():
    tensors = biased_values(700)
    plain = flash8.flash_attn_func(*tensors).float()
    for promotion in (False, 96, 512):
        with fp8.study(promotion=promotion):
            assert rel_l2(flash8.flash_attn_func(*tensors), plain) < 1e-3


def sink_key(position, seqlen=2048):
    """One key with a logit 13 above the rest and no value, the others with values of mean 0.5."""
    q, k = torch.randn(1, 32, 1, 128), torch.randn(1, seqlen, 1, 128)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, position, :, 0] = 13.0 * 128**0.5 / 8.0
    v = torch.randn(1, seqlen, 1, 64) + 0.5
    v[:, position] = 0.0
    return [fp8.quantize(x, "head") for x in (q, k, v)]


@pytest.mark.parametrize("position", [0, 1023, 2047])
def test_block_local_reference_with_one_key_far_above_the_rest(position):
    tensors = sink_key(position)
    with fp8.study(accumulation="hopper"):
        FP8_SINK_KEY.check("O", error(tensors))


def test_the_running_maximum_fails_the_sink_bound():
    """Keys are walked from the right, so the last key spoils all others without the design."""
    tensors = sink_key(2047)
    for p_scaling in ("running_max", "none"):
        with (
            fp8.study(p_scaling=p_scaling),
            pytest.raises(AssertionError, match="above"),
        ):
            FP8_SINK_KEY.check("O", error(tensors))


def test_a_study_ends_with_its_context_and_nests():
    tensors = biased_values(2048)
    plain = flash8.flash_attn_func(*tensors)
    with fp8.study(accumulation="hopper", promotion=False) as outer:
        assert outer.accumulation == "hopper"
        lossy = flash8.flash_attn_func(*tensors)
        with fp8.study():
            assert torch.equal(flash8.flash_attn_func(*tensors), plain)
        assert torch.equal(flash8.flash_attn_func(*tensors), lossy)
    assert not torch.equal(lossy, plain)
    assert torch.equal(flash8.flash_attn_func(*tensors), plain)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(accumulation="fp16"), "accumulation"),
        (dict(p_scaling="global"), "p_scaling"),
        (dict(promotion=100), "promotion"),
        (dict(promotion=0), "promotion"),
        (dict(promotion="always"), "promotion"),
    ],
)
def test_bad_switches(arguments, name):
    with (
        pytest.raises(ValueError, match=f"{name} must be.*{next(iter(arguments.values()))}"),
        fp8.study(**arguments),
    ):
        pass

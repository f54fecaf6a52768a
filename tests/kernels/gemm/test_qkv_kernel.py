"""The QKV projection on the simulated device against its parts, bit by bit."""

import pytest
import torch

import flash8
from cases import int32
from flash8 import fp8
from flash8.backends.hopper import gemm, kernels
from flash8.ops import plan_cache
from qkv_cases import ROWS, assert_same, device, emulated, make, on_kernel
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
SLOW = pytest.mark.slow
GRANULARITIES = ("row", "1x128")
MOST, LEAST = 2**31 - 1, -(2**31)


def check(monkeypatch, projection, *, seed=0):
    want = emulated(projection)
    found = on_kernel(monkeypatch, projection, seed=seed)
    assert_same(found, want)
    return found


@pytest.mark.parametrize("rope", [None, "halves", "interleaved"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dense_sequences(monkeypatch, granularity, rope):
    """Two blocks of a sequence, the last of which has 22 tokens; more tiles than CTAs."""
    check(monkeypatch, make((2, 150), 272, (2, 1), granularity, rope=rope, bias=BF16))
    assert device().report()["kernel"] == "flash8_qkv_projection"


@pytest.mark.parametrize(
    ("tokens", "k", "heads"),
    [
        ((1, 1), 16, (1, 1)),
        ((3, 1), 128, (4, 2)),
        pytest.param((1, 127), 1168, (2, 2), marks=SLOW),
        ((2, 128), 144, (1, 1)),
        pytest.param((1, 129), 16, (8, 1), marks=SLOW),
        pytest.param((2, 300), 144, (6, 3), marks=SLOW),
    ],
)
@pytest.mark.parametrize("granularity", ["tensor", "128x128"])
def test_sizes(monkeypatch, granularity, tokens, k, heads):
    """Rows of A by 128 share scales over the ends of sequences."""
    check(monkeypatch, make(tokens, k, heads, granularity, rope="halves", bias=FP16))


@pytest.mark.parametrize("rope", [None, "halves", "interleaved"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_norms(monkeypatch, granularity, rope):
    check(monkeypatch, make((2, 70), 160, (2, 1), granularity, rope=rope, norms=True, bias=FP32))


def test_a_norm_of_one_side(monkeypatch):
    projection = make((1, 70), 160, norms=True)
    check(monkeypatch, projection._replace(q_norm=None))
    check(monkeypatch, projection._replace(k_norm=None))


@pytest.mark.parametrize("rotary_dim", [16, 48, 112])
def test_only_the_first_channels_turn(monkeypatch, rotary_dim):
    check(monkeypatch, make((1, 70), 144, rope="interleaved", rotary_dim=rotary_dim))


@pytest.mark.parametrize("rope", ["halves", "interleaved"])
def test_positions(monkeypatch, rope):
    """From an offset on. The nearest row of the tables where there is none."""
    offsets = [3, ROWS - 60, -4]
    check(monkeypatch, make((3, 70), 144, rope=rope, offsets=offsets))


#: Offsets, and rows of A: sequences of no token first, last and in between, that end with a block
#: or not, and rows of no sequence.
PACKS = {
    "one": ([0, 200], 200),
    "ragged": ([0, 0, 130, 131, 131, 259, 270, 270], 277),
    "blocks": ([0, 128, 128, 256], 256),
    "nothing": ([0, 0], 40),
}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_packed_sequences(monkeypatch, granularity, pack):
    offsets, total = PACKS[pack]
    starts = [(5 * i) % 7 for i in range(len(offsets) - 1)]
    given = {"rope": "halves", "offsets": starts, "cu_seqlens": offsets}
    check(monkeypatch, make((total,), 144, (1, 1), granularity, norms=True, **given))


@pytest.mark.parametrize("sequences", [pytest.param(33, marks=SLOW), 65])
def test_many_sequences(monkeypatch, sequences):
    offsets = [i * i % 5 + 3 * i for i in range(sequences + 1)]
    check(monkeypatch, make((offsets[-1],), 16, (1, 1), cu_seqlens=offsets, rope="interleaved"))


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_do_not_count(monkeypatch, packed):
    """They hold NaN and large values: no descale tells, and v has zeros there."""
    where = {"cu_seqlens": [0, 140, 280]} if packed else {}
    projection = make((280,) if packed else (2, 140), 144, seqused=[70, 133], **where)
    rows = projection.a.view(torch.uint8).view(280, -1)
    rows[70:140], rows[274] = 0x7E, 0x7F
    found = check(monkeypatch, projection)
    rows[70:140], rows[273:] = 0, 0
    for x, y in zip(found[1::2], emulated(projection)[1::2], strict=True):
        assert torch.equal(x, y) and not x.isnan().any()


def test_rows_of_no_sequence_do_not_count(monkeypatch):
    projection = make((200,), 144, cu_seqlens=[0, 40, 150], rope="halves")
    rows = projection.a.view(torch.uint8)
    rows[150:170], rows[170:] = 0x7E, 0x7F
    found = check(monkeypatch, projection)
    assert all(x.isfinite().all() for x in found[1::2])


@pytest.mark.parametrize("rope", [None, "halves", "interleaved"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_extreme_values(monkeypatch, granularity, rope):
    """NaN, infinities, a block of zeros, one of small values and one of large ones."""
    projection = make((1, 640), 144, (1, 1), granularity, rope=rope)
    a, scale = projection.a.view(torch.uint8)[0], projection.scale_a
    a[3, 100] = 0x7F  # NaN
    scale[5] = torch.inf
    scale[6] = 2.0**122
    a[128:256] = 0
    scale[256:384] *= 2.0**-100
    scale[384:512] *= 2.0**90
    found = check(monkeypatch, projection)
    assert found[0][0, 3].float().isnan().any()
    assert all((x[0, :, 1] == 1.0).all() for x in found[1::2])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "offsets",
    [
        [0, 150, 180, 60, 200],
        [0, 130, 20, 133, 200],
        [MOST] * 5,
        [LEAST] * 5,
        [-1, 131, 1, 68, MOST],
        [60, 100, 150, 150, 180],
    ],
    ids=str,
)
def test_offsets_that_mean_nothing(monkeypatch, granularity, offsets):
    """No row is written twice or outside, and the next projection is right."""
    right = make((200,), 144, (1, 1), granularity, cu_seqlens=[0, 40, 150, 150, 200], rope="halves")
    values = int32([3, MOST, LEAST, -7])
    wrong = right._replace(cu_seqlens=int32(offsets), seqused=values)
    on_kernel(monkeypatch, wrong._replace(rope=right.rope._replace(offsets=values)))
    check(monkeypatch, right)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_other_schedules(monkeypatch, granularity):
    given = {"rope": "halves", "norms": True, "cu_seqlens": [0, 130, 130, 201]}
    projection = make((201,), 400, (2, 1), granularity, **given)
    want = emulated(projection)
    for seed in range(1, 6):
        assert_same(on_kernel(monkeypatch, projection, seed=seed), want)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_false_alarm_in_100_seeds(monkeypatch, granularity):
    given = {"rope": "interleaved", "cu_seqlens": [0, 130, 130, 201]}
    projection = make((201,), 784, (2, 1), granularity, **given)
    want = emulated(projection)
    for seed in range(100):
        assert_same(on_kernel(monkeypatch, projection, seed=seed), want)


def test_views_that_tma_cannot_read(monkeypatch):
    projection = make((2, 9), 64)
    wide = torch.zeros(2, 9, 71).to(E4M3)
    wide[..., 3:67] = projection.a
    tables = projection._replace(a=wide[..., 3:67])
    assert_same(on_kernel(monkeypatch, tables), emulated(projection))


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=SLOW)])
def test_attention_takes_it_as_it_is(monkeypatch, packed):
    """From x8 to O by two launches, with the bits of a product in fp32, the quantizer for each of
    q, k and v, and the forward."""
    where = {"cu_seqlens": [0, 50, 180]} if packed else {}
    p = make((180,) if packed else (2, 90), 144, (2, 1), rope="halves", bias=BF16, **where)
    names = []
    with device().serving_cpu_tensors(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(plan_cache, "may_launch", lambda *_: False)
        find = kernels.kernel

        def named(variant):
            names.append(variant.name)
            return find(variant)

        patch.setattr(kernels, "kernel", named)
        cos, sin, *_ = p.rope
        q, k, v = flash8.gemm.qkv_projection(
            *p[:4],
            heads_q=2,
            heads_kv=1,
            bias=p.bias,
            rotary_cos=cos,
            rotary_sin=sin,
            rotary_interleaved=False,
            cu_seqlens=p.cu_seqlens,
        )
        have = _attend(q, k, v, p.cu_seqlens)
        x = torch.zeros(180, 512)
        gemm.scaled_mm(p.product, x)
        x = x.view(*p.a.shape[:-1], 4, 128)
        rope, given = (cos, sin, None, False), {"cu_seqlens": p.cu_seqlens}
        q2 = fp8.quantize(x[..., :2, :], "block", rope=rope, **given)
        k2 = fp8.quantize(x[..., 2:3, :], "block", rope=rope, **given)
        v2 = fp8.quantize(x[..., 3:, :], "block", v_colmajor=True, **given)
        want = _attend(q2, k2, v2, p.cu_seqlens)
    assert torch.equal(have, want) and have.abs().sum() > 0.0
    projected, attended = names[:2]
    assert projected == "qkv_projection_block" and "vcolmajor" in attended
    assert len(names) == 2 + 5 and names[-1] == attended  # a product, three casts, the forward


def _attend(q, k, v, cu_seqlens):
    if cu_seqlens is None:
        return flash8.flash_attn_func(q, k, v, causal=True)
    return flash8.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 130, 130, causal=True)

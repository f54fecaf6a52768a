"""The quantizer: scales, special values, layouts, rotation, smoothing, and bad input."""

import pytest
import torch

import flash8
from cases import cumulative, int32
from flash8 import fp8
from flash8.tensors.float8 import E4M3, E5M2, MAX
from flash8.tensors.rotary import apply_rotary
from tolerances import rel_l2

# Rounding to nearest with 3 bits of mantissa, for values that are not subnormal.
HALF_ULP = {E4M3: 2.0**-4, E5M2: 2.0**-3}


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_descale_times_data_is_the_input(dtype, x_dtype):
    x = torch.randn(2, 300, 3, 64).to(x_dtype)
    s = fp8.quantize(x, dtype=dtype)
    assert s.data.dtype == dtype and s.descale.dtype == torch.float32 and s.descale.dim() == 0
    assert s.descale.item() == pytest.approx(x.abs().max().item() / MAX[dtype], rel=1e-6)
    assert s.data.float().abs().max() == MAX[dtype]
    back = fp8.dequantize(s, torch.float64)
    error = (back - x.double()).abs()
    subnormal = 2.0 ** (-9 if dtype == E4M3 else -16) * s.descale.item()
    assert (error <= (x.double().abs() * HALF_ULP[dtype]).clamp_min(subnormal) * 1.0001).all()
    assert fp8.dequantize(s).dtype == torch.float32


GRANULARITIES = ["tensor", "head", "block", "page"]


def by_hand(x, granularity):
    """Descale of every token and head of x, (..., heads), with loops."""
    amax = x.abs().amax(-1)
    out = torch.zeros_like(amax)
    for b in range(x.shape[0]):
        for h in range(x.shape[2]):
            for t in range(x.shape[1]):
                block = slice(t // 128 * 128, t // 128 * 128 + 128)
                region = dict(
                    tensor=amax, head=amax[b, :, h], block=amax[b, block, h], page=amax[b, :, h]
                )
                out[b, t, h] = region[granularity].max() / 448.0
    return out


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_shares_a_descale(granularity):
    x = torch.randn(2, 150, 2, 16) * torch.arange(1, 151)[:, None, None]
    x = x * torch.tensor([1.0, 30.0])[:, None]
    s = fp8.quantize(x, granularity)
    shapes = dict(tensor=(), head=(2, 2), block=(2, 2, 2), page=(2, 2, 1))
    assert tuple(s.descale.shape) == shapes[granularity]
    expected = by_hand(x, granularity)[..., None]
    assert torch.equal(fp8.dequantize(s), s.data.float() * expected.float())


def test_channels_have_descales_of_their_own():
    lengths = (130, 0, 1)
    cu = cumulative(lengths)
    x = torch.randn(134, 2, 16) * torch.logspace(-2, 2, 16)
    x[131:] = 1e6  # rows that belong to nobody
    s = fp8.quantize(x, "channel", cu_seqlens=cu, smooth_v=True)
    assert s.descale.shape == (3, 2, 16)
    assert (s.data[:130].float().abs().amax(dim=0) == 448.0).all()
    assert (s.descale[1] == 1.0).all()
    alone = fp8.quantize(x[None, :130], "channel", smooth_v=True)
    torch.testing.assert_close(s.descale[:1], alone.descale)  # means are summed in other orders
    back = fp8.dequantize(s)[:131]
    bound = (x[:131] - s.mean[[0] * 130 + [2]]).abs() / 16 + s.descale[[0] * 130 + [2]] / 512
    assert ((back - x[:131]).abs() <= bound * 1.01).all()


def test_a_descale_per_channel_may_be_shared_by_the_batch():
    x = torch.randn(2, 2, 2, 16)
    shared = torch.rand(2, 16).add(0.5) / 64
    s = fp8.quantize(x, "channel", descale=shared)
    every = fp8.quantize(x, "channel", descale=shared.expand(2, 2, 16).contiguous())
    assert torch.equal(s.data.float(), every.data.float())
    assert torch.equal(fp8.dequantize(s), fp8.dequantize(every))
    with pytest.raises(ValueError, match=r"descale per channel must have shape.*got \(2, 2\)"):
        fp8.quantize(x, "channel", descale=torch.ones(2, 2))


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
def test_packed_is_dense_sequence_by_sequence(granularity):
    lengths = (130, 0, 1, 256, 200)
    cu = cumulative(lengths)
    x = torch.randn(cu[-1] + 3, 2, 16) * torch.rand(int(cu[-1]) + 3, 1, 1) * 10
    x[int(cu[-1]) :] = 1e6  # rows that belong to nobody
    s = fp8.quantize(x, granularity, cu_seqlens=cu, smooth_k=True)
    blocks = (1, 2, x.shape[0] // 128 + 5)
    shapes = dict(tensor=(), head=(5, 2), block=blocks)
    assert tuple(s.descale.shape) == shapes[granularity]
    back = fp8.dequantize(s)
    for b, length in enumerate(lengths):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        if granularity == "tensor" or length == 0:
            continue
        alone = fp8.quantize(x[None, rows], granularity, smooth_k=True)
        torch.testing.assert_close(s.mean[b], alone.mean[0])
        torch.testing.assert_close(back[rows], fp8.dequantize(alone)[0])
        offset = int(fp8.block_offsets(cu)[b])
        if granularity == "block":
            count = alone.descale.shape[2]
            torch.testing.assert_close(s.descale[:, :, offset : offset + count], alone.descale)
    assert back[: int(cu[-1])].abs().max() < 100


@pytest.mark.parametrize("lengths", [(1, 1, 1), (128, 128), (127, 129, 0, 0, 255), (500,), (0,)])
def test_blocks_of_packed_sequences_never_overlap(lengths):
    cu = cumulative(lengths)
    starts = fp8.block_offsets(cu).tolist()
    counts = [-(-length // 128) for length in lengths]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert ends[-1] <= int(cu[-1]) // 128 + len(lengths)


def test_unused_rows_do_not_count():
    x = torch.randn(2, 200, 2, 16)
    poisoned = x.clone()
    poisoned[0, 70:], poisoned[1, 200:] = 1e9, 0.0
    used = int32((70, 200))
    for granularity in ("tensor", "head", "block"):
        s = fp8.quantize(poisoned, granularity, seqused=used, smooth_k=True)
        assert (s.descale <= 5.0 / 448).sum() >= s.descale.numel() - 2
        assert s.mean.abs().max() < 1.0
    alone = fp8.quantize(x[:1, :70], "head", smooth_k=True)
    torch.testing.assert_close(
        fp8.quantize(poisoned, "head", seqused=used, smooth_k=True).descale[:1], alone.descale
    )


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_special_values(dtype):
    limit = MAX[dtype]
    x = torch.tensor([1.0, -2.0, float("inf"), -float("inf"), float("nan"), 0.0]).view(1, 6, 1, 1)
    s = fp8.quantize(x, dtype=dtype)
    assert s.descale.item() == pytest.approx(2.0 / limit)  # of the finite values
    values = s.data.float().flatten()
    assert values[:4].tolist() == [limit / 2, -limit, limit, -limit]
    assert values[4].isnan() and values[5] == 0.0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("nothing", [0.0, float("nan"), float("inf")])
def test_nothing_finite_has_descale_one(granularity, nothing):
    s = fp8.quantize(
        torch.full((1, 130, 2, 8), nothing), granularity, smooth_v=granularity == "head"
    )
    assert (s.descale == 1.0).all()
    if s.mean is not None:
        assert (s.mean == 0.0).all()


@pytest.mark.parametrize("tiny", [1e-44, 1e-40, 1e-37])
def test_the_inverse_of_a_descale_is_finite(tiny):
    s = fp8.quantize(torch.full((1, 2, 1, 8), tiny, dtype=torch.float64))
    assert (
        s.descale > 0 and torch.isfinite(1.0 / s.descale) and torch.isfinite(s.data.float()).all()
    )


def test_empty_sequences():
    for granularity in ("tensor", "head", "block"):
        s = fp8.quantize(torch.zeros(2, 0, 3, 16), granularity, smooth_k=True)
        assert (s.descale == 1.0).all() and s.data.numel() == 0
        assert fp8.dequantize(s).shape == (2, 0, 3, 16)


def test_a_given_descale_is_used_and_saturates():
    s = fp8.quantize(torch.tensor([1.0, 100.0]).view(1, 2, 1, 1), descale=torch.tensor(0.125))
    assert s.descale == 0.125 and s.data.float().flatten().tolist() == [8.0, 448.0]


def test_amax_is_raised_beside_a_given_descale():
    x = torch.tensor([1.0, -100.0, float("inf"), float("nan")]).view(1, 4, 1, 1)
    for before, after in ((0.0, 100.0), (7.0, 100.0), (1000.0, 1000.0)):
        amax = torch.tensor(before)
        s = fp8.quantize(x, descale=torch.tensor(0.125), amax=amax, seqused=int32((3,)))
        assert amax == after and s.descale == 0.125


# ---------------------------------------------------------------------------- transposed

KEYS_OF_PLACES = [2 * q + r % 2 + 8 * (r // 2) for q in range(4) for r in range(4)]
CHANNELS_OF_ROWS = [2 * g + h for h in range(2) for g in range(8)]


@pytest.mark.parametrize("granularity", ["tensor", "head", "block"])
def test_v_colmajor_has_the_order_of_the_accumulators(granularity):
    x = torch.randn(2, 150, 3, 16)
    used = int32((150, 20))
    plain = fp8.quantize(x, granularity, seqused=used)
    s = fp8.quantize(x, granularity, seqused=used, v_colmajor=True)
    assert (
        s.data.shape == (2, 3, 16, 256)
        and s.v_colmajor_tokens == 150
        and torch.equal(s.descale, plain.descale)
    )
    data, expected = s.data.float(), plain.data.float()
    for place in range(256):
        key = place // 16 * 16 + KEYS_OF_PLACES[place % 16]
        for b, count in enumerate((150, 20)):
            wanted = expected[b, key] if key < count else torch.zeros(3, 16)
            assert torch.equal(data[b, :, :, place], wanted[:, CHANNELS_OF_ROWS])
    everything = fp8.quantize(x, granularity, v_colmajor=True)
    assert torch.equal(fp8.dequantize(everything), fp8.dequantize(fp8.quantize(x, granularity)))


def test_transposed_and_packed_is_dense_sequence_by_sequence():
    lengths = (130, 0, 1, 256)
    cu = cumulative(lengths)
    x = torch.randn(int(cu[-1]) + 3, 2, 16)
    s = fp8.quantize(x, "block", cu_seqlens=cu, v_colmajor=True)
    blocks = x.shape[0] // 128 + 4
    assert s.data.shape == (2, 16, 128 * blocks)
    owned = torch.zeros(blocks, dtype=torch.bool)
    for b, length in enumerate(lengths):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        alone = fp8.quantize(x[None, rows], "block", v_colmajor=True)
        first = int(fp8.block_offsets(cu)[b])
        count = alone.descale.shape[2]
        places = s.data[:, :, 128 * first : 128 * (first + count)]
        assert torch.equal(places.float(), alone.data[0].float())
        owned[first : first + count] = length > 0
    assert (s.data.float().unflatten(-1, (-1, 128))[:, :, ~owned] == 0.0).all()
    plain = fp8.quantize(x, "block", cu_seqlens=cu)
    rows = int(cu[-1])
    assert torch.equal(fp8.dequantize(s)[:rows], fp8.dequantize(plain)[:rows])


@pytest.mark.parametrize("width", [8, 24, 32])
def test_attention_takes_a_transposed_v(width):
    q, k = (fp8.quantize(torch.randn(2, 140, 2, 32), "block") for _ in range(2))
    v = fp8.quantize(torch.randn(2, 140, 2, width), "block")
    v_colmajor = fp8.quantize(fp8.dequantize(v), descale=v.descale, v_colmajor=True)
    expected = flash8.flash_attn_func(q, k, v, causal=True)
    assert expected.shape == (2, 140, 2, width)
    assert torch.equal(flash8.flash_attn_func(q, k, v_colmajor, causal=True), expected)
    with pytest.raises(ValueError, match="k must not be v_colmajor"):
        flash8.flash_attn_func(q, v_colmajor, v)


def test_a_transposed_v_must_be_of_the_keys():
    q, k, v = (fp8.quantize(torch.randn(2, n, 2, 32), v_colmajor=n == 141) for n in (9, 140, 141))
    with pytest.raises(ValueError, match=r"v_colmajor v must be of k's 140 tokens.*got 141"):
        flash8.flash_attn_func(q, k, v)
    with pytest.raises(ValueError, match="v_cache must lie by token"):
        flash8.flash_attn_with_kvcache(q, k, v, cache_seqlens=3)


# ------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize(
    ("d", "block"), [(8, 8), (64, 64), (96, 32), (128, 128), (80, 16), (512, 512)]
)
def test_rotation_is_orthogonal_and_inverts(d, block):
    rotation = fp8.Rotation(d, seed=3)
    matrix = rotation.apply(torch.eye(d, dtype=torch.float64))
    assert rotation.block == block
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(d, dtype=torch.float64))
    assert (matrix.abs() - block**-0.5).abs()[matrix != 0].max() < 1e-12
    assert (matrix != 0).sum() == d * block
    x = torch.randn(2, 3, d, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ matrix)
    torch.testing.assert_close(rotation.invert(rotation.apply(x)), x)


def test_signs_come_from_the_seed_alone():
    torch.manual_seed(1)
    first = fp8.Rotation(128, seed=5).signs(torch.device("cpu"))
    torch.manual_seed(2)
    assert torch.equal(first, fp8.Rotation(128, seed=5).signs(torch.device("cpu")))
    assert not torch.equal(first, fp8.Rotation(128, seed=6).signs(torch.device("cpu")))
    assert not torch.equal(first, fp8.Rotation(128, 5 + 2**32).signs(torch.device("cpu")))
    assert 40 < (first > 0).sum() < 88
    assert first[:8].tolist() == fp8.Rotation(8, seed=5).signs(torch.device("cpu")).tolist()


def test_rotation_spreads_an_outlier():
    x = torch.randn(1, 64, 1, 128)
    x[0, 5, 0, 17] = 1000.0
    plain, rotated = fp8.quantize(x), fp8.quantize(x, hadamard=True)
    assert rotated.descale < 0.12 * plain.descale
    assert rel_l2(fp8.dequantize(rotated), x) < 0.04
    assert rotated.rotation == fp8.Rotation(128)
    assert fp8.quantize(x, hadamard=7).rotation == fp8.Rotation(128, 7)


# ---------------------------------------------------------------- smoothing and position


def test_smoothing_takes_the_mean_off():
    x = torch.randn(2, 300, 2, 16) + 50.0
    s = fp8.quantize(x, "head", smooth_k=True)
    torch.testing.assert_close(s.mean, x.mean(dim=1))
    assert s.descale.max() < 6.0 / 448 and fp8.quantize(x, "head").descale.min() > 50.0 / 448
    assert (fp8.dequantize(s) - x).abs().max() < 0.3
    given = fp8.quantize(x, "head", smooth_v=x[:, :256].mean(dim=1))
    assert (fp8.dequantize(given) - x).abs().max() < 0.3
    shared = fp8.quantize(x.unflatten(1, (3, 100)).flatten(0, 1), "page", smooth_k=x.mean((0, 1)))
    assert (
        shared.mean.shape == (2, 16)
        and (fp8.dequantize(shared) - x.view(6, 100, 2, 16)).abs().max() < 0.3
    )


def test_mean_ignores_what_is_not_finite():
    x = torch.ones(1, 4, 1, 8)
    x[0, 1], x[0, 2] = float("nan"), float("inf")
    s = fp8.quantize(x, smooth_k=True)
    assert (s.mean == 1.0).all()
    back = fp8.dequantize(s)
    assert back[0, 1].isnan().all() and (back[0, 0] == 1.0).all() and (back[0, 2] > 1.0).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_position_comes_before_mean_and_rotation(interleaved):
    angles = torch.arange(60)[:, None] * torch.rand(8)
    cos, sin = angles.cos(), angles.sin()
    x, cu = torch.randn(55, 2, 32), cumulative((20, 35))
    offsets = int32((3, 11))
    positions = torch.cat((torch.arange(20) + 3, torch.arange(35) + 11))
    turned = apply_rotary(x, cos, sin, positions, interleaved=interleaved)
    rope = fp8.Rope(cos, sin, offsets, interleaved)
    options = dict(cu_seqlens=cu, smooth_k=True, hadamard=True)
    fused = fp8.quantize(x, "head", rope=rope, **options)
    apart = fp8.quantize(turned, "head", **options)
    assert torch.equal(fused.data.float(), apart.data.float())
    assert torch.equal(fused.mean, apart.mean)
    dense = fp8.quantize(x[None, :20], rope=(cos, sin))
    zero = apply_rotary(x[:20], cos, sin, torch.arange(20), interleaved=True)
    assert torch.equal(dense.data.float(), fp8.quantize(zero[None]).data.float())


def test_a_scaled_tensor_is_frozen():
    s = fp8.quantize(torch.randn(1, 4, 2, 8))
    assert s.shape == (1, 4, 2, 8) and s.dtype == E4M3 and s.device.type == "cpu"
    with pytest.raises(AttributeError):
        s.descale = torch.ones(())


def test_a_scaled_tensor_prints_one_line():
    x = torch.randn(2, 300, 4, 8)
    s = fp8.quantize(x, "block", smooth_v=True, v_colmajor=True)
    shape = tuple(s.data.shape)
    text = f"ScaledTensor(float8_e4m3fn {shape}, descale (2, 4, 3) by block, mean, v_colmajor, cpu)"
    assert repr(s) == text


# --------------------------------------------------------------------------------- bad input

X = torch.randn(2, 10, 2, 16)
PACKED = torch.randn(20, 2, 16)
COS = torch.ones(4, 8)
BAD = {
    "token": (X, dict(granularity="token"), ValueError, "granularity.*'token'.*multiply per score"),
    "granularity": (X, dict(granularity="row8"), ValueError, "granularity.*'row8'"),
    "dtype of x": (X.int(), {}, TypeError, "x must have dtype.*int32"),
    "quantized x": (X.to(E4M3), {}, TypeError, "x must have dtype.*float8"),
    "not a tensor": ([1.0], {}, TypeError, "x must be a torch.Tensor"),
    "dtype": (X, dict(dtype=torch.int8), TypeError, "dtype must be.*e4m3fn.*int8"),
    "rank": (X[0], {}, ValueError, "x must have 4 dimensions.*cu_seqlens"),
    "packed rank": (X, dict(cu_seqlens=int32((0, 5))), ValueError, "x must have 3 dimensions"),
    "cu_seqlens dtype": (
        PACKED,
        dict(cu_seqlens=torch.tensor([0, 20], dtype=torch.int16)),
        TypeError,
        "cu_seqlens",
    ),
    "page and lengths": (
        PACKED,
        dict(granularity="page", cu_seqlens=int32((0, 20))),
        ValueError,
        "x must have 3|page",
    ),
    "seqused": (X, dict(seqused=int32((1, 2, 3))), ValueError, r"seqused.*\(2,\).*\(3,\)"),
    "head_dim": (X[..., :12], dict(hadamard=True), ValueError, "multiple of 8.*12"),
    "seed": (X, dict(hadamard=-1), ValueError, "seed.*-1"),
    "hadamard": (X, dict(hadamard="yes"), TypeError, "hadamard.*'yes'"),
    "rotation": (X, dict(hadamard=fp8.Rotation(32)), ValueError, "hadamard.*16.*32"),
    "smooth": (X, dict(smooth_k=1), TypeError, "smooth_k must be a bool.*1"),
    "both": (X, dict(smooth_k=True, smooth_v=True), ValueError, "smooth_k and smooth_v"),
    "mean": (X, dict(smooth_k=torch.ones(3, 16)), ValueError, r"mean.*\(2, 16\).*\(3, 16\)"),
    "page mean": (X, dict(granularity="page", smooth_k=True), ValueError, "page.*True"),
    "amax alone": (X, dict(amax=torch.zeros(())), ValueError, "amax.*descale=None"),
    "amax of heads": (
        X,
        dict(amax=torch.zeros(2), descale=torch.ones(())),
        ValueError,
        r"amax.*\(2,\)",
    ),
    "descale": (X, dict(descale=torch.ones((), dtype=torch.float64)), TypeError, "descale"),
    "transposed pages": (X, dict(granularity="page", v_colmajor=True), ValueError, "v_colmajor"),
    "v_colmajor": (X, dict(v_colmajor=1), TypeError, "v_colmajor must be a bool"),
    "rope": (X, dict(rope=(COS, COS)), ValueError, "rope.cos.*up to 9.*4"),
    "rope as a tensor": (X, dict(rope=torch.ones(2, 4, 8)), TypeError, "rope must be a Rope or"),
    "rope width": (X, dict(rope=(torch.ones(9, 9),) * 2), ValueError, "rope.cos.*8.*9"),
    "rope pair": (X, dict(rope=(COS, COS[:2])), ValueError, r"rope.sin.*\(4, 8\).*\(2, 8\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    x, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        fp8.quantize(x, **options)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "head", "block", "channel"])
def test_tokens_of_no_sequence_are_zeros(granularity, transpose):
    ends = torch.zeros(1, dtype=torch.int32)
    x = torch.full((3, 2, 32), 7.0)
    given = {"cu_seqlens": ends, "v_colmajor": transpose, "smooth_v": True}
    s = fp8.quantize(x, granularity, rope=(torch.ones(4, 16), torch.zeros(4, 16)), **given)
    assert not s.data.float().any() and torch.equal(s.descale, torch.ones_like(s.descale))
    assert s.mean.shape == (0, 2, 32)


def test_dequantize_takes_scaled_tensors_only():
    with pytest.raises(TypeError, match="x must be a ScaledTensor"):
        fp8.dequantize(X)


def test_fp8_is_imported_when_it_is_used():
    assert flash8.fp8 is fp8 and flash8.fp8_attention is fp8.fp8_attention

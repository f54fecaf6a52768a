"""Index tensors that only the device sees, with nonsense in them, in the quantizer's kernels."""

import pytest
import torch

from cases import cumulative, int32
from flash8 import fp8
from flash8.backends.cpu import append_quantized as portable_append
from flash8.backends.hopper import append_quantized as appender
from flash8.call.request import Appended
from flash8.tensors.float8 import E4M3
from flash8.tensors.rotary import Rope
from hostile_indices import LEAST, LENGTHS, MOST, OFFSETS
from quantizer_cases import assert_equal, draw, tables
from quantizer_device import changed_kernels, device, kernels
from simulated_device import missing_compiler

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel"),
]

STEPS = {
    "by tensor": ("tensor", {}),
    "by block, transposed": ("block", {"v_colmajor": True}),
    "by head, smoothed": ("head", {"smooth_k": True}),
}


def quantized(monkeypatch, granularity, cu_seqlens, rope=None, seqused=None, **options):
    x = draw(sum(LENGTHS), 2, 64)
    given = [x, cu_seqlens, seqused, *(rope or ())]
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    with kernels(monkeypatch, *tensors):
        return fp8.quantize(
            x, granularity, cu_seqlens=cu_seqlens, rope=rope, seqused=seqused, **options
        )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets(monkeypatch, offsets, steps):
    """Nothing outside is read or written, no row by two CTAs, and the next call is right."""
    granularity, options = STEPS[steps]
    right = quantized(monkeypatch, granularity, cumulative(LENGTHS), **options)
    quantized(monkeypatch, granularity, int32(offsets), **options)
    assert_equal(quantized(monkeypatch, granularity, cumulative(LENGTHS), **options), right)


@pytest.mark.parametrize("steps", STEPS)
def test_more_sequences_than_threads(monkeypatch, steps):
    """Offsets that go up and down, so that every step of the search may bound a sequence's rows."""
    generator = torch.Generator().manual_seed(3)
    offsets = torch.randint(-300, 600, (300,), generator=generator)
    granularity, options = STEPS[steps]
    quantized(monkeypatch, granularity, int32([0, *offsets.tolist()]), **options)


#: A bound of a sequence's rows that is left out, and offsets that need it.
BOUNDS = {
    "begin": (
        ("tokens.cuh", "begin = max(begin, middle_begin);", "begin = middle_begin;"),
        [0, 150, 180, 60, 200],
    ),
    "end": (
        ("tokens.cuh", "end = min(end, middle_begin);", "end = middle_begin;"),
        [0, 130, 20, 133, 200],
    ),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_sequences_that_overlap_are_a_race(monkeypatch, tmp_path, bound):
    edit, values = BOUNDS[bound]
    registry = changed_kernels(tmp_path, *edit)
    offsets = int32(values)
    quantized(monkeypatch, "block", offsets)
    monkeypatch.setattr(device(), "_registry", registry)
    with pytest.raises(RuntimeError, match="LAUNCH_FAILED"):
        quantized(monkeypatch, "block", offsets)
    assert "race" in device().last_error()


@pytest.mark.parametrize("values", [[MOST] * 4, [LEAST] * 4, [-1, 131, 1, 68]], ids=str)
def test_used_lengths_and_positions(monkeypatch, values):
    offsets = cumulative(LENGTHS)
    found = quantized(monkeypatch, "block", offsets, seqused=int32(values))
    effective = torch.minimum(int32(values).clamp(min=0), int32(LENGTHS))
    assert_equal(found, quantized(monkeypatch, "block", offsets, seqused=effective))
    cos, sin = tables(32)
    rope = Rope(cos, sin, int32(values), True)
    quantized(monkeypatch, "head", offsets, rope=rope)


WHERE = {
    "lengths": {"starts": [MOST, LEAST, -3, 199]},
    "rows": {"starts": [0, 0, 0, 0], "kv_batch_idx": [-1, 4, MOST, LEAST]},
    "pages": {"starts": [0, 5, MOST, 30], "page_table": [[-1, 9], [MOST, LEAST], [0, 1], [0, 2]]},
}


@pytest.mark.parametrize("name", WHERE)
def test_tokens_without_a_place_are_dropped(monkeypatch, name):
    given = {
        key: int32(x) if key != "page_table" else torch.tensor(x).int()
        for key, x in WHERE[name].items()
    }
    cache = draw(4, 200 if name != "pages" else 16, 2, 64, seed=4).to(E4M3)
    before = cache.clone()
    x = draw(4, 20, 2, 64, seed=5)
    descale = torch.full((4, 2), 0.02)
    starts = given.pop("starts")
    rest = (None, given.get("page_table"), given.get("kv_batch_idx"))
    with kernels(monkeypatch, x, cache, starts, descale, *given.values()):
        appender.append(Appended(cache, x, starts, *rest, descale, None, None))
    changed = (cache.view(torch.uint8) != before.view(torch.uint8)).flatten(2).any(dim=2)
    allowed = torch.zeros_like(changed)
    if name == "lengths":
        allowed[3, 199] = True
    if name == "pages":
        allowed[2, 14:] = True  # of sequence 3: positions 30 and 31
    assert not changed[~allowed].any() and changed[allowed].all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cache_whose_descale_is_none_gets_nan(monkeypatch, value):
    cache = draw(4, 40, 2, 64, seed=4).to(E4M3)
    portable = cache.clone()
    x, starts = draw(4, 20, 2, 64, seed=5), int32([0, 3, 20, 7])
    descale = torch.full((4, 2), 0.02)
    descale[1, 0] = value
    rest = (None, None, None, descale, None, None)
    with kernels(monkeypatch, x, cache, starts, descale):
        appender.append(Appended(cache, x, starts, *rest))
    portable_append.append(Appended(portable, x, starts, *rest))
    assert cache[1, 3:23, 0].float().isnan().all()
    assert not cache[:, :, 1].float().isnan().any() and not cache[0].float().isnan().any()
    assert torch.equal(cache.float().nan_to_num(9.0), portable.float().nan_to_num(9.0))

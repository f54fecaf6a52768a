"""Index tensors that only the device sees, with nonsense in them, in the quantizer's kernels."""

import pytest
import torch

from cases import cumulative, int32
from flash8 import fp8
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
        ("packed_block.cuh", "begin = max(begin, middle_begin);", "begin = middle_begin;"),
        [0, 150, 180, 60, 200],
    ),
    "end": (
        ("packed_block.cuh", "end = min(end, middle_begin);", "end = middle_begin;"),
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

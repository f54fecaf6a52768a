"""flash8.varlen: packing, unpacking and index tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash8 import varlen

LENGTHS = [3, 0, 5, 1, 0]


def _mask_from_strategy(rows: list[list[bool]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


masks = st.integers(1, 9).flatmap(
    lambda seqlen: st.lists(
        st.lists(st.booleans(), min_size=seqlen, max_size=seqlen), min_size=1, max_size=6
    ).map(_mask_from_strategy)
)


@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor(LENGTHS), torch.tensor(LENGTHS).int()])
def test_cu_seqlens_from_lengths(lengths):
    cu_seqlens = varlen.cu_seqlens_from_lengths(lengths)
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 3, 3, 8, 9, 9]


def test_cu_seqlens_from_no_lengths():
    assert varlen.cu_seqlens_from_lengths([]).tolist() == [0]


def test_cu_seqlens_from_lengths_device():
    assert varlen.cu_seqlens_from_lengths([1, 2], device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, -2], ValueError, r"lengths must be >= 0, got -2 at 1"),
        ([1, 2.5], TypeError, r"entry 1 is 2.5"),
        ([True], TypeError, r"entry 0 is True"),
        (torch.tensor([1.0]), TypeError, r"lengths .*float32"),
        (torch.ones(2, 2, dtype=torch.int32), ValueError, r"lengths .*\(2, 2\)"),
        ([2**31 - 1, 1], ValueError, r"int32 offsets\), got 2147483648"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        varlen.cu_seqlens_from_lengths(lengths)


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        ([0, 1, 2, 0, 1, 0], [0, 3, 5, 6]),
        ([5, 6, 7, 0, 1], [0, 3, 5]),
        ([0, 1, 4, 5], [0, 2, 4]),
        ([0, 0, 0], [0, 1, 2, 3]),
        ([[0, 1, 2], [3, 4, 0]], [0, 3, 5, 6]),
        ([], [0]),
    ],
)
def test_cu_seqlens_from_position_ids(position_ids, expected):
    cu_seqlens = varlen.cu_seqlens_from_position_ids(torch.tensor(position_ids, dtype=torch.int64))
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == expected


def test_position_ids_round_trip():
    cu_seqlens = varlen.cu_seqlens_from_lengths([4, 1, 7])
    position_ids = varlen.position_ids_from_cu_seqlens(cu_seqlens, 12)
    assert position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6]
    assert torch.equal(varlen.cu_seqlens_from_position_ids(position_ids), cu_seqlens)


def test_position_ids_skip_empty_sequences_and_cover_the_tail():
    cu_seqlens = varlen.cu_seqlens_from_lengths([0, 2, 0, 0, 3])
    position_ids = varlen.position_ids_from_cu_seqlens(cu_seqlens, 7)
    assert position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_cu_seqlens_from_mask(dtype):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]]).to(dtype)
    assert varlen.cu_seqlens_from_mask(mask).tolist() == [0, 2, 4, 6, 6]


def test_additive_mask_is_refused():
    with pytest.raises(TypeError, match=r"attention_mask .*float32"):
        varlen.cu_seqlens_from_mask(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"attention_mask .*\(3,\)"):
        varlen.cu_seqlens_from_mask(torch.ones(3, dtype=torch.bool))


def test_pack_and_unpack():
    tensors = [torch.randn(length, 2, 3) for length in LENGTHS]
    packed = varlen.pack(tensors)
    assert packed.values.shape == (9, 2, 3)
    assert packed.max_seqlen == 5 == varlen.max_seqlen_of(packed.cu_seqlens)
    values, cu_seqlens, _ = packed
    for tensor, part in zip(tensors, varlen.unpack(values, cu_seqlens), strict=True):
        assert torch.equal(tensor, part)


def test_pack_and_unpack_carry_gradients():
    tensors = [torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 0, 3)]

    def scaled(*parts):
        values, cu_seqlens, _ = varlen.pack(parts)
        return tuple(
            (i + 1) * part for i, part in enumerate(varlen.unpack(values * values, cu_seqlens))
        )

    assert torch.autograd.gradcheck(scaled, tuple(tensors))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], ValueError, "at least one"),
        ([torch.ones(2), 3], TypeError, "entry 1 is int"),
        ([torch.tensor(1.0)], ValueError, "entry 0 has no dimension"),
        ([torch.ones(2, 3), torch.ones(2, 4)], ValueError, r"entry 1 is \(2, 4\)"),
        ([torch.ones(2), torch.ones(2).double()], TypeError, "entry 1 is torch.float64"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, r"tensors\[1\] .*meta"),
    ],
)
def test_bad_pack(tensors, error, message):
    with pytest.raises(error, match=message):
        varlen.pack(tensors)


@pytest.mark.parametrize("bounds", [[], [1, 2], [0, 3, 2], [0, 5], list(range(12))])
def test_bad_unpack(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        varlen.unpack(torch.ones(4), torch.tensor(bounds, dtype=torch.int32))


def test_max_seqlen_of_nothing():
    assert varlen.max_seqlen_of(torch.zeros(1, dtype=torch.int32)) == 0


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_unpad_then_pad(mask):
    batch, seqlen = mask.shape
    hidden = torch.randn(batch, seqlen, 3)
    unpadded, indices, cu_seqlens, max_seqlen, seqused = varlen.unpad_input(hidden, mask)
    assert torch.equal(unpadded, hidden[mask])
    assert torch.equal(indices, mask.flatten().nonzero().flatten())
    assert indices.dtype == torch.int64
    assert torch.equal(cu_seqlens, varlen.cu_seqlens_from_mask(mask))
    assert isinstance(max_seqlen, int)
    assert max_seqlen == int(mask.sum(1).max())
    assert seqused.dtype == torch.int32
    assert seqused.tolist() == mask.sum(1).tolist()
    padded = varlen.pad_input(unpadded, indices, batch, seqlen)
    assert torch.equal(padded, hidden * mask[..., None])


def test_unpad_keeps_unused_tokens():
    attention_mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused_mask = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    hidden = torch.arange(8).reshape(2, 4)
    kept, indices, cu_seqlens, max_seqlen, seqused = varlen.unpad_input(
        hidden, attention_mask, unused_mask
    )
    assert kept.tolist() == indices.tolist() == [0, 1, 2, 4]
    assert cu_seqlens.tolist() == [0, 3, 4]
    assert max_seqlen == 3
    assert seqused.tolist() == [2, 1]


def test_unpad_of_an_empty_batch():
    hidden, indices, cu_seqlens, max_seqlen, seqused = varlen.unpad_input(
        torch.ones(0, 4, 2), torch.ones(0, 4, dtype=torch.bool)
    )
    assert hidden.shape == (0, 2)
    assert indices.shape == (0,)
    assert cu_seqlens.tolist() == [0]
    assert max_seqlen == 0
    assert seqused.shape == (0,)


def test_pad_and_unpad_carry_gradients():
    mask = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]])
    hidden = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)

    def round_trip(x):
        kept, indices, *_ = varlen.unpad_input(x, mask)
        return varlen.pad_input(kept * kept, indices, 3, 3)

    assert torch.autograd.gradcheck(round_trip, (hidden,))
    assert torch.autograd.gradgradcheck(round_trip, (hidden,))


def test_bad_unpad():
    hidden = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"attention_mask must be \(2, 3\).*got \(2, 4\)"):
        varlen.unpad_input(hidden, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"unused_mask .*\(2, 3\), got \(3, 2\)"):
        varlen.unpad_input(hidden, torch.ones(2, 3).bool(), torch.ones(3, 2).bool())
    with pytest.raises(TypeError, match=r"attention_mask .*float"):
        varlen.unpad_input(hidden, torch.ones(2, 3))
    with pytest.raises(ValueError, match="attention_mask must be on the device"):
        varlen.unpad_input(hidden, torch.ones(2, 3, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor([0, 6]), ValueError, r"\[0, 6\), got 0 to 6"),
        (torch.tensor([-1, 2]), ValueError, r"got -1 to 2"),
        (torch.tensor([0]), ValueError, r"one place for each token .*got 1"),
        (torch.tensor([0.0, 1.0]), TypeError, "indices .*float32"),
        (torch.tensor([0, 1], device="meta"), ValueError, "indices must be on the device"),
    ],
)
def test_bad_pad(indices, error, message):
    with pytest.raises(error, match=message):
        varlen.pad_input(torch.ones(2, 5), indices, 2, 3)


def test_compiles_without_a_graph_break():
    def positions(lengths, hidden):
        cu_seqlens = varlen.cu_seqlens_from_lengths(lengths)
        return varlen.position_ids_from_cu_seqlens(cu_seqlens, hidden.shape[0]), cu_seqlens

    compiled = torch.compile(positions, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([2, 3], [1, 0, 6]):
        lengths = torch.tensor(lengths)
        hidden = torch.randn(int(lengths.sum()), 2)
        for got, want in zip(compiled(lengths, hidden), positions(lengths, hidden), strict=True):
            assert torch.equal(got, want)


def test_unpad_and_pad_compile_in_one_graph_with_captured_scalars():
    def masked(hidden, mask):
        kept, indices, _, _, _ = varlen.unpad_input(hidden, mask)
        return varlen.pad_input(kept.sin(), indices, hidden.shape[0], hidden.shape[1])

    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], dtype=torch.bool)
    hidden = torch.randn(2, 3, 4)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden, mask), masked(hidden, mask))

"""Padding taken out of a batch and put back: `flash8.varlen` under FlashAttention-2's names."""

import torch
from torch import Tensor

from flash8.varlen import cu_seqlens_from_lengths, pad_input, unpad_input

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of input at indices."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """first_axis_dim rows, with values at indices and zeros elsewhere."""
    empty = values.new_zeros(first_axis_dim, *values.shape[1:])
    return empty.index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return index_first_axis(input, indices), input


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows that hold several sequences one after the other, padded on the right.

    attention_mask_in_length, (batch, seqlen): the lengths of a row's sequences in its first
    columns, zeros after them. Returns (hidden, indices, cu_seqlens, max_seqlen).
    """
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()].to(torch.int32)
    columns = torch.arange(attention_mask_in_length.shape[1], device=hidden_states.device)
    valid = columns < attention_mask_in_length.sum(-1, keepdim=True)
    hidden, indices, *_ = unpad_input(hidden_states, valid)
    return hidden, indices, cu_seqlens_from_lengths(lengths), int(lengths.max())

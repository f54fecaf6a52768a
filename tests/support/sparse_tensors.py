"""Tensors whose elements lie far apart, in memory that is mostly not there."""

import mmap
import tempfile

import pytest
import torch

#: Elements after the last one, which a load of a whole row may touch.
_ROW = 64


def sparse(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros with these strides; memory is there only where it is written."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    size = (extent + _ROW) * dtype.itemsize + mmap.PAGESIZE
    try:
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        pytest.skip(f"a sparse file of {size} bytes cannot be mapped here: {error}")
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)

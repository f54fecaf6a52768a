"""Variants of the QKV projection."""

import functools
from dataclasses import dataclass

import pytest
from torch import Tensor

import qkv_cases
from flash8 import _native
from flash8.backends.hopper.qkv_variants import QkvVariant
from flash8.call.qkv_projection import Projection

from .runs import Run, image_of, loaded_bytes, text_of


@functools.cache
def projections() -> tuple[Projection, ...]:
    """Tiles in turn, of blocks without a token too; so many blocks of K that a barrier that expects
    a warp too few is a round ahead in the end."""
    return (
        qkv_cases.make((150,), 272, (2, 2), cu_seqlens=[0, 0, 130, 150], rope="halves"),
        qkv_cases.make((1, 5), 7184, (1, 1), norms=True),
    )


@dataclass(frozen=True)
class Qkv:
    """A variant of the QKV projection."""

    name: str
    variant: QkvVariant

    def ptx(self) -> str:
        return text_of(qkv_cases.device().ptx(self.variant))

    def cases(self) -> Run:
        wanted = [self._project(projection, 0) for projection in projections()]
        for projection, (found, _) in zip(projections(), wanted, strict=True):
            qkv_cases.assert_same(found, qkv_cases.emulated(projection))

        def run(ptx: str) -> None:
            registry = _native.Registry(qkv_cases.device().driver, lambda key, kind: image_of(ptx))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(qkv_cases.device(), "_registry", registry)
                for seed in range(6):
                    for projection, (want, bytes_) in zip(projections(), wanted, strict=True):
                        found, loaded = self._project(projection, seed)
                        qkv_cases.assert_same(found, want)
                        assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded"

        return run

    def _project(self, projection: Projection, seed: int) -> tuple[tuple[Tensor, ...], int]:
        with pytest.MonkeyPatch.context() as patch:
            found = qkv_cases.on_kernel(patch, projection, seed=seed)
        return found, loaded_bytes(qkv_cases.device())

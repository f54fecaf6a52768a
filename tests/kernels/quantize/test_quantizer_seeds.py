"""The quantizer: no false alarm of the simulated device, the same bits by every schedule."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from cases import int32
from flash8 import fp8
from flash8.backends.hopper import append_quantized as appender
from flash8.call.request import Appended
from flash8.tensors.float8 import E4M3
from flash8.tensors.rotary import Rope
from quantizer_cases import draw, raw, tables
from quantizer_device import device, kernels
from simulated_device import missing_compiler

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.slow,
]


def check_same(run: Callable[[int], Iterable[Tensor]]) -> None:
    first: list[Tensor] = []
    for seed in range(200):
        try:
            found = list(run(seed))
        except RuntimeError as error:
            raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error
        first = first or found
        for have, want in zip(found, first, strict=True):
            assert torch.equal(have, want), f"seed {seed}"


def test_no_false_alarm_in_200_seeds(monkeypatch):
    """All five kernels: two of a mean, that of the largest values, both casts."""
    x = draw(2, 150, 2, 64)
    launched = set()

    def run(seed: int) -> list[Tensor]:
        found = []
        for options in ({"smooth_k": True, "hadamard": True}, {"v_colmajor": True}):
            with kernels(monkeypatch, x, seed=seed):
                result = fp8.quantize(x, "head", **options)
            launched.add(device().report()["kernel"])
            found += [raw(result.data), result.descale]
            found += [] if result.mean is None else [result.mean]
        return found

    check_same(run)
    assert launched == {"flash8_quantize_cast"}


def test_appending_gives_no_false_alarm_in_200_seeds(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = draw(3, 20, 2, 64)
    empty = torch.zeros(12, 16, 2, 64).to(E4M3)
    table = torch.randperm(12, generator=g).view(3, 4).int()
    rope = Rope(*tables(32), int32([14, 0, 33]))
    descale = torch.rand(12, 2, 1, generator=g) * 0.05 + 0.01
    mean = draw(2, 64, dtype=torch.float32, seed=1)
    starts = int32([14, 0, 33])

    def run(seed: int) -> list[Tensor]:
        cache = empty.clone()
        given = [cache, x, table, starts, descale, mean, *(t for t in rope if torch.is_tensor(t))]
        with kernels(monkeypatch, *given, seed=seed):
            appender.append(
                Appended(cache, x, starts, page_table=table, descale=descale, mean=mean, rope=rope)
            )
        assert device().report()["kernel"] == "flash8_quantize_append"
        assert cache.float().any()
        return [raw(cache)]

    check_same(run)

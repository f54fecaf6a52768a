"""What the families have in common: a text is loaded, launches have seeds."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from flash8_sim.mutate import InvalidMutantError
from simulated_device import SimulatedDevice

Run = Callable[[str], None]
Problem = TypeVar("Problem")
Result = TypeVar("Result")


def text_of(image: bytes) -> str:
    return image.rstrip(b"\0").decode()


def image_of(ptx: str) -> bytes:
    return ptx.encode() + b"\0"


@contextmanager
def loading(device: SimulatedDevice) -> Iterator[None]:
    """A text that does not load is no mutant."""
    try:
        yield
    except RuntimeError as error:
        raise InvalidMutantError(f"{error} {device.last_error()}") from error


@contextmanager
def launching(device: SimulatedDevice, seed: int) -> Iterator[None]:
    """What a launch finds fails the case."""
    device.configure(seed=seed)
    try:
        yield
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {device.last_error()}") from error


def loaded_bytes(device: SimulatedDevice) -> int:
    """What the last launch has loaded into shared memory."""
    loaded = device.report()["statistics"]["bytes"]
    return sum(n for name, n in loaded.items() if name in ("tensor load", "bulk load", "cp.async"))


def by_seed(
    problems: Iterable[Problem], seeds: Iterable[Iterable[int]], wanted: Iterable[Result]
) -> list[tuple[int, Problem, Result]]:
    """Every problem under the first seed, then under the next one: most mutants fail at once."""
    turns = [
        (seed, problem, want)
        for problem, given, want in zip(problems, seeds, wanted, strict=True)
        for seed in given
    ]
    return sorted(turns, key=lambda turn: turn[0])

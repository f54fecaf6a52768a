"""Runs calls by their seeds, tells what went wrong, and how to see it again."""

import faulthandler
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: What a call may be refused with; anything else is a fault.
DOCUMENTED = (TypeError, ValueError, NotImplementedError)
#: What torch says where a call wants more memory than there is, which is no fault of ours.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflow")
#: Seconds after which a call counts as hanging.
SLOW = 30

Call = Callable[[int], str]


@dataclass
class Fault:
    """A call that ended as no call may."""

    leg: str
    seed: int
    text: str

    def __str__(self) -> str:
        again = f"python tests/support/run_fuzz.py --leg {self.leg} --seed {self.seed} --calls 1"
        return f"{self.leg} {self.seed}: {self.text}\n  {again}"


@dataclass
class Tally:
    """How calls ended."""

    verdicts: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: "Tally") -> None:
        self.verdicts.update(other.verdicts)
        self.faults += other.faults
        self.seconds += other.seconds

    @property
    def calls(self) -> int:
        return sum(self.verdicts.values())


def run(
    legs: Mapping[str, tuple[float, Call]],
    seeds: range,
    most_faults: int = 20,
    at: BinaryIO | None = None,
) -> Tally:
    """The calls of these seeds. `legs` by name: how often, as a weight, and the call of a seed.

    `at` is told which call comes next, for a process that does not live to tell itself.
    """
    tally = Tally()
    start = time.monotonic()
    names = list(legs)
    weights = [legs[name][0] for name in names]
    for seed in seeds:
        name = random.Random(f"leg {seed}").choices(names, weights)[0]
        if at is not None:
            at.seek(0)
            at.write(f"{name} {seed}".ljust(60).encode())
            at.flush()
        try:
            with _in_time():
                verdict = legs[name][1](seed)
        except Exception as error:
            verdict = "fault"
            tally.faults.append(Fault(name, seed, describe(error)))
        tally.verdicts[f"{name}: {verdict}"] += 1
        if len(tally.faults) >= most_faults:
            break
    tally.seconds = time.monotonic() - start
    return tally


@contextmanager
def _in_time() -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise AssertionError(f"the call takes more than {SLOW} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SLOW)
    # No signal is looked at inside of a launch: then the process ends.
    faulthandler.dump_traceback_later(4 * SLOW, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def limit_memory(gigabytes: float) -> None:
    """Let this process have so much more than it has now: a call for 2^40 rows then fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def describe(error: BaseException) -> str:
    """The error, and the lines of flash8 and of the harness that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames][-6:]
    cause = error.__cause__
    said = f"{type(error).__name__}: {str(error)[:3000]} [{' '.join(ours)}]"
    return said if cause is None else f"{said}\n  from {describe(cause)}"


def bits(x: Any) -> Any:
    """What two results must agree in: the bytes of tensors, their types and sizes."""
    if isinstance(x, Tensor):
        x = x.detach()
        # .contiguous() keeps odd strides of dimensions of one
        plain = torch.empty(x.shape, dtype=x.dtype).copy_(x).view(-1)
        return x.dtype, tuple(x.shape), plain.view(torch.uint8).numpy().tobytes()
    if isinstance(x, (tuple, list)):
        return [bits(part) for part in x]
    return x


def memory_of(arguments: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of every argument that a refused call must leave alone."""
    held = {}
    for name, x in arguments.items():
        plain = isinstance(x, Tensor) and x.layout is torch.strided and x.device.type == "cpu"
        if plain and not x.is_nested and not x.is_conj():
            held[name] = bits(x.detach().as_subclass(Tensor))[2]
    return held


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    """How a call ended, and what it returned: "refused" only with a documented exception, and
    nothing of its arguments changed."""
    before = memory_of(arguments)
    try:
        return "returned", function(**arguments)
    except DOCUMENTED as error:
        said = str(error)
    except Exception as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in _OUT_OF_MEMORY):
            return "out of memory", None
        raise AssertionError(
            f"{function.__name__} is not to raise this; {shown(arguments)}"
        ) from error
    changed = [name for name, data in memory_of(arguments).items() if data != before[name]]
    assert not changed, f"refused ({said}), but it has changed {changed}; {shown(arguments)}"
    return "refused", None


def shown(arguments: Mapping[str, Any]) -> str:
    """The arguments in short."""
    return ", ".join(f"{name}={_short(x)}" for name, x in arguments.items() if x is not None)


def _short(x: Any) -> str:
    if isinstance(x, Tensor):
        try:
            text = f"{type(x).__name__}({str(x.dtype)[6:]}, {tuple(x.shape)}, {x.stride()})"
            few = x.numel() <= 6 and x.device.type == "cpu"
            return text + (f"={x.tolist()}" if few else "")
        except Exception as error:
            return f"{type(x).__name__} ({error})"
    return repr(x)[:80]

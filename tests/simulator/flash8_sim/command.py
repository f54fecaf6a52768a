"""A command that runs a kernel under all checks, counts, and draws its timeline.

It knows no kernels. A program that has some lends them as `Kernels` and calls `main`; `flash8 sim`
is this command with flash8's kernels, found by the entry point "sim" of the group
"flash8.commands".
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from . import timeline
from .simulator import Simulator, library_path


class Kernels(Protocol):
    """What the program lends."""

    prog: str
    """How the command is called there."""

    names: Sequence[str]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options that shape the problem. `kernel` and `seed` are there already."""

    def describe(self, options: argparse.Namespace) -> str:
        """The problem in a few words."""

    def watched(self, options: argparse.Namespace) -> str:
        """The entry point of `options.kernel` where others are launched after it, else ""."""

    def run(self, options: argparse.Namespace, driver: Path) -> str:
        """Launches `options.kernel`, and the last of all launches, or of those of its entry point,
        is to be drawn. On the driver in that library.
        Says how right the result is.

        Raises RuntimeError, ImportError, OSError or ValueError where that is not possible.
        """


def _parser(kernels: Kernels) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=kernels.prog,
        description="Run a kernel on the simulated device under its checks, and draw what "
        "producer, consumers and tensor cores did. Times are logical, no speed.",
        epilog="kernels: " + ", ".join(kernels.names),
    )
    parser.add_argument("kernel", choices=kernels.names, metavar="KERNEL")
    kernels.add_arguments(parser)
    parser.add_argument("--ctas", type=int, default=1, metavar="N", help="multiprocessors")
    parser.add_argument("--cta", type=int, default=0, metavar="N", help="the CTA to draw")
    parser.add_argument(
        "--seed", type=int, default=0, help="0: by logical time; others: adversarial schedules"
    )
    parser.add_argument(
        "--span", type=int, nargs=2, metavar=("FROM", "TO"), help="of the logical time, to be drawn"
    )
    parser.add_argument("--output", type=Path, default=Path("timeline.png"), metavar="FILE.png")
    parser.add_argument("--title", help="of the picture; the kernel and its call by default")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE.json", help="the events, for Chrome's trace viewer"
    )
    return parser


_TICK = 1.0  # seconds


@contextmanager
def _clock(label: str) -> Iterator[None]:
    """On a terminal, one line that counts the seconds of a run, wiped at its end."""
    stream = sys.stderr
    if stream is None or stream.closed or not stream.isatty():
        yield
        return
    ended, start = threading.Event(), time.monotonic()

    def count() -> None:
        while not ended.wait(_TICK):
            stream.write(f"\r{label} ... {time.monotonic() - start:.0f} s")
            stream.flush()

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    try:
        yield
    finally:
        ended.set()
        counter.join()
        stream.write("\r" + " " * (len(label) + 16) + "\r")
        stream.flush()


def _run(kernels: Kernels, options: argparse.Namespace) -> None:
    sim = Simulator()
    settings: dict[str, Any] = {
        "seed": options.seed,
        "multiprocessors": options.ctas,
        "timeline": True,
        "watch": kernels.watched(options),
        "strict_global": False,  # tensors may lie in memory of this process
    }
    with sim.configured(**settings), _clock(f"{kernels.prog}: running {options.kernel}"):
        try:
            result = kernels.run(options, library_path())
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{sim.last_error()}".rstrip()) from error
        report, trace = sim.report(), sim.timeline()
    rows = timeline.lanes(trace, cta=options.cta)
    place = f"CTA {options.cta} of {options.ctas}, seed {options.seed}"
    what = f"{options.kernel}: {kernels.describe(options)}, {place}"
    timeline.draw(rows, options.output, title=options.title or what, span=options.span)
    print(f"{what}\nno finding; {result}")
    for name, counts in report["statistics"]["by_role"].items():
        print(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    print(f"picture: {options.output}")
    if options.trace:
        options.trace.write_text(json.dumps(trace))
        print(f"trace: {options.trace}")


def main(arguments: Sequence[str], kernels: Kernels) -> int:
    """Runs the command; 1 when there is a finding or something is missing."""
    options = _parser(kernels).parse_args(arguments)
    try:
        _run(kernels, options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{kernels.prog}: {error}", file=sys.stderr)
        return 1
    return 0

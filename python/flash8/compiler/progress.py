"""One line on the terminal while a kernel compiles; silence where there is no terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flash8.compiler.process import Tick


@contextmanager
def progress_line(label: str) -> Iterator[Tick]:
    """Gives a tick that rewrites the line; the line is wiped at the end."""
    stream = sys.stderr
    if stream is None or stream.closed or not stream.isatty():
        yield lambda seconds: None
        return
    text = f"flash8: compiling {label} ..."

    def tick(seconds: float) -> None:
        stream.write(f"\r{text} {seconds:.0f} s")
        stream.flush()

    tick(0.0)
    try:
        yield tick
    finally:
        stream.write("\r" + " " * (len(text) + 8) + "\r")
        stream.flush()

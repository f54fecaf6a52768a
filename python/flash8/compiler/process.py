"""Runs a tool of the compiler: with a time limit, and kills its children when it ends."""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

Tick = Callable[[float], None]
#: Seconds that one call of a compiler may take: the slowest kernel known takes a minute.
DEFAULT_LIMIT = 600.0
_LONGEST_LOG = 4 << 20  # bytes


class TimeLimitError(RuntimeError):
    """A tool did not end within its time, and was killed with all that it had started."""


def time_limit() -> float:
    """The seconds that FLASH8_COMPILE_TIMEOUT allows a call of a compiler.

    Raises ValueError when it is no positive number.
    """
    given = os.environ.get("FLASH8_COMPILE_TIMEOUT", "")
    if not given:
        return DEFAULT_LIMIT
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (0.0 < seconds < math.inf):
        raise ValueError(f"FLASH8_COMPILE_TIMEOUT is {given!r}; it is a number of seconds above 0")
    return seconds


def run(
    command: Sequence[str | Path],
    *,
    limit: float,
    folder: Path | None = None,
    tick: Tick = lambda seconds: None,
    started: float | None = None,
    text: bytes = b"",
) -> tuple[int, str]:
    """The exit status of `command` and what it wrote, both streams together.

    `folder` is where it runs and where it puts its temporary files. `text` is its input. Its output
    goes into memory, not through a pipe, which stays open as long as any child of it lives. `tick`
    is called every fraction of a second with the seconds since `started`.

    Raises TimeLimitError after `limit` seconds, OSError when it cannot be started.
    """
    began = time.monotonic()
    environment = {**os.environ, "LC_ALL": "C"}
    if folder is not None:
        # nvcc would hand an absolute TMPDIR with a "$" in it to a shell.
        environment |= {"TMPDIR": ".", "PWD": str(folder)}
    with _memory() as said, _memory() as given:
        given.write(text)
        given.seek(0)
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=min(0.2, limit))
                    break
                except subprocess.TimeoutExpired:
                    tick(time.monotonic() - (began if started is None else started))
                    if time.monotonic() - began > limit:
                        raise TimeLimitError(
                            f"{Path(command[0]).name} did not end within {limit:g} seconds "
                            "(FLASH8_COMPILE_TIMEOUT)"
                        ) from None
        except BaseException:
            _kill(process)
            raise
        said.seek(0)
        return status, said.read(_LONGEST_LOG).decode("utf-8", "replace")


def _memory() -> BinaryIO:
    return cast(BinaryIO, open(os.memfd_create("flash8"), "w+b", buffering=0))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and its descendants. It has not been waited for, so its id is still its."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()

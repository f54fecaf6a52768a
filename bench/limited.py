"""A command under a time limit: when it is up, its whole process group ends.

A kernel that hangs keeps its process in a wait that Python cannot leave, so nothing less than
SIGKILL from outside will do. SIGABRT goes first: a Python with PYTHONFAULTHANDLER then says where
it stood.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TO_SPEAK, _TO_DIE = 1.0, 10.0  # seconds after SIGABRT and after SIGKILL
_groups: set[int] = set()  # that run now


def end_all() -> None:
    """Ends every command that is running: for a signal handler of the process that runs them."""
    for group in list(_groups):
        _signal_group(group, signal.SIGKILL)


@dataclass(frozen=True)
class Ending:
    """How a command ended. `status`: its exit status, or minus the signal that ended it."""

    status: int
    seconds: float
    killed: bool = False  # at its limit
    gone: bool = True  # False: it, or what it started, did not die and may still hold the GPU

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.killed

    def describe(self) -> str:
        if self.killed:
            stuck = "" if self.gone else ", and does not die"
            return f"killed after {self.seconds:.0f} s{stuck}"
        if self.status < 0:
            return f"crashed: {_signal_name(-self.status)}"
        return "ok" if self.status == 0 else f"failed: exit status {self.status}"


def run_limited(
    command: Sequence[str],
    *,
    limit: float,
    log: Path,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Ending:
    """Runs `command` for at most `limit` seconds, with what it says in `log`.

    What it has started and left behind ends with it. A command that cannot be started counts as one
    that exits with 127, as in a shell.
    """
    start = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            return Ending(127, time.monotonic() - start)
        killed = False
        _groups.add(process.pid)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            killed = True
            _signal_group(process.pid, signal.SIGABRT)
            _wait(process, _TO_SPEAK)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            _groups.discard(process.pid)
        gone = _wait(process, _TO_DIE)
    gone = _wait_for_group(process.pid, _TO_DIE) and gone
    status = -signal.SIGKILL if process.returncode is None else process.returncode
    return Ending(status, time.monotonic() - start, killed, gone)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _wait_for_group(group: int, seconds: float) -> bool:
    """SIGKILL returns before a process has ended, and the next command wants the GPU free."""
    deadline = time.monotonic() + seconds
    while any(_is_running_in(group, stat) for stat in Path("/proc").glob("[0-9]*/stat")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_running_in(group: int, stat: Path) -> bool:
    try:
        state, _parent, its_group, *_ = stat.read_text().rpartition(")")[2].split()
    except OSError:  # it has ended meanwhile
        return False
    return int(its_group) == group and state not in "ZX"


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(group, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

"""Runs the cases of a kernel on its mutants, each in a process that dies with it."""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .mutations import Mutation, mutations

Verdict = Literal["killed", "survived", "refused"]

_WALL_PER_CPU = 20  # a process of a busy machine gets this little of it
_LONGEST = 1024  # bytes of an answer
_PASSED, _FAILED, _REFUSED = b"p", b"f", b"r"


class InvalidMutantError(Exception):
    """A text that does not load: the mutation is at fault, not the kernel."""


@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    killed: a case failed (`reason` has its words), or the process crashed or used up its time.
    survived: every case passed; `reached` says whether any of them comes to the changed statement.
    refused: the text does not load.
    """

    mutation: Mutation
    verdict: Verdict
    reason: str = ""
    reached: bool = True

    def __str__(self) -> str:
        m = self.mutation
        verdict = self.verdict if self.reached else f"{self.verdict}, not reached"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{verdict}{reason}: line {m.line}: {m.text}  [{m.id}]"


def judge(
    ptx: str,
    run: Callable[[str], object],
    *,
    seconds: int = 10,
    only: Sequence[Mutation] | None = None,
) -> Iterator[Result]:
    """Runs every mutant of `ptx`, or `only` these.

    Args:
        ptx: The text of a kernel that passes.
        run: Runs the cases on a text. It fails by returning False or by raising, and raises
            InvalidMutantError for a text that does not load. It is called in a child of this
            process, so what it changes is gone afterwards.
        seconds: CPU seconds that a mutant has; one that needs more is killed.

    Raises:
        ValueError: The unchanged text does not pass.
    """
    verdict, reason = in_child(run, ptx, seconds)
    if verdict != "survived":
        raise ValueError(f"the unchanged kernel is {verdict}: {reason or 'a case fails'}")
    reached: dict[int, bool] = {}  # by where a statement starts
    for mutation in mutations(ptx) if only is None else only:
        if not reached.get(mutation.start, True):
            yield Result(mutation, "survived", reached=False)  # whatever is made of it
            continue
        verdict, reason = in_child(run, mutation.apply(ptx), seconds)
        if verdict == "survived" and mutation.start not in reached:
            trap = in_child(run, mutation.trap(ptx), seconds)[0]
            reached[mutation.start] = trap != "survived"
        yield Result(mutation, verdict, reason, reached.get(mutation.start, True))


def survivors(ptx: str, run: Callable[[str], object], *, seconds: int = 10) -> list[Mutation]:
    """The mutations of `ptx` that no case notices."""
    return [r.mutation for r in judge(ptx, run, seconds=seconds) if r.verdict == "survived"]


def in_child(run: Callable[[str], object], ptx: str, seconds: int) -> tuple[Verdict, str]:
    """What `run` says of a text, from a forked process with a limit of CPU time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(run, ptx, seconds, writer)
    os.close(writer)
    try:
        answered, _, _ = select.select([reader], [], [], seconds * _WALL_PER_CPU)
        answer = os.read(reader, _LONGEST) if answered else b""
        if not answered:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    kind, reason = answer[:1], answer[1:].decode(errors="replace")
    if kind == _PASSED:
        return "survived", ""
    if kind == _REFUSED:
        return "refused", reason
    if kind == _FAILED:
        return "killed", reason
    if not answered or _signal_of(status) in (signal.SIGXCPU, signal.SIGKILL):
        return "killed", f"no end in {seconds} s"
    return "killed", f"crash, signal {_signal_of(status)}"


def _signal_of(status: int) -> int:
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _answer(run: Callable[[str], object], ptx: str, seconds: int, writer: int) -> None:
    """The child's life; it does not return."""
    answer = _FAILED
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 1))
        answer = _FAILED if run(ptx) is False else _PASSED
    except InvalidMutantError as error:
        answer = _REFUSED + _short(error)
    except Exception as error:
        answer = _FAILED + _short(error)
    finally:
        os.write(writer, answer)
        os._exit(0)


def _short(error: Exception) -> bytes:
    """The end of what it says, where findings stand, on one line."""
    return " ".join(str(error).split()).encode()[-_LONGEST // 2 :]

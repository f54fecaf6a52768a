"""Runs steps in their order under one budget; each has a limit, and none stops the others.

A step is a process. It is killed at its limit, or when the budget ends; what is then left of the
list is skipped by name. After a kill the GPU is asked whether it still answers.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from limited import Ending, run_limited

from .journal import Journal

_RESERVE = 3.0  # seconds of the budget that are kept for the last lines of the journal
_TAIL = 30  # lines of what a step has said, in the record; the log has all
_ANSWERS = 2  # times that the GPU is asked before it counts as lost


@dataclass(frozen=True)
class Step:
    """One command. `limit`: seconds it may take; with less than `least` left it is not started."""

    group: str
    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 5.0
    needs: tuple[str, ...] = ()  # names of steps without whose success it makes no sense
    absent: str = ""  # what this machine lacks for it
    gpu: bool = True
    together: bool = False  # beside the other steps of its group
    environ: Mapping[str, str] = field(default_factory=dict)
    result: Path | None = None  # a JSON that it writes, kept even if it is killed
    lines: int = _TAIL


@dataclass(frozen=True)
class Outcome:
    """How a step ended. `state`: ok, failed, crashed, killed or skipped."""

    group: str
    name: str
    state: str
    detail: str
    seconds: float
    limit: float
    command: str
    tail: list[str]
    clocks: dict[str, Any] | None = None
    result_file: str | None = None
    result: Any = None


class Runner:
    """`clocks` is asked what the GPU did between two times; `tell` gets a line for each step."""

    def __init__(
        self,
        *,
        budget: float,
        folder: Path,
        journal: Journal,
        environ: Mapping[str, str],
        cwd: Path,
        head: dict[str, Any] | None = None,
        probe: Sequence[str] | None = None,
        jobs: int = 8,
        clocks: Callable[[float, float], dict[str, Any] | None] | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self._start = time.monotonic()
        self._deadline = self._start + budget
        self._folder, self._journal, self._cwd = folder, journal, cwd
        self._environ, self._probe, self._jobs = dict(environ), probe, jobs
        self._clocks, self._tell = clocks, tell
        self._head = {"budget": budget, **(head or {})}
        self._outcomes: list[Outcome] = []
        self._lost: str | None = None
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        self._waiting = [step.name for step in steps]
        self._write()
        for (together, _), batch in groupby(steps, key=lambda step: (step.together, step.group)):
            with ThreadPoolExecutor(self._jobs if together else 1) as pool:
                list(pool.map(self._take, batch))
        return self._outcomes

    def _take(self, step: Step) -> None:
        left = self._deadline - time.monotonic() - _RESERVE
        limit = min(step.limit, left)
        reason = self._why_not(step, left)
        if reason is not None:
            command = " ".join(step.command)
            self._keep(Outcome(step.group, step.name, "skipped", reason, 0.0, 0.0, command, []))
            return
        log = self._folder / f"{_file_name(step.name)}.log"
        environ = {**self._environ, **step.environ, "FLASH8_STEP_SECONDS": f"{limit:.0f}"}
        began, began_at = time.monotonic(), time.time()
        ending = run_limited(step.command, limit=limit, log=log, environ=environ, cwd=self._cwd)
        clocks = self._clocks(began, time.monotonic()) if self._clocks and step.gpu else None
        outcome = self._outcome(step, ending, limit, log, began_at)
        with self._lock:
            self._journal.add_log(f"{step.name}: {outcome.detail}", log)
        self._keep(replace(outcome, clocks=clocks))
        if step.gpu and (ending.killed or ending.status < 0):
            self._ask(step)

    def _why_not(self, step: Step, left: float) -> str | None:
        if step.absent:
            return step.absent
        if left < min(step.least, step.limit):
            return f"{max(0.0, left):.0f} s of the budget are left, and it needs {step.least:.0f}"
        states = {outcome.name: outcome.state for outcome in self._outcomes}
        missing = [name for name in step.needs if states.get(name) != "ok"]
        if missing:
            return f"it needs {', '.join(missing)}"
        return self._lost if step.gpu else None

    def _outcome(
        self, step: Step, ending: Ending, limit: float, log: Path, began_at: float
    ) -> Outcome:
        state = "ok" if ending.ok else "killed" if ending.killed else "failed"
        if ending.status < 0 and not ending.killed:
            state = "crashed"
        said = log.read_text(errors="replace").splitlines()[-step.lines :]
        return Outcome(
            step.group,
            step.name,
            state,
            ending.describe(),
            round(ending.seconds, 2),
            round(limit, 1),
            " ".join(step.command),
            said,
            result_file=None if step.result is None else os.path.relpath(step.result, self._cwd),
            result=_result(step.result, began_at),
        )

    def _ask(self, step: Step) -> None:
        """Whether the GPU answers after a process on it was killed or crashed."""
        if self._probe is None:
            return
        log = self._folder / f"probe-after-{_file_name(step.name)}.log"
        for _ in range(_ANSWERS):
            limit = min(20.0, self._deadline - time.monotonic() - _RESERVE)
            if limit <= 0:
                return
            ending = run_limited(
                self._probe, limit=limit, log=log, environ=self._environ, cwd=self._cwd
            )
            if ending.ok:
                return
        with self._lock:
            self._journal.add_log(f"the GPU was asked after {step.name}: {ending.describe()}", log)
            self._lost = self._lost or f"the GPU does not answer since {step.name}"

    def _keep(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes.append(outcome)
            self._waiting.remove(outcome.name)
            self._write()
            text = f"{outcome.state:8}{outcome.seconds:7.1f} s of {outcome.limit:5.1f}  "
            self._tell(text + f"{outcome.name}" + _why(outcome))

    def _write(self) -> None:
        elapsed = round(time.monotonic() - self._start, 1)
        steps = [outcome.__dict__ for outcome in self._outcomes]
        self._journal.write(
            {**self._head, "seconds": elapsed, "steps": steps, "waiting": self._waiting}
        )


def _why(outcome: Outcome) -> str:
    if outcome.state == "ok":
        return ""
    last = next((line for line in reversed(outcome.tail) if line.strip()), "")
    return f": {outcome.detail}" + (f" | {last.strip()[:200]}" if last else "")


def _result(path: Path | None, since: float) -> Any:
    """What a step has written, if it did: an older file is another run's."""
    if path is None:
        return None
    try:
        if path.stat().st_mtime < since - 1.0:
            return None
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)

"""`python -m flash8_sim.mutate kernel.ptx -- command`: runs a command on every mutant."""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .engine import InvalidMutantError, Result, judge
from .known import Known, compare, load
from .mutations import mutations

_WALL_PER_CPU = 20
_SKIP = 125  # as in `git bisect run`


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flash8_sim.mutate",
        usage="python -m flash8_sim.mutate kernel.ptx [options] -- command",
        description="Delete and weaken the synchronization of a kernel, one statement at a time, "
        "and run a command on every mutant. {} in the command, and the environment variable "
        "MUTANT_PTX, are the mutant's path. The command passes with 0; 125 says that the text "
        "does not load; all else kills the mutant.",
    )
    parser.add_argument("ptx", type=Path)
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    parser.add_argument("--only", default="", metavar="TEXT", help="ids that contain TEXT")
    parser.add_argument(
        "--seconds", type=int, default=60, metavar="N", help="CPU seconds of a mutant"
    )
    parser.add_argument("--known", type=Path, metavar="FILE.toml", help="survivors explained")
    return parser


def _passes(command: Sequence[str], ptx: str, seconds: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.ptx"
        path.write_text(ptx)
        process = subprocess.Popen(
            [word.replace("{}", str(path)) for word in command],
            env={**os.environ, "MUTANT_PTX": str(path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1)),
        )
        try:
            code = process.wait(timeout=seconds * (_WALL_PER_CPU - 1))
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == _SKIP:
        raise InvalidMutantError
    return code == 0


def main(arguments: Sequence[str]) -> int:
    """1 if a mutant survives without an explanation, or an explanation has no survivor."""
    before = list(itertools.takewhile(lambda word: word != "--", arguments))
    command = list(arguments[len(before) + 1 :])
    options = _parser().parse_args(before)
    ptx = options.ptx.read_text()
    chosen = [m for m in mutations(ptx) if options.only in m.id]
    if options.list or not command:
        for mutation in chosen:
            print(f"line {mutation.line}: {mutation.text}  [{mutation.id}]")
        return 0
    results: list[Result] = []

    def run(text: str) -> bool:
        return _passes(command, text, options.seconds)

    for result in judge(ptx, run, seconds=options.seconds, only=chosen):
        results.append(result)
        print(result, flush=True)
    counts = Counter(result.verdict for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    known = load(options.known) if options.known else Known()
    listed = {name: why for name, why in known.why.items() if options.only in name}
    wrong = compare(results, Known(listed))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Everything that a Hopper GPU can tell about this checkout, in one command: `make gpu-check`.

It fits a budget of seconds: each step has a limit, a step that hangs is killed and named, and what
decides most comes first (gpu_steps/plan.py). Nothing is compiled there but, for another Python, the
extension: the kernels come from `make gpu-pack`, built beforehand on a machine without a GPU, in
build/gpu-pack, which has to travel with the checkout.

The record, gpu_check.json, is rewritten after every step: in bench/results, and in $OUT if that
names a folder, with all that the steps said beside it (gpu_check.log; in build/gpu-check too). It
holds the GPU, driver, clocks and commit, how every step ended, and the results of those that have
some; --unpack writes these into bench/results.

Needs a driver and a Python with torch and NumPy; pytest and hypothesis for the tests.

usage: python bench/gpu_check.py [--budget SECONDS] [--only GROUP ...] [--dry-run] [--unpack FILE]
"""

import argparse
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import environment
from gpu_steps import plan
from gpu_steps.clocks import Clocks
from gpu_steps.journal import NAME, Journal, write_json
from gpu_steps.pack import PACK, ROOT, Pack, PackError, open_pack
from gpu_steps.runner import Outcome, Runner
from limited import end_all

_GROUPS = ("check", "facts", "bench", "tests", "sanitizer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument(
        "--only", nargs="+", choices=_GROUPS, metavar="GROUP", help=", ".join(_GROUPS)
    )
    parser.add_argument("--pack", type=Path, default=PACK, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run every step as a stand-in; the facts on the simulated device, if FLASH8_DRIVER "
        "names it",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-check", metavar="DIR")
    parser.add_argument("--results", type=Path, metavar="DIR", help="for the record")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="a gpu_check.json")
    options = parser.parse_args()
    if options.unpack:
        return unpack(options.unpack)
    try:
        pack = open_pack(options.pack.resolve())
    except PackError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    return run(options, pack)


def run(options: argparse.Namespace, pack: Pack) -> int:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not spend time on a core file
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    wanted = [
        step
        for step in plan.steps(pack, work)
        if step.group in ("setup", *(options.only or _GROUPS))
    ]
    if options.dry_run:
        wanted = plan.rehearsed(wanted, simulated=bool(os.environ.get("FLASH8_DRIVER")))
    out = [Path(os.environ["OUT"])] if os.environ.get("OUT") else []
    results = options.results or (work if options.dry_run else plan.RESULTS)
    journal = Journal([results, *out], [work, *out])
    clocks = None if options.dry_run else Clocks()
    runner = Runner(
        budget=options.budget,
        folder=work,
        journal=journal,
        environ={**os.environ, **plan.environ(pack, work)},
        cwd=ROOT,
        head={
            "dry_run": options.dry_run,
            "environment": environment.machine(),
            "pack": _head(pack),
        },
        probe=None if options.dry_run else plan.probe(pack),
        jobs=options.jobs,
        clocks=clocks,
        tell=lambda line: print(line, flush=True),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        outcomes = runner.run(wanted)
    finally:
        if clocks is not None:
            clocks.stop()
    return summarize(outcomes, journal)


def summarize(outcomes: list[Outcome], journal: Journal) -> int:
    """A line for each group; 1 if a step did not end well, or none ran."""
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        states = [outcome.state for outcome in outcomes if outcome.group == group]
        print(f"{group}: " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)))
    for outcome in outcomes:
        if outcome.group == "facts" and isinstance(outcome.result, dict):
            print(*_figures(outcome.result), sep="\n")
    print("record: " + ", ".join(str(folder / NAME) for folder in journal.records))
    states = {outcome.state for outcome in outcomes}
    return int(bool(states & {"failed", "crashed", "killed"}) or "ok" not in states)


def _figures(found: dict[str, Any], name: str = "") -> list[str]:
    """A line for each set of numbers, such as those of one kernel."""
    numbers = {
        key: value
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    lines = []
    if name and numbers:
        lines.append(f"  {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    for key, value in found.items():
        if isinstance(value, dict) and key != "device":
            lines += _figures(value, f"{name}/{key}" if name else key)
    return lines


def unpack(record: Path) -> int:
    """Writes the results that a record brought into bench/results, each under its own name."""
    for step in json.loads(record.read_text())["steps"]:
        name = step.get("result_file")
        if step.get("result") is not None and name and name.startswith("bench/results/"):
            write_json(ROOT / name, step["result"])
            print(f"{name}: of {step['name']}, which ended: {step['detail']}")
    return 0


def _head(pack: Pack) -> dict[str, Any]:
    return {name: value for name, value in pack.manifest.items() if name != "kernels"}


def _end(number: int, _: object) -> None:
    """The record is on disk already; what runs must not outlive this process."""
    end_all()
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

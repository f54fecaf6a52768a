"""`run_fuzz.py --calls N --seed S --workers W`: calls N seeds from S on, and tells.

Ends with 1 if anything went wrong; every fault comes with the command that repeats it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter

#: How often each leg is drawn.
WEIGHTS = {"cpu": 60.0, "driver": 38.5, "device": 1.0, "groups": 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--leg", action="append", choices=sorted(WEIGHTS), help="only these")
    parser.add_argument("--most-faults", type=int, default=20, help="after which a worker stops")
    parser.add_argument("--json", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    start = time.monotonic()
    verdicts, faults = _here(options) if options.json else _spread(options)
    if options.json:
        print(json.dumps([verdicts, faults]))
        return 0
    for verdict in sorted(verdicts):
        print(f"{verdicts[verdict]:8d}  {verdict}")
    calls, seconds = sum(verdicts.values()), time.monotonic() - start
    print(f"{calls} calls from seed {options.seed} in {seconds:.0f} s, {len(faults)} faults")
    for fault in faults:
        print(f"\n{fault}")
    return 1 if faults else 0


def _here(options: argparse.Namespace) -> tuple[dict[str, int], list[str]]:
    import torch

    from fuzz import harness, legs

    torch.set_num_threads(1)
    harness.limit_memory(6.0)
    warnings.simplefilter("ignore")
    chosen = {name: WEIGHTS[name] for name in options.leg or WEIGHTS}
    seeds = range(options.seed, options.seed + options.calls)
    with open(options.json, "r+b") as at:
        tally = harness.run(legs.of(chosen), seeds, options.most_faults, at)
    return dict(tally.verdicts), [str(fault) for fault in tally.faults]


def _spread(options: argparse.Namespace) -> tuple[dict[str, int], list[str]]:
    """The seeds in as many slices as there are workers, each in a process of its own, so that one
    that dies is a fault like others."""
    step = max(1, -(-options.calls // options.workers))
    processes = []
    for start in range(0, options.calls, step):
        at = tempfile.NamedTemporaryFile(prefix="flash8-fuzz-")  # noqa: SIM115
        command = [sys.executable, __file__, f"--json={at.name}"]
        command += [f"--seed={options.seed + start}"]
        command += [f"--calls={min(step, options.calls - start)}"]
        command += [f"--most-faults={options.most_faults}"]
        command += [f"--leg={leg}" for leg in options.leg or ()]
        processes.append((at, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
    verdicts: Counter[str] = Counter()
    faults = []
    for at, process in processes:
        said, _ = process.communicate()
        if process.returncode != 0:
            leg, _, seed = at.read().decode().strip().partition(" ")
            faults.append(
                f"{leg} {seed}: the process ended with {process.returncode}\n"
                f"  python tests/support/run_fuzz.py --leg {leg} --seed {seed} --calls 1"
            )
            continue
        *notes, counted = said.splitlines()
        print(*notes, sep="\n", end="\n" if notes else "")
        found, wrong = json.loads(counted)
        verdicts.update(found)
        faults += wrong
    return dict(verdicts), faults


if __name__ == "__main__":
    sys.exit(main())

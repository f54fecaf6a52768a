"""What setmaxnreg draws from: which exchanges between three warpgroups end, and which hang.

Each is tried in a process of its own, which is killed when it does not end.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from limited import run_limited

from .driver import Device, Module

_FACTS = Path(__file__).resolve().parent.parent / "facts.py"
#: (given by one warpgroup, asked for by two). At launch there are 3 * 168 = 504 registers a column.
PAIRS = ((40, 232), (56, 224), (24, 240), (48, 232), (56, 232))
_POOL, _SECONDS = 504, 10.0


def pair(device: Device, module: Module, given: int, asked: int) -> dict[str, Any]:
    """One exchange on every multiprocessor; returns if it ends."""
    blocks = 2 if device.is_simulated else device.multiprocessors
    done = device.zeros((blocks, 384), np.int32)
    module.launch(f"registers_{given}_{asked}", blocks, 384, done)
    want = np.repeat([given, asked, asked], 128)
    return {"as_expected": bool((done.read() == want).all())}


def run(images: Path, kind: str, *, seconds: float = _SECONDS) -> dict[str, Any]:
    """All exchanges: "ends", "hangs", or what else became of it."""
    found: dict[str, Any] = {}
    environ = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for given, asked in PAIRS:
            log = Path(folder) / "log"
            command = [sys.executable, str(_FACTS), "pair", f"--pair={given},{asked}"]
            command += [f"--images={images}", f"--kind={kind}", f"--json={folder}/pair.json"]
            ending = run_limited(command, limit=seconds, log=log, environ=environ)
            said = log.read_text(errors="replace").strip().splitlines()
            hangs = ending.killed or any("deadlock" in line for line in said)
            outcome = "hangs" if hangs else "ends" if ending.ok else ending.describe()
            asks = given + 2 * asked
            found[f"{given} + 2 x {asked} = {asks}"] = {
                "outcome": outcome,
                "as_expected": outcome == ("ends" if asks <= _POOL else "hangs"),
                **({"said": said[-3:]} if not ending.ok and not ending.killed else {}),
            }
    return found

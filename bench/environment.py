"""What a result was measured on: a number without it says nothing.

usage: python bench/environment.py [FILE.json]
"""

import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Says the commit where the checkout travels without its history.
_PACK = ROOT / "build" / "gpu-pack" / "pack.json"
_GPU_FIELDS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def describe() -> dict[str, Any]:
    """Machine, software and commit, for the head of every result file."""
    import torch  # which `machine` does without: it takes seconds

    facts = machine()
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = facts.get("gpu", {}) | _torch_facts()
    return facts


def machine() -> dict[str, Any]:
    """What is known without torch."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit(),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
    }
    query = ("nvidia-smi", "--id=0", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader")
    values = _output(*query)
    if values:
        facts["gpu"] = dict(zip(_GPU_FIELDS.split(","), values.split(", "), strict=False))
    return facts


def commit() -> dict[str, Any]:
    """The commit and whether files differ from it; without git, those of the pack."""
    found = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if found:
        changed = bool(_output("git", "-C", str(ROOT), "status", "--porcelain"))
        return {"commit": found, "uncommitted_changes": changed}
    try:
        pack = json.loads(_PACK.read_text())
    except (OSError, ValueError):
        return {"commit": "", "uncommitted_changes": False}
    return {name: pack[name] for name in ("commit", "uncommitted_changes")}


def _torch_facts() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {}
    properties = torch.cuda.get_device_properties(0)
    facts["multiprocessors"] = properties.multi_processor_count
    facts["l2_bytes"] = properties.L2_cache_size
    facts["cuda"] = torch.version.cuda
    facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    text = json.dumps(describe(), indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n")
    print(text)

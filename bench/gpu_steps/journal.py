"""The record of a run: one JSON, rewritten after every step, wherever it is wanted."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAME, LOG = "gpu_check.json", "gpu_check.log"


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing: a reader never finds half a file, whenever the writer is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


class Journal:
    """Writes `gpu_check.json` into each of `records`, and what all steps say into each of `logs`.

    A folder that cannot be written costs a warning, not the run.
    """

    def __init__(self, records: Sequence[Path], logs: Sequence[Path] = ()) -> None:
        self.records, self._logs = list(records), list(logs)
        for folder in self._logs:
            self._try(folder, lambda folder=folder: (folder / LOG).unlink(missing_ok=True))

    def write(self, record: dict[str, Any]) -> None:
        for folder in self.records:
            self._try(folder, lambda folder=folder: write_json(folder / NAME, record))

    def add_log(self, title: str, log: Path) -> None:
        """Appends what a step has said, in full."""
        for folder in self._logs:
            self._try(folder, lambda folder=folder: _append(folder / LOG, title, log))

    def _try(self, folder: Path, act: Any) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            act()
        except OSError as error:
            print(f"gpu-check: {folder} is not written: {error}", file=sys.stderr, flush=True)


def _append(target: Path, title: str, log: Path) -> None:
    with target.open("ab") as output:
        output.write(f"\n==== {title}\n".encode())
        with log.open("rb") as text:
            shutil.copyfileobj(text, output)

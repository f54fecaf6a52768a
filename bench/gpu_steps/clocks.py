"""The GPU's clocks, power and temperature while the steps run, from one nvidia-smi beside them."""

import statistics
import subprocess
import threading
import time
from typing import Any

_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_MILLISECONDS = 500


class Clocks:
    """Samples until `stop`. Where there is no nvidia-smi, there are no samples."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_FIELDS)}"]
        query += ["--format=csv,noheader,nounits", f"--loop-ms={_MILLISECONDS}"]
        try:
            self._process = subprocess.Popen(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._process = None
            return
        threading.Thread(target=self._read, daemon=True).start()

    def __call__(self, start: float, end: float) -> dict[str, Any] | None:
        """Minimum, median and maximum of every field between two times of `time.monotonic`."""
        found = [values for when, values in list(self._samples) if start <= when <= end]
        if not found:
            return None
        summary: dict[str, Any] = {"samples": len(found)}
        for name, values in zip(_FIELDS, zip(*found, strict=True), strict=True):
            summary[name] = [min(values), statistics.median(values), max(values)]
        return summary

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                values = [float(text) for text in line.split(",")]
            except ValueError:
                continue  # "[N/A]" or a message
            if len(values) == len(_FIELDS):
                self._samples.append((time.monotonic(), values))

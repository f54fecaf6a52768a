"""`flash8 info`: versions, driver, devices, and what serves which call here."""

import platform

import torch

from flash8 import _native
from flash8._version import __version__
from flash8.backends.describe import describe, describe_mode
from flash8.cli.table import format_table


def run() -> int:
    """Print it all on one screen."""
    print(f"flash8     {__version__}, extension ABI {_native.ABI_VERSION}")
    print(f"python     {platform.python_version()}, torch {torch.__version__}")
    print(*_driver_lines(), sep="\n")
    print(f"kernels    {describe_mode()}", end="\n\n")
    services = [(row.call, row.backend, row.reason) for row in describe()]
    print(format_table(("call", "backend", "why"), services))
    return 0


def _driver_lines() -> list[str]:
    probe = _native.probe_driver()
    if not probe.version:
        return [f"driver     none: {probe.reason}"]
    major, minor = divmod(probe.version, 1000)
    lines = [f"driver     CUDA {major}.{minor // 10} from {probe.path}"]
    for device in probe.devices:
        capability = ".".join(map(str, device.compute_capability))
        lines.append(f"device {device.ordinal}   {device.name}, compute capability {capability}")
    return lines if probe.devices else [*lines, f"devices    none: {probe.reason}"]

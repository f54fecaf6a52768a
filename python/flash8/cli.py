"""The command line: `flash8 info`, `flash8 compile` and `flash8 --version`."""

import argparse
import platform
from collections.abc import Sequence

from flash8 import _native
from flash8._table import format_table
from flash8._version import __version__
from flash8.compiler import command as compile_command


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


def _info(_: argparse.Namespace) -> int:
    import torch

    from flash8.backends import describe

    print(f"flash8     {__version__}, extension ABI {_native.ABI_VERSION}")
    print(f"python     {platform.python_version()}, torch {torch.__version__}")
    print(*_driver_lines(), sep="\n", end="\n\n")
    services = [(row.call, row.backend, row.reason) for row in describe()]
    print(format_table(("call", "backend", "why"), services))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flash8", description="FP8 and 16-bit attention.")
    parser.add_argument("--version", action="version", version=f"flash8 {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    info = commands.add_parser(
        "info",
        help="versions, driver, devices, and which backend serves which call",
        description="Print versions, driver, devices, and which backend serves which call and why.",
    )
    info.set_defaults(run=_info)
    compile_parser = commands.add_parser(
        "compile",
        help="compile a kernel, or all that ship",
        description="Compile kernels into the cache and print what they cost.",
    )
    compile_command.add_arguments(compile_parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: sys.argv) and return the exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status

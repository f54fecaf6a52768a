"""The command line: `flash8 info`, `check`, `compile`, `sim` and `flash8 --version`."""

import argparse
import platform
from collections.abc import Sequence

from flash8 import _native
from flash8._version import __version__
from flash8.cli import compile as compile_command
from flash8.cli.table import format_table


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

    from flash8.backends.describe import describe, describe_mode

    print(f"flash8     {__version__}, extension ABI {_native.ABI_VERSION}")
    print(f"python     {platform.python_version()}, torch {torch.__version__}")
    print(*_driver_lines(), sep="\n")
    print(f"kernels    {describe_mode()}", end="\n\n")
    services = [(row.call, row.backend, row.reason) for row in describe()]
    print(format_table(("call", "backend", "why"), services))
    return 0


def _check(options: argparse.Namespace) -> int:
    from flash8.cli import check as check_command

    if options.list:
        print(*check_command.kernels(), sep="\n")
        return 0
    return check_command.run(options.kernels)


def _sim(options: argparse.Namespace) -> int:
    from flash8.cli import sim as sim_command

    return sim_command.run(options.rest)


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
    check = commands.add_parser(
        "check",
        help="run every shipped kernel on this GPU and compare it with the portable code",
        description="Check shipped kernels on the current GPU against the portable code: all of "
        "them, or those named. A kernel that hangs or faults takes its process along: to see the "
        "others, give each a process of its own.",
    )
    check.add_argument("kernels", nargs="*", metavar="KERNEL", help="by default all that ship")
    check.add_argument("--list", action="store_true", help="print the names of all that ship")
    check.set_defaults(run=_check)
    compile_parser = commands.add_parser(
        "compile",
        help="compile a kernel, or all that ship",
        description="Compile kernels into the cache and print what they cost.",
    )
    compile_command.add_arguments(compile_parser)
    # No help of its own: --help is for the simulator's command, like all other arguments.
    sim = commands.add_parser(
        "sim",
        add_help=False,
        help="run a kernel on the simulated device, if that is installed, and draw its timeline",
    )
    sim.set_defaults(run=_sim)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: sys.argv) and return the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.run is not _sim:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    status: int = options.run(options)
    return status

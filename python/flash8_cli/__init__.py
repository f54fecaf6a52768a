"""The command line: `flash8 info`, `check`, `compile`, `sim` and `flash8 --version`.

What the arguments are, and no more: a command imports its file of `flash8.cli` when it runs. This
package lies beside `flash8`, whose import brings torch, so that help takes no second.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def _info(_: argparse.Namespace) -> int:
    from flash8.cli import info

    return info.run()


def _check(options: argparse.Namespace) -> int:
    from flash8.cli import check

    return check.list_kernels() if options.list else check.run(options.kernels)


def _compile(options: argparse.Namespace) -> int:
    from flash8.cli import compile as compile_command

    return compile_command.run(options)


def _sim(options: argparse.Namespace) -> int:
    from flash8.cli import sim

    return sim.run(options.rest)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"flash8 {metadata.version('flash8')}")
        parser.exit()


def _define(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME=VALUE")
    return name, value


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "check",
        help="run every shipped kernel on this GPU and compare it with the portable code",
        description="Check shipped kernels on the current GPU against the portable code: all of "
        "them, or those named. A kernel that hangs or faults takes its process along: to see the "
        "others, give each a process of its own.",
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="by default all that ship")
    parser.add_argument("--list", action="store_true", help="print the names of all that ship")
    parser.set_defaults(run=_check)


def _add_compile(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compile",
        help="compile kernels by name or from a source, or all that ship",
        description="Compile kernels into the cache and print what they cost.",
        epilog="`flash8 check --list` names the kernels: forward_bf16_d128_causal, ...",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "kernels", nargs="*", default=[], metavar="KERNEL", help="shipped ones, or one FILE.cu"
    )
    what.add_argument("--all", action="store_true", help="every variant that a release ships")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="DIR",
        help="with --all: also write the cubins and a manifest there, as a wheel carries them",
    )
    parser.add_argument(
        "-D",
        dest="defines",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        type=_define,
        help="for a FILE.cu",
    )
    parser.set_defaults(run=_compile)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flash8", description="FP8 and 16-bit attention.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(title="commands", required=True)
    info = commands.add_parser(
        "info",
        help="versions, driver, devices, and what serves training, prefill and decode here",
        description="Print versions, driver, devices, and which backend serves which call and why.",
    )
    info.set_defaults(run=_info)
    _add_check(commands)
    _add_compile(commands)
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

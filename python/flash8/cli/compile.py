"""`flash8 compile`: a kernel or all shipped ones, with a table of what they cost."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flash8.cli.table import format_table
from flash8.compiler import (
    Compiled,
    CompileError,
    CompilerNotFoundError,
    MissingVariantError,
    Unit,
    compile_unit,
    write_package,
)
from flash8.compiler.places import printable

HEADER = (
    "unit",
    "kernel",
    "registers",
    "spills B",
    "stack B",
    "static smem B",
    "cubin KB",
    "compile s",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `flash8 compile`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("source", nargs="?", type=Path, metavar="FILE.cu", help="a kernel's source")
    what.add_argument("--all", action="store_true", help="every variant that a release ships")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="DIR",
        help="with --all: also write the cubins and a manifest there, as a wheel carries them",
    )
    parser.add_argument(
        "-D", dest="defines", action="append", default=[], metavar="NAME[=VALUE]", type=_define
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compile what `options` name and print the table. 1 when a kernel fails or has a problem."""
    if options.into and not options.all:
        print("flash8 compile: --into goes with --all", file=sys.stderr)
        return 2
    units = _shipped() if options.all else [Unit(options.source, tuple(options.defines))]
    if not units:
        print("This release ships no compiled kernel.")
        return 0
    compiled, problems = [], []
    for i, unit in enumerate(units):
        try:
            compiled.append(compile_unit(unit, step=f"{i + 1}/{len(units)}" if options.all else ""))
        except (CompileError, OSError, MissingVariantError) as error:
            problems.append(str(error))
        except CompilerNotFoundError as error:
            problems.append(str(error))
            break
    if compiled:
        print(format_table(HEADER, [row for result in compiled for row in _rows(result)]))
        for result in compiled:
            print(f"{result.unit.label}: {printable(result.folder)}")
    for result in compiled:
        problems += [f"{result.unit.label}: {text}" for text in result.report.problems()]
    if options.into and not problems:
        write_package(compiled, options.into)
        print(f"{len(compiled)} cubins are in {printable(options.into)}")
    for problem in problems:
        print(f"flash8 compile: {printable(problem)}", file=sys.stderr)
    return 1 if problems else 0


def _shipped() -> list[Unit]:
    from flash8.backends.hopper.backward_variants import SHIPPED_BACKWARDS
    from flash8.backends.hopper.decode_variants import SHIPPED_DECODERS
    from flash8.backends.hopper.kernels import Variant, kernels_of
    from flash8.backends.hopper.quantize_variants import SHIPPED_QUANTIZERS
    from flash8.backends.hopper.variants import SHIPPED

    variants: list[Variant] = [*SHIPPED, *SHIPPED_DECODERS]
    variants += [*SHIPPED_BACKWARDS, *SHIPPED_QUANTIZERS]
    # Variants of the backward share kernels.
    return list(dict.fromkeys(part.unit() for variant in variants for part in kernels_of(variant)))


def _define(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME or NAME=VALUE")
    return name, value


def _rows(compiled: Compiled) -> Sequence[tuple[str, ...]]:
    size = f"{compiled.cubin.stat().st_size / 1024:.1f}"
    seconds = f"{compiled.seconds:.1f}" if compiled.seconds else "cached"
    return [
        (
            compiled.unit.label,
            kernel.name,
            str(kernel.registers),
            str(kernel.spill_stores + kernel.spill_loads),
            str(kernel.stack),
            str(kernel.static_shared),
            size,
            seconds,
        )
        for kernel in compiled.report.kernels
    ]

"""`flash8 compile`: kernels by name, from a source, or all that ship; a table of what they cost."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from flash8.backends.hopper import kernels
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


def run(options: argparse.Namespace) -> int:
    """Compile what `options` name and print the table. 1 when a kernel fails or has a problem, 2
    when the options make no sense."""
    try:
        units = _units(options)
    except ValueError as error:
        print(f"flash8 compile: {error}", file=sys.stderr)
        return 2
    if not units:
        print("This release ships no compiled kernel.")
        return 0
    compiled, problems = [], []
    for i, unit in enumerate(units):
        try:
            compiled.append(
                compile_unit(unit, step=f"{i + 1}/{len(units)}" if len(units) > 1 else "")
            )
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


def _units(options: argparse.Namespace) -> list[Unit]:
    """What to compile, once each: variants of the backward share kernels."""
    if options.into and not options.all:
        raise ValueError("--into goes with --all")
    sources = [name for name in options.kernels if name.endswith(".cu")]
    if sources:
        if len(options.kernels) > 1:
            raise ValueError(f"{sources[0]} goes by itself, got {len(options.kernels)} arguments")
        return [Unit(Path(sources[0]), tuple(options.defines))]
    if options.defines:
        raise ValueError("-D goes with a FILE.cu; the name of a kernel says all of it")
    shipped = kernels.shipped()
    variants = shipped if options.all else [_named(name, shipped) for name in options.kernels]
    parts = [part for variant in variants for part in kernels.kernels_of(variant)]
    return list(dict.fromkeys(part.unit() for part in parts))


def _named(name: str, shipped: Sequence[kernels.Variant]) -> kernels.Variant:
    by_name = {variant.name: variant for variant in shipped}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=3) or ["`flash8 check --list`"]
        raise ValueError(f"no shipped kernel is called {name}; see {', '.join(near)}")
    return by_name[name]


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

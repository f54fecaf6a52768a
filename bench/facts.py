"""Settles on a Hopper GPU what flash8's design assumes of it.

arithmetic  FP8 WGMMA accumulates with 13 mantissa bits, toward zero, BF16 WGMMA with 25; the
            conversion to e4m3 saturates at 448, keeps NaN, and rounds to nearest even
rates       results a cycle of ex2 in fp32 and fp16 pairs, and of e4m3 pairs to fp16
mma         mma.sync.m16n8k16 alone and beside the conversions of its operand from e4m3
wgmma       m64n64k16 with both operands in shared memory, alone and beside stores; wider ones
l2          fp32 additions into L2: the bulk reduction and red.v4, from one SM and from all
registers   which exchanges of setmaxnreg end and which hang
device      nothing is measured: the driver answers

Each fact says under "as_expected" whether it is what the design assumes, and rates whether the
kernel's results are right. Needs a driver and NumPy, no torch. The kernels come compiled, from
`make gpu-pack`, or are compiled by flash8 where it is installed.

usage: python bench/facts.py [FACT ...] [--images DIR] [--json FILE] [--quick]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopper_facts import arithmetic, rates, registers
from hopper_facts.driver import Device, DriverError, Module

if TYPE_CHECKING:
    from flash8.compiler import Compiled

KERNELS = Path(__file__).resolve().parent / "hopper_facts"
Fact = Callable[..., dict[str, Any]]
#: By name: the source, and the function. `registers` is apart: it starts processes.
FACTS: dict[str, tuple[str, Fact]] = {
    "arithmetic": ("arithmetic", arithmetic.run),
    "rates": ("rates", rates.arithmetic),
    "mma": ("mma", rates.mma),
    "wgmma": ("wgmma", rates.wgmma),
    "l2": ("l2", rates.l2),
}
SOURCES = (*FACTS, "registers")
#: What the simulated device does not know.
NOT_SIMULATED = ("mma",)


def compile_images(folder: Path) -> None:
    """Every source's cubin and PTX into `folder`, by flash8's own compiler and its cache."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        compiled = compile_source(name)
        (folder / f"{name}.cubin").write_bytes(compiled.cubin.read_bytes())
        (folder / f"{name}.ptx").write_bytes(compiled.ptx.read_bytes())


def compile_source(name: str) -> "Compiled":
    from flash8.compiler import Unit, compile_unit

    return compile_unit(Unit(KERNELS / f"{name}.cu", (), f"facts_{name}"))


def measure(name: str, images: Path, kind: str, *, quick: bool) -> dict[str, Any]:
    """One fact, on device 0. `kind`: "cubin" or, on the simulated device, "ptx"."""
    if name == "registers":
        return registers.run(images, kind)
    source, function = FACTS[name]
    device = Device()
    return function(device, load(device, images, source, kind), quick=quick)


def load(device: Device, images: Path, source: str, kind: str) -> Module:
    return device.load((images / f"{source}.{kind}").read_bytes())


def unexpected(found: Any, path: str = "") -> list[str]:
    """What is not as expected, by its place in the results."""
    if not isinstance(found, dict):
        return []
    here = [path] if found.get("as_expected") is False else []
    return here + [
        place for key, value in found.items() for place in unexpected(value, f"{path}/{key}")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("facts", nargs="*", metavar="FACT", help=f"of {', '.join(SOURCES)}")
    parser.add_argument("--images", type=Path, help="the folder of the compiled kernels")
    parser.add_argument("--kind", choices=("cubin", "ptx"), default="cubin")
    parser.add_argument("--json", type=Path, help="where the results go, besides stdout")
    parser.add_argument("--quick", action="store_true", help="a few iterations, as a check only")
    parser.add_argument("--pair", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wrong = set(options.facts) - {*SOURCES, "device", *(("pair",) if options.pair else ())}
    if wrong:
        parser.error(f"there is no fact {', '.join(sorted(wrong))}; there are {', '.join(SOURCES)}")
    try:
        device = Device()
    except DriverError as error:
        print(f"hopper_facts: {error}; nothing is measured", file=sys.stderr)
        return 1
    if device.capability != (9, 0):
        print(f"hopper_facts: {device.name} is not a Hopper GPU", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or Path(folder)
        if options.images is None and set(options.facts) != {"device"}:
            compile_images(images)
        results: dict[str, Any] = {"device": device.describe()}
        if options.pair:
            given, asked = map(int, options.pair.split(","))
            module = load(device, images, "registers", options.kind)
            results["pair"] = registers.pair(device, module, given, asked)
        wanted = [name for name in options.facts or SOURCES if name in SOURCES]
        for name in wanted:
            results[name] = measure(name, images, options.kind, quick=options.quick)
    text = json.dumps(results, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    found = unexpected(results)
    for place in found:
        print(f"not as expected: {place}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

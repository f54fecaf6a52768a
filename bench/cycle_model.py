"""A model to choose kernels by: how busy the mainloop of a forward kernel keeps a multiprocessor.

It replays the machine code of one unmasked pass over a tile of keys by all consumer warpgroups:
issue slots, the units behind them, turns and barriers, and the tensor core with its groups of
products, as sm_model/machine.py, steps.py and replay.py say. What it leaves out: memory that is
late, the producer's instructions, tiles with a mask, what is before and after the loop, and the
clock, which falls under load.

This is arithmetic on machine code and no measurement. How far it is off is known for
FlashAttention-3's kernels only (sm_model/peers.py): the model is applied to their machine code,
and what it predicts is compared with the speed that their paper reports (`calibration`).

usage: python bench/cycle_model.py [VARIANT ...]
       python bench/cycle_model.py --peers FOLDER --write

The first prints a table of these shipped variants, or of a choice of them; the second also applies
the model to FlashAttention-3's cubins (bench/peer_code.py makes them) and writes
bench/results/cycle_model.*. --waiting-products shows what another depth of the queue at the tensor
core would make of them.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_choices import Choice
from flash8.backends.hopper.variants import SHIPPED, ForwardVariant
from flash8.compiler import compile_unit
from machine_code import MachineCode, disassembly, tile
from sm_model.machine import Machine, Unit
from sm_model.peers import PEERS, Peer
from sm_model.replay import replay
from sm_model.steps import controls, loop_steps, producers_bytes

RESULTS = Path(__file__).resolve().parent / "results"

#: One of each mainloop and head_dim, and what could be chosen instead.
DEFAULT = (
    Choice(ForwardVariant("bf16", 64, 64)),
    Choice(ForwardVariant("bf16", 128, 128)),
    Choice(ForwardVariant("bf16", 128, 128, mask="causal")),
    Choice(ForwardVariant("bf16", 192, 128, mask="causal")),
    Choice(ForwardVariant("bf16", 256, 256, mask="causal")),
    Choice(ForwardVariant("e4m3", 64, 64, mask="causal", scales="head")),
    Choice(ForwardVariant("e4m3", 128, 128, scales="head")),
    Choice(ForwardVariant("e4m3", 128, 128, scales="head", v_colmajor=True)),
    Choice(ForwardVariant("e4m3", 128, 128, scales="head"), polynomial_every=8),
    Choice(ForwardVariant("e4m3", 128, 128, scales="head"), polynomial_every=4),
    Choice(ForwardVariant("e4m3", 128, 128, mask="local", scales="head")),  # in turn
    Choice(ForwardVariant("e4m3", 192, 128, mask="causal", scales="head")),
    Choice(ForwardVariant("e4m3", 256, 256, scales="head")),
)


@dataclass(frozen=True)
class Row:
    """One kernel. Shares are of `cycles`, 0 to 1, and all of it is calculated.

    Attributes:
        instructions: Of a consumer warp, for a tile of keys.
        cycles: For a tile of keys of all consumer warpgroups.
        shared: Of the port of shared memory, the producer's traffic included.
    """

    name: str
    tile: str  # kBlockM x kBlockN
    instructions: int
    cycles: float
    tensor: float
    mufu: float
    issue: float
    shared: float


def row(choice: Choice, machine: Machine | None = None) -> Row:
    variant = choice.variant
    block_m, block_n = tile(variant)
    return modelled(
        choice.name,
        compile_unit(choice.unit()).cubin,
        block_m // 64,
        block_n,
        machine,
        transposes=variant.dtype == "e4m3" and not variant.v_colmajor,
        widens=variant.cache == "e4m3",
    )


def peer_row(peer: Peer, cubin: Path, machine: Machine | None = None) -> Row:
    transposes = peer.dtype == "e4m3"
    return modelled(peer.name, cubin, peer.warpgroups, peer.block_n, machine, transposes=transposes)


def modelled(
    name: str,
    cubin: Path,
    warpgroups: int,
    block_n: int,
    machine: Machine | None = None,
    *,
    transposes: bool = False,
    widens: bool = False,
) -> Row:
    """The unmasked mainloop of a cubin."""
    machine = machine or Machine()
    lines = MachineCode.of(cubin).mainloops[0].lines
    loop = loop_steps(lines, controls(disassembly(cubin)), machine)
    producers = producers_bytes(loop, transposes=transposes, widens=widens)
    busy = replay(loop, warpgroups, producers, machine)
    return Row(
        name,
        f"{64 * warpgroups} x {block_n}",
        len(loop),
        round(busy.cycles, 1),
        round(busy.shares[Unit.TENSOR], 3),
        round(busy.shares[Unit.MUFU], 3),
        round(busy.issue, 3),
        round(busy.shared, 3),
    )


# ----------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """Of the peer's kernels of one element type.

    Attributes:
        factor: What the published shares of the nominal speed are, on the geometric mean, of the
            predicted shares in which the tensor core is busy: the clock under load, and what the
            model leaves out.
        errors: By kernel: the predicted share times the factor, by the published one, less 1.
    """

    factor: float
    errors: dict[str, float]


def calibration(peers: Sequence[Peer], predicted: dict[str, float]) -> Calibration:
    """`predicted`: the share in which the tensor core is busy, by name."""
    ratios = {x.name: x.published_share / predicted[x.name] for x in peers}
    factor = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    return Calibration(factor, {name: factor / ratio - 1 for name, ratio in ratios.items()})


# ---------------------------------------------------------------------------------------- tables


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| kernel, calculated | tile | instructions | cycles | tensor | MUFU | issue | shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in rows:
        shares = " | ".join(f"{share:.0%}" for share in (x.tensor, x.mufu, x.issue, x.shared))
        lines.append(f"| {x.name} | {x.tile} | {x.instructions} | {x.cycles:.0f} | {shares} |")
    return "\n".join(lines) + "\n"


def calibration_table(rows: Sequence[Row]) -> str:
    """Of all peers."""
    predicted = {x.name: x.tensor for x in rows}
    lines = [
        "| FlashAttention-3's kernel | tensor, calculated | TFLOP/s, published | share of nominal "
        "| factor | error |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in dict.fromkeys(x.dtype for x in PEERS):
        peers = [x for x in PEERS if x.dtype == dtype]
        found = calibration(peers, predicted)
        lines += [
            f"| {x.name} | {predicted[x.name]:.0%} | {x.tflops:.0f} | {x.published_share:.0%} "
            f"| {found.factor:.2f} | {found.errors[x.name]:+.0%} |"
            for x in peers
        ]
    return "\n".join(lines) + "\n"


def _choices(names: Sequence[str]) -> Sequence[Choice]:
    """Raises SystemExit for a name that no shipped variant has."""
    shipped = {x.name: Choice(x) for x in SHIPPED}
    known = shipped | {x.name: x for x in DEFAULT}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: no such variant; there are {', '.join(known)}")
    return [known[name] for name in names] or DEFAULT


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="calculated, no measurement")
    parser.add_argument("variants", nargs="*", metavar="VARIANT")
    parser.add_argument("--peers", type=Path, help="a folder of FlashAttention-3's cubins")
    parser.add_argument("--write", action="store_true", help="into bench/results")
    parser.add_argument("--waiting-products", type=int, help="another depth of the tensor core")
    given = parser.parse_args(arguments)
    if given.write and (given.variants or given.waiting_products or given.peers is None):
        parser.error("--write takes all variants and --peers, and nothing else")
    deep = given.waiting_products
    machine = Machine() if deep is None else Machine(waiting_products=deep)
    ours = [row(choice, machine) for choice in _choices(given.variants)]
    theirs = (
        [peer_row(x, given.peers / f"{x.name}.cubin", machine) for x in PEERS]
        if given.peers
        else []
    )
    tables = [table([*theirs, *ours])]
    tables += [calibration_table(theirs)] if theirs else []
    print("\n".join(tables))
    if given.write:
        (RESULTS / "cycle_model.md").write_text("\n".join(tables))
        rows = {"kernels": [asdict(x) for x in ours], "peers": [asdict(x) for x in theirs]}
        (RESULTS / "cycle_model.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What the model takes a multiprocessor of Hopper (sm_90) for.

A multiprocessor has four schedulers. A warpgroup has a warp on each of them, and all four do the
same, so the model replays one: an issue slot, a quarter of every unit and of the tensor core, and
one warp of each warpgroup.

Rates are those of the throughput table for compute capability 9.0 in the CUDA programming guide,
divided by four schedulers. Latencies and depths are assumptions: NVIDIA publishes none of them.
"""

from dataclasses import dataclass, field
from enum import Enum


class Unit(Enum):
    """What executes an instruction."""

    FMA = "FMA"  # fp32 add, multiply and multiply-add; integer multiply-add at half the rate
    ALU = "ALU"  # minimum and maximum, logic, shifts, selects, comparisons, conversions
    MUFU = "MUFU"  # exponentials, tanh, reciprocals
    MEMORY = "memory"  # shared memory, shuffles, mbarriers, special registers
    NONE = "none"  # the issue slot alone: the uniform datapath, branches, barriers
    TENSOR = "tensor"


def _taken() -> dict[Unit, int]:
    return {Unit.FMA: 1, Unit.ALU: 2, Unit.MUFU: 8, Unit.MEMORY: 4, Unit.NONE: 0}


def _latencies() -> dict[Unit, int]:
    return {Unit.FMA: 4, Unit.ALU: 4, Unit.MUFU: 18, Unit.MEMORY: 24, Unit.NONE: 12}


@dataclass(frozen=True)
class Machine:
    """Cycles, for a scheduler and a warp instruction.

    Attributes:
        taken: That a unit is taken by one instruction: 32 lanes by the lanes of the unit.
        latencies: From the begin of an instruction until a scoreboard that it sets is clear.
            Those of fixed latency set none; the code itself says how long to wait for them.
        waiting: Instructions that may have been issued to a unit and wait for it. A warp that has
            no place there stalls, and so does everything behind in its order.
        waiting_products: The same for a warp's wgmma at the tensor core.
        product_latency: From the end of a group's last wgmma until a wait for it returns.
        turn_latency: From the arrival at a named barrier until a warp that waits there goes on.
        multiply_adds: Of the whole multiprocessor, by kind of product: HGMMA is 16-bit.
        shared_bytes: Of the whole multiprocessor.
    """

    taken: dict[Unit, int] = field(default_factory=_taken)
    latencies: dict[Unit, int] = field(default_factory=_latencies)
    waiting: int = 1
    waiting_products: int = 1
    product_latency: int = 20
    turn_latency: int = 20
    multiply_adds: dict[str, int] = field(
        default_factory=lambda: {"HGMMA": 2048, "QGMMA": 4096, "IGMMA": 4096}
    )
    shared_bytes: int = 128

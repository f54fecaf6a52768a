"""The replay of one loop by one warp of each warpgroup, on one scheduler.

The state is small: when the issue slot and every unit are free again, and of each warp its step,
the scoreboards and the groups of products that it has under way. Whatever a step waits for is known
in cycles as soon as the steps before it are issued. So the replay always issues the step that can
go first, and at equal times that of the warp which has waited longer.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from sm_model.machine import Machine, Unit
from sm_model.steps import Kind, Step

_NEVER = float("inf")
#: Rounds of the loop: those before the first one counted, and all.
_WARM, _ROUNDS = 8, 32


class StuckError(ValueError):
    """Every warpgroup waits for another one's turn."""


@dataclass(frozen=True)
class Busy:
    """What one round of the loop by all warpgroups takes.

    Attributes:
        cycles: In a steady state.
        shares: Of each unit, 0 to 1: the time that it works. Of the tensor core that is without
            the time in which it waits for operands.
        issue: The share of the issue slot.
        shared: The share of the port of shared memory, the producer's traffic included.
    """

    cycles: float
    shares: dict[Unit, float]
    issue: float
    shared: float


@dataclass
class _Warp:
    turn: deque[float]  # when each turn that was passed to this warp arrives
    at: int = 0
    ready: float = 0
    issued: float = -1  # the time of its last step
    boards: dict[int, float] = field(default_factory=dict)
    begins: deque[float] = field(default_factory=deque)  # of the products that may still wait
    open_group: float = 0
    groups: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)  # the rounds


def replay(
    loop: Sequence[Step], warpgroups: int, producers: int = 0, machine: Machine | None = None
) -> Busy:
    """A loop by so many warpgroups, until the time of a round no longer depends on the start.

    `producers` are the bytes of shared memory that the producer moves meanwhile. It has a whole
    stage of time for them, so it delays no single product; but a round takes at least as long as
    the port does for all bytes.

    Raises:
        StuckError: The turns of the loop do not go round.
    """
    machine = machine or Machine()
    moved = warpgroups * sum(x.operand_bytes for x in loop) + producers
    port = moved / machine.shared_bytes
    cycles = max(_Replay(loop, warpgroups, machine).run(), port)
    taken: dict[Unit, float] = dict.fromkeys(Unit, 0.0)
    for x in loop:
        taken[x.unit] += x.taken * warpgroups
    del taken[Unit.NONE]
    shares = {unit: time / cycles for unit, time in taken.items()}
    return Busy(cycles, shares, len(loop) * warpgroups / cycles, port / cycles)


class _Replay:
    def __init__(self, loop: Sequence[Step], warpgroups: int, machine: Machine) -> None:
        self.machine = machine
        turns = [x.kind for x in loop if x.kind in (Kind.TAKE_TURN, Kind.PASS_TURN)]
        # A loop that passes a turn on before it takes one is entered with the turn, and left so.
        holds = turns[:1] == [Kind.PASS_TURN]
        enters = [Step(kind=Kind.TAKE_TURN)] if holds else []
        leaves = [Step(kind=Kind.PASS_TURN)] if holds else []
        self.steps = [*enters, *(list(loop) * _ROUNDS), *leaves]
        self.last = {len(enters) + len(loop) * (n + 1) - 1 for n in range(_ROUNDS)}
        self.warps = [_Warp(deque([0.0] if i == 0 else [])) for i in range(warpgroups)]
        self.free: dict[Unit, float] = dict.fromkeys(Unit, 0.0)
        self.slot = 0.0

    def run(self) -> float:
        """Cycles of a round."""
        while waiting := [w for w in self.warps if w.at < len(self.steps)]:
            warp = min(waiting, key=lambda w: (self._earliest(w), w.issued))
            time = self._earliest(warp)
            if time == _NEVER:
                raise StuckError("every warpgroup waits for its turn")
            self._issue(warp, time)
        # The last round of one warpgroup runs beside nothing.
        counted = _ROUNDS - _WARM - len(self.warps)
        spans = [w.finished[_WARM + counted] - w.finished[_WARM] for w in self.warps]
        return sum(spans) / len(spans) / counted

    def _earliest(self, warp: _Warp) -> float:
        x = self.steps[warp.at]
        time = max(warp.ready, self.slot, *(warp.boards.get(board, 0.0) for board in x.waits))
        if x.kind is Kind.TAKE_TURN:
            return max(time, warp.turn[0] if warp.turn else _NEVER)
        if x.kind is Kind.WAIT_PRODUCTS:
            over = warp.groups[: max(0, len(warp.groups) - x.pending)]
            return max(time, *(end + self.machine.product_latency for end in over), 0.0)
        if x.kind is Kind.PRODUCT:
            return max(time, warp.begins[0] if self._is_full(warp) else 0.0)
        return max(time, self.free[x.unit] - self.machine.waiting * x.taken)

    def _is_full(self, warp: _Warp) -> bool:
        """Whether as many of its products as may wait do so, unless the first has begun."""
        return len(warp.begins) >= self.machine.waiting_products

    def _issue(self, warp: _Warp, time: float) -> None:
        x = self.steps[warp.at]
        self.slot = time + 1
        warp.issued = time
        warp.ready = time + max(1, x.stall)
        begin = max(time, self.free[x.unit]) if x.unit is not Unit.NONE else time
        end = begin + x.taken + x.starved
        self.free[x.unit] = end
        for board in x.sets:
            warp.boards[board] = max(warp.boards.get(board, 0.0), begin + x.latency)
        if x.kind is Kind.PRODUCT:
            self._product(warp, x, begin, end)
        elif x.kind is Kind.WAIT_PRODUCTS:
            warp.groups = warp.groups[-x.pending :] if x.pending else []
        elif x.kind is Kind.TAKE_TURN:
            warp.turn.popleft()
        elif x.kind is Kind.PASS_TURN:
            after = self.warps[(self.warps.index(warp) + 1) % len(self.warps)]
            after.turn.append(time + self.machine.turn_latency)
        if warp.at in self.last:
            warp.finished.append(time)
        warp.at += 1

    def _product(self, warp: _Warp, x: Step, begin: float, end: float) -> None:
        if self._is_full(warp):
            warp.begins.popleft()
        warp.begins.append(begin)
        warp.open_group = end
        if x.closes:
            warp.groups.append(end)

"""Loops of a few steps, whose time can be computed by hand."""

import pytest

from sm_model.machine import Machine, Unit
from sm_model.replay import StuckError, replay
from sm_model.steps import Kind, Step

#: Nothing but issue slots and units takes time.
BARE = Machine(product_latency=0, turn_latency=0)

ISSUE = Step()
TAKE, PASS = Step(kind=Kind.TAKE_TURN), Step(kind=Kind.PASS_TURN)
MUFU = Step(unit=Unit.MUFU, taken=8)


def product(taken, *, closes=True, **other):
    return Step(kind=Kind.PRODUCT, unit=Unit.TENSOR, taken=taken, closes=closes, **other)


def wait(pending=0):
    return Step(kind=Kind.WAIT_PRODUCTS, pending=pending)


def cycles(loop, warpgroups, machine=BARE, producers=0):
    return replay(loop, warpgroups, producers, machine).cycles


def test_one_warpgroup_overlaps_nothing():
    """Products, waits of one slot each, and 50 instructions: their sum."""
    loop = [product(100), wait(), *[ISSUE] * 50, product(100), wait()]
    assert cycles(loop, 1) == 100 + 1 + 50 + 100 + 1
    busy = replay(loop, 1, 0, BARE)
    assert busy.shares[Unit.TENSOR] == pytest.approx(200 / 252)
    assert busy.issue == pytest.approx(54 / 252)


def test_groups_of_two_products_are_waited_for_as_one():
    loop = [product(100, closes=False), product(100), wait(), *[ISSUE] * 50]
    assert cycles(loop, 1) == 200 + 1 + 50


def test_a_wait_returns_after_the_latency_of_a_product():
    loop = [product(100), wait(), *[ISSUE] * 50]
    assert cycles(loop, 1, Machine(product_latency=20)) == 100 + 20 + 1 + 50


@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("turns", [True, False])
def test_warpgroups_hide_a_softmax_under_products(warpgroups, turns):
    """The longer one is all that takes time."""
    begin = [TAKE, product(100), PASS] if turns else [product(100)]
    assert cycles([*begin, wait(), *[ISSUE] * 60], warpgroups) == 100 * warpgroups


def test_the_issue_slot_is_shared():
    loop = [product(100), wait(), *[ISSUE] * 198]
    assert cycles(loop, 1) == 299
    assert cycles(loop, 2) == 400
    assert replay(loop, 2, 0, BARE).issue == 1


def test_exponentials_are_shared():
    loop = [product(100), wait(), *[MUFU] * 30]
    busy = replay(loop, 2, 0, BARE)
    assert busy.cycles == 2 * 30 * 8
    assert busy.shares[Unit.MUFU] == 1
    assert busy.shares[Unit.TENSOR] == pytest.approx(200 / 480)


def test_a_unit_that_is_taken_stalls_what_comes_behind_it():
    """One exponential may wait for the unit; the fourth instruction waits for the third."""
    loop = [MUFU, MUFU, MUFU, *[ISSUE] * 30]
    # At 0, 1 (begins at 8) and 8 (begins at 16), then 30 slots: the unit is free again at 24.
    assert cycles(loop, 1) == 8 + 1 + 30


@pytest.mark.parametrize("warpgroups", [2, 3])
def test_a_turn_that_is_held_through_a_product_overlaps_nothing(warpgroups):
    loop = [TAKE, product(100), wait(), PASS]
    # The turn at 0, the product from 1 to 101, the arrival at 102.
    machine = Machine(product_latency=0, turn_latency=20)
    assert cycles(loop, warpgroups, machine) == (102 + 20) * warpgroups


def test_a_loop_that_begins_by_passing_on_is_entered_in_turn():
    """A product before and one behind the softmax, both in one turn."""
    loop = [product(50), PASS, wait(), *[ISSUE] * 40, TAKE, product(50)]
    # A warpgroup has P V and Q K in its turn, in the order of the turns: 100 cycles of each.
    assert cycles(loop, 2) == 200


def test_turns_go_round():
    with pytest.raises(StuckError, match="turn"):
        replay([TAKE, product(10), wait()], 2)


def test_products_in_flight_over_the_back_edge():
    """With one group pending the work of a round lies under the product of the next one."""
    work = [ISSUE] * 60
    assert cycles([product(100), wait(), *work], 1) == 100 + 1 + 60
    assert cycles([product(100), wait(1), *work], 1) == 100
    # Longer work than the product: nothing of that is waited for.
    assert cycles([product(100), wait(1), *[ISSUE] * 150], 1) == 152


def test_a_wait_that_leaves_more_groups_than_there_are_waits_for_none():
    loop = [product(100), product(100), wait(3), *[ISSUE] * 150, wait()]
    assert cycles(loop, 1) == 200 + 1


def test_a_warp_that_has_a_product_waiting_cannot_issue_another():
    three = [product(100, closes=False), product(100, closes=False), product(100)]
    # The third is issued when the second begins, at 100, and 250 slots follow.
    assert cycles([*three, *[ISSUE] * 250, wait()], 1) == 100 + 1 + 250 + 1
    deep = Machine(product_latency=0, turn_latency=0, waiting_products=2)
    # All three are issued at once; the wait is for their end.
    assert cycles([*three, *[ISSUE] * 250, wait()], 1, deep) == 300 + 1


def test_a_scoreboard_holds_back_who_waits_for_it():
    exponential = Step(unit=Unit.MUFU, taken=8, sets=frozenset({3}), latency=18)
    user = Step(waits=frozenset({3}))
    other = Step(waits=frozenset({2}))
    assert cycles([exponential, user], 1) == 18 + 1
    assert cycles([exponential, *[other] * 9, user], 1) == 18 + 1
    # The latency counts from when the unit takes it.
    assert cycles([MUFU, exponential, user], 1) == 8 + 18 + 1


def test_the_stall_that_is_written_into_an_instruction():
    assert cycles([Step(stall=4), ISSUE], 1) == 5
    assert cycles([Step(stall=4)] * 2, 1) == cycles([Step(stall=4)] * 2, 2) == 8, "one hides it"


def test_the_port_of_shared_memory_bounds_a_round():
    loop = [product(100, operand_bytes=6400), wait()]
    assert cycles(loop, 1, producers=0) == 101
    assert cycles(loop, 1, producers=6400) == 101, "the producer has a stage of time"
    busy = replay(loop, 1, 128 * 150, BARE)
    assert busy.cycles == 50 + 150
    assert busy.shared == 1
    assert busy.shares[Unit.TENSOR] == 0.5


def test_a_product_lasts_as_long_as_its_operands_come():
    busy = replay([product(100, starved=20), wait()], 2, 0, BARE)
    assert busy.cycles == 240
    assert busy.shares[Unit.TENSOR] == pytest.approx(200 / 240)

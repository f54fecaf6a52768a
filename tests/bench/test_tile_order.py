"""The model of packed sequences: small cases by hand, and the order that the kernel has."""

import pytest

import tile_order
from tile_order import Batch, Lengths


def same(*lengths):
    return [Lengths(length, length) for length in lengths]


def test_tiles_of_a_sequence():
    assert tile_order.tiles(same(300, 5), 1, causal=True) == [4, 3, 2, 2]
    assert tile_order.tiles(same(300, 0, 5), 2, causal=False) == [4, 4, 4, 4, 4, 4, 2, 2]
    assert tile_order.tiles([Lengths(130, 1000)], 1, causal=True) == [9, 8 + 1]
    assert tile_order.tiles([Lengths(130, 100)], 1, causal=True) == [2, 2]


@pytest.mark.parametrize(("times", "ctas", "last"), [([1, 1, 4], 2, 5), ([4, 1, 1], 2, 4)])
def test_a_long_tile_that_starts_late_ends_late(times, ctas, last):
    assert tile_order.slowest(times, ctas) == last
    assert tile_order.least(times, ctas) == 4


def test_classes_are_powers_of_two_of_blocks():
    lengths = same(128, 129, 384, 385, 0, 1, 1024)
    wanted = same(1024, 385, 129, 384, 128, 0, 1)
    assert tile_order.longest_first(lengths) == wanted
    assert tile_order.sorted_exactly(lengths)[:3] == same(1024, 385, 384)


def test_longest_first_never_loses_where_the_long_one_is_last():
    found = tile_order.row(Batch("late", (tuple(same(256, 256, 8192)),), 100, True))
    assert found.mean["by class"] <= found.mean["of the batch"]
    assert found.worst == found.mean

"""Index tensors that only the device sees, with nonsense in them, in the appending kernel."""

import pytest
import torch

from append_cases import ROOM, assert_same, bits, make
from cases import int32
from flash8.tensors.float8 import E4M3
from hostile_indices import LEAST, MOST
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


def places(slot: int, first: int, end: int) -> list[tuple[int, int]]:
    """Rows of a slot."""
    return [(slot, row) for row in range(first, end)]


DTYPES = {"bf16": torch.bfloat16, "to e4m3": E4M3}
#: For three sequences of 7 new rows: the fields that hold nonsense, and the (slot, row) that the
#: kernel may write.
WHERE = {
    "lengths": ({"starts": [MOST, LEAST, ROOM - 1]}, [(2, ROOM - 1)]),
    "lengths just outside": ({"starts": [ROOM, -1, ROOM - 7]}, places(2, ROOM - 7, ROOM)),
    "sums that wrap around": ({"starts": [MOST - 3, MOST - 6, -7]}, []),
    "rows": ({"starts": [0, 0, 0], "kv_batch_idx": [-1, 3, MOST]}, []),
    "least rows": ({"starts": [0, 0, 0], "kv_batch_idx": [LEAST, 1, 99]}, places(1, 0, 7)),
}
#: Behind 13 tokens, in pages of 16: page_table, kv_batch_idx, and the places.
PAGES = {
    "pages": ([[-1, 4], [MOST, LEAST], [1, 3]], None, places(1, 13, 16) + places(3, 0, 4)),
    "rows of the table": ([[0, 1], [2, 3]], [2, -1, 1], places(2, 13, 16) + places(3, 0, 4)),
    "a table too short": (
        [[0], [1], [2]],
        None,
        [*places(0, 13, 16), *places(1, 13, 16), *places(2, 13, 16)],
    ),
}


def check(monkeypatch, call, allowed):
    """The kernel writes these places and no others."""
    before = call.copy()
    call.on_kernels(monkeypatch)
    for part, old in ((call.k, before.k), (call.v, before.v)):
        changed = (bits(part.cache) != bits(old.cache)).flatten(2).any(-1)
        expected = torch.zeros_like(changed)
        for slot, row in allowed:
            expected[slot, row] = True
        assert torch.equal(changed, expected)


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("cache", DTYPES)
def test_tokens_without_a_place_are_dropped(monkeypatch, cache, name):
    given, allowed = WHERE[name]
    call = make(cache=DTYPES[cache])
    check(monkeypatch, call.changed(**{key: int32(x) for key, x in given.items()}), allowed)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("cache", DTYPES)
def test_pages_that_do_not_exist_are_not_written(monkeypatch, cache, name):
    table, rows, allowed = PAGES[name]
    call = make(cache=DTYPES[cache], page_size=16)
    parts = [part._replace(cache=part.cache[:4].contiguous()) for part in (call.k, call.v)]
    if cache == "to e4m3":
        parts = [part._replace(descale=part.descale[:4].contiguous()) for part in parts]
    call.k, call.v = parts
    fields = {"starts": int32((13, 13, 13)), "page_table": torch.tensor(table).int()}
    if rows is not None:
        fields["kv_batch_idx"] = int32(rows)
    check(monkeypatch, call.changed(**fields), allowed)


OFFSETS = {
    "one that decreases": [0, 5, 2, 22],
    "all decrease": [22, 5, 5, 0],
    "far too large": [0, MOST, 5, MOST],
    "far too small": [0, LEAST, 5, LEAST],
    "not from 0": [3, 9, 9, 17],
    "nothing": [MOST] * 4,
    "less than nothing": [LEAST] * 4,
}


@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_offsets(monkeypatch, offsets):
    """Nothing outside is read or written, no place by two tokens, and the next call is right."""
    call = make(new=(5, 0, 17), rotary_dim=32, rows=(4, 0, 2))
    wrong = call.changed(cu_seqlens=int32(offsets))
    wrong.queries = wrong.queries._replace(cu_seqlens=int32(offsets))
    before = wrong.copy()
    wrong.on_kernels(monkeypatch)
    changed = (bits(wrong.k.cache) != bits(before.k.cache)).flatten(2).any(-1)
    assert not changed[[1, 3]].any(), "rows of nobody"
    assert_same(call.on_kernels(monkeypatch), call.copy().portable())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cache_whose_descale_is_none_gets_nan(monkeypatch, value):
    call = make(cache=E4M3)
    call.k.descale[1, 0] = value
    want = call.copy().portable()
    found = call.on_kernels(monkeypatch)
    assert_same(found, want)
    written = found[0][1, :7].float().isnan()
    assert written[:, 0].all() and not written[:, 1].any()

"""cuTensorMapEncodeTiled: each rule of cuda.h, just inside and just outside."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

import flash8_sim as S

# f32, a tensor of 4 x 8 x 64 (outermost first) in boxes of 2 x 4 x 32.
GIVEN: dict[str, Any] = {
    "map": 0,
    "type": 7,
    "rank": 3,
    "address": 1 << 20,
    "dims": [64, 8, 4],
    "strides": [256, 2048],
    "box": [32, 4, 2],
    "steps": [1, 1, 1],
    "interleave": 0,
    "swizzle": 0,
    "promotion": 0,
    "fill": 0,
}


def encode(sim: S.Simulator, **changes: Any) -> None:
    given = GIVEN | changes
    room = ctypes.create_string_buffer(128 + 2 * 64)  # for a map at 64 bytes as well
    start = (ctypes.addressof(room) + 63) // 64 * 64

    def array(kind: Any, values: list[int] | None) -> Any:
        return None if values is None else (kind * max(1, len(values)))(*values)

    sim.call(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(start + given["map"]),
        ctypes.c_int(given["type"]),
        ctypes.c_uint32(given["rank"]),
        ctypes.c_void_p(given["address"]),
        array(ctypes.c_uint64, given["dims"]),
        array(ctypes.c_uint64, given["strides"]),
        array(ctypes.c_uint32, given["box"]),
        array(ctypes.c_uint32, given["steps"]),
        *(ctypes.c_int(given[name]) for name in ("interleave", "swizzle", "promotion", "fill")),
    )


def of_rank(rank: int, **changes: Any) -> dict[str, Any]:
    """`rank` dimensions of 8 elements."""
    return {
        "rank": rank,
        "dims": [8] * rank,
        "strides": [32 * 8**i for i in range(rank - 1)],
        "box": [8] * rank,
        "steps": [1] * rank,
    } | changes


BYTE = {"type": 0, "dims": [2**32, 1, 1], "strides": [2**32, 2**32]}
INSIDE: list[dict[str, Any]] = [
    {},
    *[of_rank(rank) for rank in range(1, 6)],
    {"map": 64},
    *[{"type": t, "box": [16, 4, 2]} for t in range(13) if t not in (4, 5, 8)],
    *[{"type": t, "strides": [512, 4096], "box": [16, 4, 2]} for t in (4, 5, 8)],
    {"address": (1 << 20) + 16},
    {"dims": [64, 2**32, 1]},
    BYTE | {"box": [32, 1, 1]},
    {"dims": [1, 1, 1], "strides": [16, 16]},
    {"dims": [64, 8, 1], "strides": [256, 0]},
    {"strides": [256, 2**40 - 16]},
    {"strides": [2048, 256]},  # dimensions in another order
    {"box": [256, 256, 256]},
    {"box": [4, 1, 1]},
    {"steps": [8, 8, 8]},
    {"swizzle": 1, "box": [8, 4, 2]},
    {"swizzle": 2, "box": [16, 4, 2]},
    {"swizzle": 3, "box": [32, 4, 2]},
    *[{"promotion": p} for p in range(4)],
    *[{"type": t, "fill": 1, "box": [16, 4, 2]} for t in (6, 7, 9, 10, 11, 12)],
    {"type": 8, "fill": 1, "strides": [512, 4096], "box": [16, 4, 2]},
]
OUTSIDE: list[tuple[dict[str, Any], str]] = [
    *[({"map": by}, "aligned to 64 bytes") for by in (8, 16, 32)],
    ({"type": 16}, "data type 16"),
    ({"type": -1}, "data type -1"),
    ({"rank": 0}, "rank 0"),
    (of_rank(6), "rank 6"),
    ({"address": (1 << 20) + 8}, "aligned to 16"),
    ({"address": 0}, "null"),
    ({"dims": None}, "array is missing"),
    ({"strides": None}, "array is missing"),
    ({"box": None}, "array is missing"),
    ({"steps": None}, "array is missing"),
    *[({"dims": [64 if i else 0, 8, 4]}, "dimension 0: an extent of 0") for i in (0,)],
    ({"dims": [64, 8, 0]}, "dimension 2: an extent of 0"),
    ({"dims": [64, 2**32 + 1, 1]}, "dimension 1: an extent of 4294967297"),
    ({"strides": [264, 2048]}, "dimension 1: a stride of 264 bytes is no multiple of 16"),
    ({"strides": [256, 2056]}, "dimension 2: a stride of 2056 bytes is no multiple of 16"),
    ({"strides": [256, 2**40]}, "below 2^40"),
    ({"strides": [240, 2048]}, "dimension 1: a stride of 240 bytes is smaller than a row of 256"),
    ({"strides": [256, 240]}, "dimension 2: a stride of 240 bytes is smaller than a row"),
    ({"strides": [256, 0]}, "smaller than a row"),
    ({"dims": [64, 8, 1], "strides": [256, 16]}, "smaller than a row"),
    ({"box": [0, 4, 2]}, "dimension 0: a box of 0"),
    ({"box": [32, 257, 2]}, "dimension 1: a box of 257 elements is not in 1..256"),
    ({"box": [260, 4, 2]}, "not in 1..256"),
    ({"box": [3, 4, 2]}, "12 bytes, no multiple of 16"),
    ({"type": 6, "box": [12, 4, 2]}, "24 bytes, no multiple of 16"),
    *[({"steps": [1, s, 1]}, f"an element stride of {s} is not in 1..8") for s in (0, 9)],
    ({"steps": [9, 1, 1]}, "dimension 0: an element stride of 9"),
    ({"swizzle": 1, "box": [12, 4, 2]}, "48 bytes, more than the swizzle's 32"),
    ({"swizzle": 2, "box": [20, 4, 2]}, "80 bytes, more than the swizzle's 64"),
    ({"swizzle": 3, "box": [36, 4, 2]}, "144 bytes, more than the swizzle's 128"),
    ({"swizzle": 4, "box": [36, 4, 2]}, "144 bytes, more than the swizzle's 128"),
    *[({"swizzle": s}, f"swizzle mode {s}") for s in (-1, 7)],
    *[({"promotion": p}, f"L2 promotion {p}") for p in (-1, 4)],
    *[({"fill": f}, f"out-of-bounds fill {f}") for f in (-1, 2)],
    *[({"type": t, "fill": 1}, "floating-point types only") for t in (0, 1, 2, 3, 4, 5, 13)],
    *[({"interleave": i}, f"interleave {i}") for i in (-1, 3)],
    (of_rank(2, interleave=1), "rank 2 is not in 3..5"),
    ({"interleave": 2}, "needs the swizzle of 32 bytes"),
    ({"interleave": 2, "swizzle": 1, "address": (1 << 20) + 16}, "aligned to 32"),
    ({"interleave": 2, "swizzle": 1, "strides": [272, 2048]}, "no multiple of 32"),
]
# What cuda.h allows and the simulator does not model says so.
NOT_MODELLED: list[dict[str, Any]] = [
    {"interleave": 1},
    {"interleave": 2, "swizzle": 1},
    {"swizzle": 4},
    {"swizzle": 6},
    {"type": 13},
    {"swizzle": 3, "box": [16, 4, 2]},
]


@pytest.mark.parametrize("changes", INSIDE, ids=str)
def test_inside(sim: S.Simulator, changes: dict[str, Any]) -> None:
    encode(sim, **changes)


@pytest.mark.parametrize(("changes", "message"), OUTSIDE, ids=str)
def test_outside(sim: S.Simulator, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(S.SimulatorError) as caught:
        encode(sim, **changes)
    assert caught.value.name == "CUDA_ERROR_INVALID_VALUE"
    assert message in str(caught.value)


@pytest.mark.parametrize("changes", NOT_MODELLED, ids=str)
def test_not_modelled(sim: S.Simulator, changes: dict[str, Any]) -> None:
    with pytest.raises(S.SimulatorError, match=r"CUDA_ERROR_NOT_SUPPORTED.*not modelled"):
        encode(sim, **changes)


def test_a_refused_map_is_left_as_it_was(sim: S.Simulator) -> None:
    room = S.TensorMap()
    with pytest.raises(S.SimulatorError):
        encode(sim, rank=0)
    assert room.raw() == bytes(128)

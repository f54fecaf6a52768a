"""Index tensors with nonsense in them, which only the device sees, for sequences of LENGTHS."""

MOST, LEAST = 2**31 - 1, -(2**31)
LENGTHS = (130, 3, 0, 67)
OFFSETS = {
    "one that decreases": [0, 130, 20, 133, 200],
    "all decrease": [200, 133, 133, 130, 0],
    "far too large": [0, MOST, MOST, 133, MOST],
    "far too small": [0, LEAST, 133, LEAST, 200],
    "alternating ends": [0, MOST, LEAST, MOST, LEAST],
    "not from 0": [60, 70, 133, 133, 190],
    "nothing": [MOST] * 5,
    "less than nothing": [LEAST] * 5,
}
#: (batch): of lengths, rows of a cache.
VALUES = [[MOST] * 4, [LEAST] * 4, [-1, 131, 1, 68], [MOST, 0, LEAST, 5]]

"""The small floating-point formats in NumPy: e4m3, bf16 and fp16 as codes."""

import numpy as np

_CODES = np.arange(127)
#: The finite values of e4m3 from 0 to 448, by code.
_E4M3 = np.where(
    _CODES >> 3 == 0, (_CODES & 7) * 2.0**-9, (1 + (_CODES & 7) / 8) * 2.0 ** ((_CODES >> 3) - 7.0)
)
_BETWEEN = (_E4M3[1:] + _E4M3[:-1]) / 2


def e4m3_codes(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, saturating at 448; NaN is 0x7F."""
    magnitude = np.minimum(np.abs(np.nan_to_num(x, nan=0.0, posinf=448.0, neginf=-448.0)), 448.0)
    low = np.searchsorted(_BETWEEN, magnitude, side="left")
    high = np.searchsorted(_BETWEEN, magnitude, side="right")
    code = np.where(low % 2 == 0, low, high) | (np.signbit(x) << 7)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    """As float64."""
    low = codes & 0x7F
    value = np.where(low == 0x7F, np.nan, _E4M3[np.minimum(low, 126)])
    return np.where(codes & 0x80, -value, value)


def bf16_codes(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; x is finite."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def fp16_codes(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def fp16_values(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.uint16).view(np.float16).astype(np.float64)

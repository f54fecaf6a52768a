"""Switches for studying what each choice of the FP8 numerics is worth.

The default is the design of the kernels in fp32 arithmetic. `accumulation="hopper"` adds the
rounding of the FP8 tensor cores, bit by bit (`tensor_core`): slow in software, and of little effect
as long as the accumulator is promoted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from flash8.backends.cpu.tensor_core import K_STEP

_ACCUMULATIONS = ("fp32", "hopper")
_P_SCALINGS = ("block_local", "running_max", "none")


@dataclass(frozen=True)
class Study:
    """How the CPU backend computes with float8 operands. See `study`."""

    accumulation: str = "fp32"
    promotion: bool | int = True
    p_scaling: str = "block_local"

    @property
    def promotion_keys(self) -> int | None:
        """Keys between promotions; None: at the end of every block only, if `promotes`."""
        return None if isinstance(self.promotion, bool) else self.promotion

    @property
    def promotes_blocks(self) -> bool:
        return self.promotion is True

    @property
    def p_scale(self) -> float:
        """The factor of P = exp(S - LSE) before it becomes e4m3 in the backward."""
        return 1.0 if self.p_scaling == "none" else 448.0


_DESIGN = Study()
_current: ContextVar[Study] = ContextVar("flash8_fp8_study", default=_DESIGN)


def current() -> Study:
    """The switches in force in this context."""
    return _current.get()


@contextmanager
def study(
    accumulation: str = "fp32", promotion: bool | int = True, p_scaling: str = "block_local"
) -> Iterator[Study]:
    """Within this context, FP8 attention on CPU tensors computes with other numerics.

    Args:
        accumulation: "fp32", or "hopper": the 14-bit accumulator of Hopper's FP8 tensor cores.
        promotion: True: every KV block's product is added to O in fp32, the design of the
            kernels; a multiple of 32: after so many keys; False: never, as FA3 does. Only
            "hopper" accumulation shows a difference.
        p_scaling: "block_local": P is scaled to 2^8 at each block's own maximum, the design;
            "running_max": to 2^8 at the running maximum; "none": to 1 at the running maximum.

    Raises:
        ValueError: naming the argument, its value and what is supported.
    """
    if accumulation not in _ACCUMULATIONS:
        raise ValueError(f"accumulation must be one of {_ACCUMULATIONS}, got {accumulation!r}")
    if p_scaling not in _P_SCALINGS:
        raise ValueError(f"p_scaling must be one of {_P_SCALINGS}, got {p_scaling!r}")
    _check_promotion(promotion)
    token = _current.set(Study(accumulation, promotion, p_scaling))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def _check_promotion(promotion: Any) -> None:
    if isinstance(promotion, bool):
        return
    if not isinstance(promotion, int) or promotion < K_STEP or promotion % K_STEP != 0:
        raise ValueError(
            f"promotion must be a bool or a multiple of {K_STEP} keys, got {promotion!r}"
        )

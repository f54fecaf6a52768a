"""FlashAttention-2's order of arguments, recognised in a call of flash8's functions.

There dropout_p stands where FlashAttention-3, and flash8, have softmax_scale; in the varlen
functions where they have seqused_q.
"""

import dis
import math
import sys
import warnings
from types import FrameType
from typing import Any

import torch

from flash8.call.options import Options

#: What most users give dropout_p.
_DROPOUTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
#: What to add to a message about an argument that may be another one of FlashAttention-2.
HINT = (
    ". Is this a call in FlashAttention-2's order, with dropout_p before softmax_scale? flash8 has "
    "FlashAttention-3's order: name the arguments, or import flash8.compat.flash_attn"
)


def refuse_other_order(options: Options) -> None:
    """Raises TypeError where arguments have values that only FlashAttention-2's order explains."""
    if options.causal is None or isinstance(options.causal, float):
        raise TypeError(f"causal must be a bool, got {options.causal}{HINT}")
    if isinstance(options.seqused_q, (int, float)):
        raise TypeError(f"seqused_q must be a torch.Tensor, got {options.seqused_q}{HINT}")


def may_be_dropout(softmax_scale: float | None) -> bool:
    """Whether it is a value that most users give dropout_p."""
    return softmax_scale in _DROPOUTS


def warn_about_scale(softmax_scale: float | None, head_dim: int) -> None:
    """Warns of a softmax_scale by position that looks like a dropout probability."""
    if torch.compiler.is_compiling() or softmax_scale is None:
        return
    if not may_be_dropout(softmax_scale):
        return
    if math.isclose(softmax_scale, head_dim**-0.5) or not _is_by_position("softmax_scale"):
        return
    text = f"softmax_scale = {softmax_scale} was given by position, and looks like dropout_p{HINT}"
    warnings.warn(text, stacklevel=2)


def _is_by_position(name: str) -> bool:
    """Whether the user's call of a function of flash8 gives this argument by position."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_name.startswith("flash_attn_"):
        frame = frame.f_back
    if frame is None or frame.f_back is None:
        return False
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    given = _num_positional(frame.f_back)
    return name in names and names.index(name) < given


def _num_positional(frame: FrameType) -> int:
    """How many arguments the call that a frame is in gives by position; 0 if it cannot be told."""
    names: tuple[str, ...] = ()
    call: Any = None
    before: Any = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset > frame.f_lasti:  # f_lasti may be at the caches behind the call
            break
        if call is not None and call.opname == "CALL":
            names = ()
        if instruction.opname == "KW_NAMES":  # Python 3.11 and 3.12
            names = frame.f_code.co_consts[instruction.arg or 0]
        before, call = call, instruction
    if call is None or call.opname not in ("CALL", "CALL_KW"):
        return 0
    if call.opname == "CALL_KW":  # Python 3.13 has the names on its stack
        names = before.argval
    count: int = call.arg or 0
    return count - len(names)

"""Derivatives of torch ops, reverse and forward mode, inside torch.func's transforms as outside.

`torch.library.register_autograd` knows reverse mode only: tangents it drops without a word, and
torch.func it refuses. What is registered here runs for the Autograd key, so it sees what the
dispatcher sees: under grad, vjp and jvp the tensors of one level at a time, below which the next
transform, or the kernel, is called. An op whose derivative nobody wrote says so.

That takes private names of torch. Where one is missing there is reverse mode only, and tangents are
refused.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flash8.call import observed

try:
    from torch._C import _after_autograd_keyset, _AutoDispatchBelowAutograd
    from torch._C._functorch import (
        get_single_level_autograd_function_allowed,
        set_single_level_autograd_function_allowed,
    )
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction

    _COMPLETE = observed.COMPLETE
except ImportError:
    _COMPLETE = False

_FIRST_ORDER_ONLY = (
    "flash8 attention has first-order gradients only; got a double backward, or a tangent of a "
    "gradient. For second derivatives compute this attention by torch, as "
    "F.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)


class Formulas(NamedTuple):
    """The derivatives of an op. `inputs` are all of its arguments, in the schema's order."""

    setup: Callable[[Any, tuple[Any, ...], Any], None]  # (ctx, inputs, outputs) saves both
    backward: Callable[..., tuple[Any, ...]]  # (ctx, *gradients): one for each input
    jvp: Callable[..., Any]  # (ctx, *tangents of the inputs): one for each output


def register(library: torch.library.Library, name: str, formulas: Formulas) -> None:
    """Makes the functional op `flash8::name` differentiable."""
    op = getattr(torch.ops.flash8, name).default
    if not _COMPLETE:
        torch.library.register_autograd(
            op, formulas.backward, setup_context=formulas.setup, lib=library
        )
        return
    node = _node(op, formulas)

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if not observed.may_carry_tangents() and not (
            torch.is_grad_enabled() and _any_requires_grad(inputs)
        ):
            return _call_below(op, keyset, inputs)
        if not observed.is_transformed():
            return node.apply(keyset, *inputs)
        allowed = get_single_level_autograd_function_allowed()
        set_single_level_autograd_function_allowed(True)
        try:
            return node.apply(keyset, *inputs)
        finally:
            set_single_level_autograd_function_allowed(allowed)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def refuse_tangents(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an op that `register` can give no forward mode in this torch; else as it is."""
    if _COMPLETE:
        return kernel

    @functools.wraps(kernel)
    def run(*inputs: Any) -> Any:
        if any(observed.tangent_of(x) is not None for x in inputs if isinstance(x, Tensor)):
            raise RuntimeError(f"flash8 has no forward-mode AD with torch {torch.__version__}")
        return kernel(*inputs)

    return run


def refuse(library: torch.library.Library, name: str, message: str) -> None:
    """Lets the op `flash8::name`, which writes to its arguments, say `message` to whoever
    differentiates through it, before it writes."""
    if not _COMPLETE:  # the public functions ask before they call the op
        return
    op = getattr(torch.ops.flash8, name).default

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if is_differentiated(*inputs):
            raise RuntimeError(message)
        return _call_below(op, keyset, inputs)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def is_differentiated(*tensors: Any) -> bool:
    """Whether one of them requires grad (where gradients are recorded) or carries a tangent."""
    if torch.is_grad_enabled() and _any_requires_grad(tensors):
        return True
    if torch.compiler.is_compiling():  # the op asks when it is traced
        return False
    return observed.may_carry_tangents() and any(
        observed.tangent_of(x) is not None for x in tensors if isinstance(x, Tensor)
    )


def _any_requires_grad(inputs: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _call_below(op: Any, keyset: torch._C.DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _after_autograd_keyset, *inputs)


def _node(op: Any, formulas: Formulas) -> Any:
    def forward(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if not observed.is_transformed():
            return _call_below(op, keyset, inputs)
        # A node turns both modes off for its forward. The levels below are not its own: what they
        # record is up to them.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return _call_below(op, keyset, inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        formulas.setup(ctx, inputs[1:], output)

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return None, *formulas.backward(ctx, *gradients)

    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return formulas.jvp(ctx, *tangents)

    methods = (forward, setup_context, backward, jvp)
    return type(
        f"flash8_{op._opname}",
        (_SingleLevelFunction,),
        {method.__name__: staticmethod(method) for method in methods},
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _refuse_second_order(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(_FIRST_ORDER_ONLY)


#: Of an op that is a derivative itself.
NO_SECOND_ORDER = Formulas(_save_nothing, _refuse_second_order, _refuse_second_order)

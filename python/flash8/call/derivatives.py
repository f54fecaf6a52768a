"""Derivatives of torch ops, reverse and forward mode, inside torch.func's transforms as outside.

`torch.library.register_autograd` knows reverse mode only: tangents it drops without a word, and
torch.func it refuses. What is registered here runs for the Autograd key, so it sees what the
dispatcher sees: under grad, vjp and jvp the tensors of one level at a time, below which the next
transform, or the kernel, is called. An op whose derivative nobody wrote says so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

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
    node = _node(op, formulas)

    def kernel(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if not _is_watched() and not (torch.is_grad_enabled() and _any_requires_grad(inputs)):
            return _call_below(op, keyset, inputs)
        if not torch._C._are_functorch_transforms_active():
            return node.apply(keyset, *inputs)
        allowed = torch._C._functorch.get_single_level_autograd_function_allowed()
        torch._C._functorch.set_single_level_autograd_function_allowed(True)
        try:
            return node.apply(keyset, *inputs)
        finally:
            torch._C._functorch.set_single_level_autograd_function_allowed(allowed)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def refuse(library: torch.library.Library, name: str, message: str) -> None:
    """Lets the op `flash8::name`, which writes to its arguments, say `message` to whoever
    differentiates through it, before it writes."""
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
    return _is_watched() and any(_tangent(x) is not None for x in tensors if isinstance(x, Tensor))


def _is_watched() -> bool:
    """Whether a tensor may carry a tangent, which none of its attributes tells.

    A trace (of torch.compile, say) enters levels that Python does not know of.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _tangent(x: Tensor) -> Tensor | None:
    if torch._C._functorch.is_batchedtensor(x):  # the op asks below torch.vmap
        return None
    tangent: Tensor | None = torch._VF._unpack_dual(x, level=0)[1]
    return tangent


def _any_requires_grad(inputs: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _call_below(op: Any, keyset: torch._C.DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _node(op: Any, formulas: Formulas) -> Any:
    def forward(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return _call_below(op, keyset, inputs)
        # A node turns both modes off for its forward. The levels below are not its own: what they
        # record is up to them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
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

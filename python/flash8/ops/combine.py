"""The torch ops that merge partial results over disjoint keys."""

from typing import Any

import torch
from torch import Tensor

from flash8.backends import backend_for
from flash8.call import derivatives
from flash8.call.autocast import unaffected
from flash8.ops import batching

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "combine(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype) -> (Tensor, Tensor)"
)
_library.define(
    "combine_backward(Tensor? dout, Tensor? dlse, Tensor out_partial, Tensor lse_partial) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "combine_jvp(Tensor? out_tangent, Tensor? lse_tangent, Tensor out_partial, Tensor lse_partial, "
    "Tensor out, Tensor lse) -> (Tensor, Tensor)"
)


def combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """O and LSE of out_partial (splits, ...) and lse_partial, in out_dtype or out_partial's."""
    found: tuple[Tensor, Tensor] = torch.ops.flash8.combine(out_partial, lse_partial, out_dtype)
    return found


def _combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    merged: tuple[Tensor, Tensor] = backend_for(out_partial).combine(
        out_partial, lse_partial, out_dtype
    )
    return merged


def _combine_backward(
    dout: Tensor | None, dlse: Tensor | None, out_partial: Tensor, lse_partial: Tensor
) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = backend_for(out_partial).combine_backward(
        dout, dlse, out_partial, lse_partial
    )
    return gradients


def _combine_jvp(
    out_tangent: Tensor | None, lse_tangent: Tensor | None, *saved: Tensor
) -> tuple[Tensor, Tensor]:
    tangents: tuple[Tensor, Tensor] = backend_for(saved[0]).combine_jvp(
        out_tangent, lse_tangent, *saved
    )
    return tangents


def _combine_fake(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype)
    return out, lse_partial.new_empty(lse_partial.shape[1:])


def _combine_backward_fake(
    dout: Tensor | None, dlse: Tensor | None, out_partial: Tensor, lse_partial: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_partial), torch.empty_like(lse_partial)


def _combine_jvp_fake(
    out_tangent: Any, lse_tangent: Any, out_partial: Any, lse_partial: Any, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(lse)


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out_partial, lse_partial, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out_partial, lse_partial)
    ctx.save_for_forward(out_partial, lse_partial, *output)


def _combine_autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    if dout is None and dlse is None:
        return None, None, None
    return (*torch.ops.flash8.combine_backward(dout, dlse, *ctx.saved_tensors), None)


def _combine_tangents(
    ctx: Any, out_tangent: Tensor | None, lse_tangent: Tensor | None, _: None
) -> Any:
    return torch.ops.flash8.combine_jvp(out_tangent, lse_tangent, *ctx.saved_tensors)


for _name, _function, _fake in (
    ("combine", _combine, _combine_fake),
    ("combine_backward", _combine_backward, _combine_backward_fake),
    ("combine_jvp", _combine_jvp, _combine_jvp_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, unaffected(derivatives.refuse_tangents(_function)), _key)
    torch.library.register_fake(f"flash8::{_name}", _fake, lib=_library)
    batching.register(_library, _name)
derivatives.register(
    _library, "combine", derivatives.Formulas(_combine_setup, _combine_autograd, _combine_tangents)
)
for _name in ("combine_backward", "combine_jvp"):
    derivatives.register(_library, _name, derivatives.NO_SECOND_ORDER)

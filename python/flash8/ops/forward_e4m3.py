"""The torch op of attention whose output is e4m3. It is traced as it is; which kernel is trusted is
asked when it runs."""

from typing import Any

import torch
from torch import Tensor

from flash8 import backends
from flash8.call import derivatives
from flash8.call.autocast import unaffected
from flash8.call.e4m3_output import data_shape, scale_shape
from flash8.call.options import SCHEMA, Options
from flash8.ops import batching
from flash8.tensors.float8 import E4M3

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "forward_e4m3(Tensor q, Tensor k, Tensor v, Tensor? s_aux, Tensor? out_scale, "
    f"{SCHEMA}) -> (Tensor, Tensor)"
)


def forward_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    out_scale: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Data and the scales of a checked call; without scales, (0,), if there is out_scale."""
    found: tuple[Tensor, Tensor] = torch.ops.flash8.forward_e4m3(
        q, k, v, s_aux, out_scale, *options
    )
    return found


def _forward_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    out_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    options = Options(*rest)
    backend = backends.forward_e4m3_backend(q, k, v, options)
    data, scale = _empty(q, v, out_scale, options)
    backend.forward_e4m3(q, k, v, s_aux, out_scale, options, data, scale)
    return data, scale


def _forward_e4m3_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    out_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return _empty(q, v, out_scale, Options(*rest))


def _empty(
    q: Tensor, v: Tensor, out_scale: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    shape = scale_shape(q, v, options) if out_scale is None else (0,)
    return (
        q.new_empty(data_shape(q, v, options), dtype=E4M3),
        q.new_empty(shape, dtype=torch.float32),
    )


_REFUSAL = (
    "flash8.gemm.quantize_attention has no derivative: float8 tensors carry no gradient; call it "
    "under torch.no_grad(), and detach what is differentiated"
)
for _key in ("CPU", "CUDA"):
    _library.impl("forward_e4m3", unaffected(_forward_e4m3), _key)
torch.library.register_fake("flash8::forward_e4m3", _forward_e4m3_fake, lib=_library)
derivatives.refuse(_library, "forward_e4m3", _REFUSAL)
batching.register(_library, "forward_e4m3", merges=True)

"""The forward kernel with an output of e4m3: the variants that write it, and what they are told."""

import functools
from dataclasses import replace

from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import forward as wide
from flash8.backends.hopper.forward import Plan
from flash8.backends.hopper.variants import ForwardVariant
from flash8.call.options import Options


def refusal(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    """Why no kernel serves this call, or None. What the call has been checked for is not asked."""
    return wide.refusal(q, k, v, None, options)


def choose(q: Tensor, k: Tensor, v: Tensor, options: Options) -> ForwardVariant:
    """The variant that serves a call which is not refused."""
    return _with_e4m3(wide.choose(q, k, v, options))


@functools.cache
def _with_e4m3(variant: ForwardVariant) -> ForwardVariant:
    return replace(variant, out="e4m3")


def forward_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    out_scale: Tensor | None,
    options: Options,
    data: Tensor,
    scale: Tensor,
) -> None:
    """Fills data and scale on q's stream, without a synchronisation."""
    variant = choose(q, k, v, options)
    planned = plan(q, k, v, s_aux, out_scale, options, data, scale, None, variant)
    wide.launch_on_stream(planned, q, options.sm_margin)


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    out_scale: Tensor | None,
    options: Options,
    data: Tensor,
    scale: Tensor,
    lse: Tensor | None,
    variant: ForwardVariant,
) -> Plan:
    """The kernel and the parameters of a call."""
    heads = data.view(*q.shape[:-1], options.head_dim_v(v))
    planned = wide.plan(q, k, v, s_aux, options, heads, lse, variant)
    planned.call.o_type = _native.ElementType.UINT8
    if out_scale is None:
        planned.call.out_scale = (scale.data_ptr(), 0, scale.shape[1])
    else:
        planned.call.out_scale = (0, out_scale.data_ptr(), 0)
    return planned

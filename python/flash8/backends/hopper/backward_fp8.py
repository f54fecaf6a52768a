"""The 16-bit backward of an FP8 forward on compiled kernels: the same three launches as
`backward`, from q8, k8 and v8 as the forward had them, its descales and its means.

`ops.fp8_backward16` computes the same on dequantized tensors, and serves what is refused here.
"""

import torch
from torch import Tensor

from flash8.backends.hopper import backward
from flash8.backends.hopper.backward_variants import TILES_FP8, BackwardVariant
from flash8.call.options import Options
from flash8.tensors.float8 import E4M3

_MAX_HEAD_DIM = TILES_FP8[-1][0]
_UNIT = 16  # channels: kernels read rows by 16 bytes


def refusal(q8: Tensor, k8: Tensor, v8: Tensor, out: Tensor, options: Options) -> str | None:
    """Why no kernel serves this call, or None."""
    if not q8.dtype == k8.dtype == v8.dtype == E4M3 or out.dtype not in backward.DTYPES:
        return (
            f"there is no backward kernel for {q8.dtype} q, {k8.dtype} k and {v8.dtype} v with "
            f"{out.dtype} gradients"
        )
    for name, size in (("head_dim", q8.shape[-1]), ("head_dim_v", v8.shape[-1])):
        if size > _MAX_HEAD_DIM or size % _UNIT != 0:
            return (
                f"{name} is {size}; backward kernels of an FP8 forward take multiples of {_UNIT} "
                f"up to {_MAX_HEAD_DIM}"
            )
    for name, given in (
        ("dropout_p", options.dropout_p > 0.0),
        ("v_channel_descale", options.v_channel_descale is not None),
        ("v_colmajor v", options.v_colmajor_tokens is not None),
        ("k_mean with softcap", options.k_mean is not None and options.softcap > 0.0),
    ):
        if given:
            return f"{name} has no FP8 backward kernel yet"
    return backward.refusal_of_options(q8, k8, v8, options)


def choose(q8: Tensor, v8: Tensor, out: Tensor, options: Options) -> BackwardVariant:
    """The variant that serves a call."""
    return backward.choose_for(out.dtype, q8, v8, options, fp8=True)


def serve(
    dout: Tensor | None,
    dlse: Tensor | None,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    ds_aux: Tensor,
) -> None:
    """Fills dq, dk, dv (every row of them), and ds_aux where the forward had s_aux, on the stream
    of q8, without a synchronisation."""
    given = backward.Given(
        torch.zeros_like(out) if dout is None else dout, dlse, q8, k8, v8, out, lse
    )
    backward.serve(given, s_aux, options, choose(q8, v8, out, options), dq, dk, dv, ds_aux)

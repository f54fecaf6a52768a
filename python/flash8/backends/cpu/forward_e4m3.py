"""Attention whose output is e4m3: O of the forward in fp32, quantized."""

from torch import Tensor

from flash8.backends.cpu.forward import forward
from flash8.backends.cpu.quantize_matrix import quantize_matrix
from flash8.call import checks
from flash8.call.options import Options
from flash8.call.request import MatrixRequest
from flash8.tensors.descales import check_value, checked
from flash8.tensors.float8 import saturating_cast


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
    """Fills data (tokens, heads * head_dim_v), and scale (tokens, heads * head_dim_v / 128) unless
    there is out_scale."""
    if out_scale is not None and q.device.type == "cpu":
        check_value("out_scale", out_scale)
    lse_dtype = checks.lse_dtype(q)
    o = q.new_empty((*q.shape[:-1], options.head_dim_v(v)), dtype=lse_dtype)
    *lead, heads, _ = q.shape
    lse = q.new_empty((*lead[:-1], heads, lead[-1]), dtype=lse_dtype)
    nothing = lse.new_empty((0,))
    forward(q, k, v, None, s_aux, options, o, lse, nothing, nothing)
    rows = o.float().view(data.shape)
    if out_scale is not None:
        data.copy_(saturating_cast(rows * checked(out_scale.view(1, 1)).reciprocal()))
        return
    made, found, _ = quantize_matrix(MatrixRequest(rows, "1x128"))
    data.copy_(made)
    scale.copy_(found)

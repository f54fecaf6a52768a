"""The torch op of QKV projections.

It is traced as it is; which kernel is trusted is asked when it runs."""

import torch
from torch import Tensor

from flash8 import backends
from flash8.backends import index_checks
from flash8.backends.cpu import qkv_projection as portable
from flash8.backends.cpu import quantize as portable_quantizer
from flash8.backends.hopper import qkv_projection as hopper
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper.verify import trust
from flash8.call import derivatives
from flash8.call.autocast import unaffected
from flash8.call.qkv_projection import Projection
from flash8.call.request import Request
from flash8.call.scaled_mm import Product
from flash8.ops import gemm
from flash8.ops import quantize as quantizer_op
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import norm_of
from flash8.tensors.rotary import Rope

_library = torch.library.Library("flash8", "FRAGMENT")
_library.define(
    "qkv_projection(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, int heads_q, "
    "int heads_kv, Tensor? cos, Tensor? sin, Tensor? offsets, bool interleaved, Tensor? q_norm, "
    "Tensor? k_norm, float norm_eps, Tensor? cu_seqlens, Tensor? seqused) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def qkv_projection(projection: Projection) -> tuple[Tensor, ...]:
    """q, its descale, k, its descale, v and its descale."""
    p = projection
    norms = [norm for norm in (p.q_norm, p.k_norm) if norm is not None]
    found: tuple[Tensor, ...] = torch.ops.flash8.qkv_projection(
        *p[:7],
        *((None, None, None, True) if p.rope is None else p.rope),
        None if p.q_norm is None else p.q_norm.weight,
        None if p.k_norm is None else p.k_norm.weight,
        norms[0].eps if norms else 0.0,
        p.cu_seqlens,
        p.seqused,
    )
    return found


def _projection(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    heads_q: int,
    heads_kv: int,
    cos: Tensor | None,
    sin: Tensor | None,
    offsets: Tensor | None,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    cu_seqlens: Tensor | None,
    seqused: Tensor | None,
) -> Projection:
    rope = None if cos is None or sin is None else Rope(cos, sin, offsets, interleaved)
    norms = norm_of(q_norm, norm_eps), norm_of(k_norm, norm_eps)
    product = (a, b, scale_a, scale_b, bias)
    return Projection(*product, heads_q, heads_kv, rope, *norms, cu_seqlens, seqused)


def _qkv_projection(*arguments: object) -> tuple[Tensor, ...]:
    projection = _projection(*arguments)  # type: ignore[arg-type]
    index_checks.check_quantize(projection.a, projection.cu_seqlens, projection.seqused, None)
    if _is_for_kernels(projection):
        return hopper.qkv_projection(projection)
    return portable.by_parts(projection, _multiply, _quantize)


def _qkv_projection_fake(*arguments: object) -> tuple[Tensor, ...]:
    projection = _projection(*arguments)  # type: ignore[arg-type]
    a = projection.a
    found: list[Tensor] = []
    shapes = zip(projection.data_shapes(), projection.descale_shapes(), strict=True)
    for data, descale in shapes:
        found.append(a.new_empty(data, dtype=E4M3))
        found.append(a.new_empty(descale, dtype=torch.float32))
    return tuple(found)


def _is_for_kernels(projection: Projection) -> bool:
    """Whether one kernel serves it. If not, those of its parts may."""
    if not backends.kernels_wanted(projection.a):
        backends.backend_for(projection.a)  # which tells about CUDA tensors that have no kernel
        return False
    if hopper.refusal(projection) is not None:
        return False
    return trust.is_trusted(hopper.choose(projection), projection.a.device)


def _multiply(product: Product) -> Tensor:
    return gemm.scaled_mm(product, None)


def _quantize(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    if backends.kernels_wanted(request.x):
        reason = quantizer.refusal(request)
        if reason is None:
            return quantizer_op.quantize(request)
        if request.x.numel():
            backends.tell_about_refusal(reason)
    return portable_quantizer.quantize(request)


for _key in ("CPU", "CUDA"):
    _library.impl("qkv_projection", unaffected(_qkv_projection), _key)
torch.library.register_fake("flash8::qkv_projection", _qkv_projection_fake, lib=_library)
derivatives.refuse(
    _library,
    "qkv_projection",
    "flash8.gemm.qkv_projection has no derivative: float8 tensors carry no gradient; call it under "
    "torch.no_grad(), and detach what is differentiated",
)

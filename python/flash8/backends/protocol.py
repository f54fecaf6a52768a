"""What a backend is: the functions that `flash8.ops` calls.

The implementations are modules. mypy checks them against these protocols at the end of this file,
and `tests/backends/test_protocol.py` compares the signatures. Every output is allocated by the
caller, unless a function returns it.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flash8.backends import cpu as _cpu
    from flash8.backends.cpu import append as _cpu_append
    from flash8.backends.cpu import gemm as _cpu_gemm
    from flash8.backends.cpu import grouped_gemm as _cpu_grouped_gemm
    from flash8.backends.cpu import qkv_projection as _cpu_qkv_projection
    from flash8.backends.cpu import quantize as _cpu_quantize
    from flash8.backends.cpu import quantize_matrix as _cpu_quantize_matrix
    from flash8.backends.hopper import append as _hopper_append
    from flash8.backends.hopper import backward as _hopper_backward
    from flash8.backends.hopper import decode as _hopper_decode
    from flash8.backends.hopper import forward as _hopper_forward
    from flash8.backends.hopper import forward_e4m3 as _hopper_forward_e4m3
    from flash8.backends.hopper import gemm as _hopper_gemm
    from flash8.backends.hopper import grouped_gemm as _hopper_grouped_gemm
    from flash8.backends.hopper import qkv_projection as _hopper_qkv_projection
    from flash8.backends.hopper import quantize as _hopper_quantize
    from flash8.backends.hopper import quantize_matrix as _hopper_quantize_matrix
    from flash8.backends.hopper.append_variants import AppendVariant
    from flash8.backends.hopper.backward_variants import BackwardVariant
    from flash8.backends.hopper.decode_variants import DecodeVariant
    from flash8.backends.hopper.gemm_variants import GemmVariant
    from flash8.backends.hopper.qkv_variants import QkvVariant
    from flash8.backends.hopper.quantize_matrix_variants import QuantizeMatrixVariant
    from flash8.backends.hopper.quantize_variants import QuantizeVariant
    from flash8.backends.hopper.variants import ForwardVariant
    from flash8.call.grouped_scaled_mm import GroupedProduct
    from flash8.call.options import Options
    from flash8.call.qkv_projection import Projection
    from flash8.call.request import Appended, MatrixRequest, Queries, Request
    from flash8.call.scaled_mm import Product


class Forward(Protocol):
    """Fills O and LSE."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None,
        s_aux: Tensor | None,
        options: "Options",
        out: Tensor,
        lse: Tensor,
        out_partial: Tensor,
        lse_partial: Tensor,
    ) -> None:
        """The partials are empty unless options.num_splits > 1."""


class Backward(Protocol):
    """Fills the gradients of q, k, v, qv and s_aux."""

    def backward(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None,
        s_aux: Tensor | None,
        out: Tensor,
        lse: Tensor,
        options: "Options",
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dqv: Tensor,
        ds_aux: Tensor,
    ) -> Any:
        """dqv and ds_aux are empty where the forward had no qv or s_aux. No gradient: zero.

        Returns the Hopper backend's plan, by which such calls may be launched again, or None.
        """


class ForwardE4m3(Protocol):
    """Serves `gemm.quantize_attention`."""

    def forward_e4m3(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        s_aux: Tensor | None,
        out_scale: Tensor | None,
        options: "Options",
        data: Tensor,
        scale: Tensor,
    ) -> None:
        """Fills data, contiguous and of e4m3. And scale, which is empty if there is out_scale."""


class Backend(Forward, Backward, ForwardE4m3, Protocol):
    """Serves every op. The CPU backend does, on the tensors of any device."""

    def fp8_backward(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        q8: Tensor,
        k8: Tensor,
        v8: Tensor,
        s_aux: Tensor | None,
        out: Tensor,
        lse: Tensor,
        fp8_products: int,
        gradient_dtype: torch.dtype,
        gradient_descale: Tensor | None,
        options: "Options",
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        ds_aux: Tensor,
    ) -> None:
        """The backward of an FP8 forward, with the first `fp8_products` products in FP8."""

    def jvp(
        self,
        q_tangent: Tensor | None,
        k_tangent: Tensor | None,
        v_tangent: Tensor | None,
        qv_tangent: Tensor | None,
        s_aux_tangent: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None,
        s_aux: Tensor | None,
        lse: Tensor,
        options: "Options",
        out_tangent: Tensor,
        lse_tangent: Tensor,
    ) -> None:
        """The tangents of O and LSE."""

    def append_kv(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor,
        v: Tensor,
        cache_seqlens: Tensor,
        cu_seqlens_k_new: Tensor | None,
        page_table: Tensor | None,
        kv_batch_idx: Tensor | None,
    ) -> None:
        """Writes new keys and values of the cache's dtype into both caches, or into neither."""

    def combine(
        self, out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """O and LSE of the partial results along the first dimension."""

    def combine_backward(
        self, dout: Tensor | None, dlse: Tensor | None, out_partial: Tensor, lse_partial: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of both partials."""

    def combine_jvp(
        self,
        out_tangent: Tensor | None,
        lse_tangent: Tensor | None,
        out_partial: Tensor,
        lse_partial: Tensor,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The tangents of O and LSE from those of the partials."""

    def check_indices(self, q: Tensor, k: Tensor, options: "Options") -> None:
        """Raises ValueError on what the index tensors of a call hold. Reads them on the host."""

    def check_values(self, q: Tensor, k: Tensor, options: "Options") -> None:
        """Raises ValueError on what the descales of a call hold. Reads them on the host."""


class KernelForward(Forward, Protocol):
    """A forward on compiled kernels, which may refuse a call; the CPU backend then serves it."""

    def refusal(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None,
        options: "Options",
        out: Tensor | None = None,
    ) -> str | None:
        """Why no kernel serves the call, or None. `out` is the caller's."""

    def choose(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: "Options",
        qv: Tensor | None = None,
        out: Tensor | None = None,
    ) -> "ForwardVariant | DecodeVariant":
        """The variant that serves a call which is not refused. `out` is the caller's."""


class KernelForwardE4m3(ForwardE4m3, Protocol):
    """The same on compiled kernels."""

    def refusal(self, q: Tensor, k: Tensor, v: Tensor, options: "Options") -> str | None:
        """Why no kernel serves the call, or None."""

    def choose(self, q: Tensor, k: Tensor, v: Tensor, options: "Options") -> "ForwardVariant":
        """The variant that serves a call which is not refused."""


class KernelBackward(Backward, Protocol):
    """A backward on compiled kernels, which may refuse a call; the CPU backend then serves it."""

    def refusal(
        self, q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, options: "Options"
    ) -> str | None:
        """Why no kernels serve the call, or None."""

    def choose(self, q: Tensor, k: Tensor, v: Tensor, options: "Options") -> "BackwardVariant":
        """The variant that serves a call which is not refused."""


class Quantizer(Protocol):
    """Serves `fp8.quantize`."""

    def quantize(self, request: "Request") -> tuple[Tensor, Tensor, Tensor]:
        """Data, descale and mean; descale and mean are empty where the caller has them."""


class KernelQuantizer(Quantizer, Protocol):
    """A quantizer on compiled kernels."""

    def refusal(self, request: "Request") -> str | None:
        """Why no kernel serves the request, or None."""

    def variants(self, request: "Request") -> "list[QuantizeVariant]":
        """The kernels of a request which is not refused, in the order of their launches."""


class Append(Protocol):
    """Writes new rows into the caches of a call, and rotates its queries."""

    def append(
        self, *appended: "Appended", queries: "Queries | None" = None
    ) -> tuple[Tensor | None, Tensor]:
        """All of the rows, or none where one has no room. Returns the rotated queries, and the
        lengths of the sequences from now on."""


class KernelAppend(Append, Protocol):
    """The same on a compiled kernel. Rows without a place are dropped."""

    def refusal(self, appended: "Appended") -> str | None:
        """Why no kernel appends these rows, or None."""

    def refusal_of_queries(self, queries: "Queries") -> str | None:
        """Why no kernel rotates these queries, or None."""

    def variants(
        self, *appended: "Appended", queries: "Queries | None" = None
    ) -> "list[AppendVariant]":
        """The kernels of rows which are not refused, in the order of their launches."""


class MatrixQuantizer(Protocol):
    """Serves `gemm.quantize` and its kin."""

    def quantize_matrix(self, request: "MatrixRequest") -> tuple[Tensor, Tensor, Tensor]:
        """Data, scales, and x + residual, empty without a residual."""


class KernelMatrixQuantizer(MatrixQuantizer, Protocol):
    """The same on a compiled kernel."""

    def refusal(self, request: "MatrixRequest") -> str | None:
        """Why no kernel serves this call, or None."""

    def variant(self, request: "MatrixRequest") -> "QuantizeMatrixVariant":
        """The kernel of a call that is not refused."""


class Gemm(Protocol):
    """Serves `gemm.scaled_mm`."""

    def scaled_mm(self, product: "Product", out: Tensor) -> None:
        """Writes out (M, N), of product.out_dtype."""


class KernelGemm(Gemm, Protocol):
    """The same on a compiled kernel."""

    def refusal(self, product: "Product") -> str | None:
        """Why no kernel serves the product, or None."""

    def choose(self, product: "Product") -> "GemmVariant":
        """The kernel of a product that is not refused."""


class GroupedGemm(Protocol):
    """Serves `gemm.grouped_scaled_mm`."""

    def grouped_scaled_mm(self, product: "GroupedProduct", out: Tensor) -> None:
        """Writes out, of product.out_shape and product.out_dtype."""


class KernelGroupedGemm(GroupedGemm, Protocol):
    """The same on a compiled kernel."""

    def refusal(self, product: "GroupedProduct") -> str | None:
        """Why no kernel serves the product, or None."""

    def choose(self, product: "GroupedProduct") -> "GemmVariant":
        """The kernel of a product that is not refused."""


class QkvProjection(Protocol):
    """Serves `gemm.qkv_projection`."""

    def qkv_projection(self, projection: "Projection") -> tuple[Tensor, ...]:
        """q, its descale, k, its descale, v and its descale."""


class KernelQkvProjection(QkvProjection, Protocol):
    """The same on a compiled kernel."""

    def refusal(self, projection: "Projection") -> str | None:
        """Why no kernel serves the projection, or None."""

    def choose(self, projection: "Projection") -> "QkvVariant":
        """The kernel of a projection that is not refused."""


# mypy's cache does not notice when an implementation changes; a run with a fresh cache does.
if TYPE_CHECKING:
    _backends: tuple[Backend, ...] = (_cpu,)
    _forwards: tuple[KernelForward, ...] = (_hopper_forward, _hopper_decode)
    _forwards_e4m3: tuple[KernelForwardE4m3, ...] = (_hopper_forward_e4m3,)
    _backwards: tuple[KernelBackward, ...] = (_hopper_backward,)
    _quantizers: tuple[Quantizer, ...] = (_cpu_quantize,)
    _kernel_quantizers: tuple[KernelQuantizer, ...] = (_hopper_quantize,)
    _appends: tuple[Append, ...] = (_cpu_append,)
    _kernel_appends: tuple[KernelAppend, ...] = (_hopper_append,)
    _matrix_quantizers: tuple[MatrixQuantizer, ...] = (_cpu_quantize_matrix,)
    _kernel_matrix_quantizers: tuple[KernelMatrixQuantizer, ...] = (_hopper_quantize_matrix,)
    _gemms: tuple[Gemm, ...] = (_cpu_gemm,)
    _kernel_gemms: tuple[KernelGemm, ...] = (_hopper_gemm,)
    _grouped_gemms: tuple[GroupedGemm, ...] = (_cpu_grouped_gemm,)
    _kernel_grouped_gemms: tuple[KernelGroupedGemm, ...] = (_hopper_grouped_gemm,)
    _qkv_projections: tuple[QkvProjection, ...] = (_cpu_qkv_projection,)
    _kernel_qkv_projections: tuple[KernelQkvProjection, ...] = (_hopper_qkv_projection,)

"""Tensors with guards around them, for what a kernel writes: a store beside one is found out."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flash8.backends.hopper import append as appender
from flash8.backends.hopper import backward as hopper_backward
from flash8.backends.hopper import decode as hopper_decode
from flash8.backends.hopper import forward as hopper
from flash8.backends.hopper import forward_e4m3 as hopper_e4m3
from flash8.backends.hopper import gemm as hopper_gemm
from flash8.backends.hopper import grouped_gemm as hopper_grouped_gemm
from flash8.backends.hopper import qkv_projection as hopper_qkv_projection
from flash8.backends.hopper import quantize as quantizer
from flash8.backends.hopper import quantize_matrix as matrix_quantizer
from flash8.call.request import Appended, Queries, Request

#: On either side, and more than a row of any test.
GUARD_BYTES = 4096
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALIGNMENT = 128
_MOST_BYTES = 1 << 26  # tensors of memory that is mostly not there have no guards


class Guarded:
    """Memory for a tensor. All of its bits are set before a launch, NaN in every type; the bytes
    that are not the tensor's, between its rows as well, are ones, and have to be after it."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype):
        self._shape, self._strides = shape, strides
        size = span(shape, strides) * dtype.itemsize
        # Ones, as an integer or a float, are less than an atomic maximum.
        raw = torch.ones(size + 2 * GUARD_BYTES + _ALIGNMENT, dtype=torch.int8)
        first = -raw.data_ptr() % _ALIGNMENT  # as the memory of a GPU
        self._raw = raw[first : first + size + 2 * GUARD_BYTES]
        self._view(self._raw, _WORDS[dtype.itemsize]).fill_(-1)
        self._beside = self._raw == 1
        self.tensor = self._view(self._raw, dtype)

    @classmethod
    def like(cls, x: Tensor) -> "Guarded":
        return cls(tuple(x.shape), x.stride(), x.dtype)

    def check(self) -> None:
        changed = (self._beside & (self._raw != 1)).nonzero().flatten()
        if changed.numel():
            raise AssertionError(
                f"a kernel wrote beside its output: {changed.numel()} bytes, the first at byte "
                f"{int(changed[0]) - GUARD_BYTES} of {self._raw.numel() - 2 * GUARD_BYTES}"
            )

    def _view(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        inner = raw[GUARD_BYTES : raw.numel() - GUARD_BYTES]
        return inner.view(dtype).as_strided(self._shape, self._strides)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


class Guards:
    """Those of the launches of one call. The device forgets them however a `with` of them ends:
    it would let later kernels touch memory that is another tensor's by then."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._made: list[Guarded] = []

    def __enter__(self) -> "Guards":
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def add(self, made: Guarded) -> Tensor:
        """The tensor, which kernels may touch."""
        self._made.append(made)
        self._device.register(made.tensor)
        return made.tensor

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """As the quantizer wants its own."""
        shape = tuple(shape)
        return self.add(Guarded(shape, contiguous_strides(shape), dtype))

    def check(self) -> None:
        for made in self._made:
            made.check()

    def forget(self) -> None:
        for made in self._made:
            self._device.unregister(made.tensor)
        self._made.clear()


def guard_quantizer(patch: Any, guards: Guards) -> None:
    """What the quantizer allocates has guards, compared after each of its launches."""
    launch = quantizer.Launcher.launch

    def launch_and_check(self: quantizer.Launcher, variant: Any) -> None:
        launch(self, variant)
        guards.check()

    patch.setattr(quantizer, "allocate", guards.allocate)
    patch.setattr(quantizer.Launcher, "launch", launch_and_check)


@contextmanager
def guard_outputs(patch: Any, device: Any) -> Iterator[None]:
    """Inside, all that the backend launches fills tensors with guards, compared after every launch,
    whose values the caller's own get then. Not so the launches of the plan cache."""
    with Guards(device) as guards:  # those of a quantizer's check live until the end
        guard_quantizer(patch, guards)
        _guard_calls(patch, device, guards)
        yield


def _guard_calls(patch: Any, device: Any, guards: Guards) -> None:
    patch.setattr(quantizer, "quantize", functools.partial(_quantize, quantizer.quantize, guards))
    made = functools.partial(_checked, matrix_quantizer.quantize_matrix, guards)
    patch.setattr(matrix_quantizer, "quantize_matrix", made)
    made = functools.partial(_checked, hopper_qkv_projection.launch, guards)
    patch.setattr(hopper_qkv_projection, "launch", made)
    patch.setattr(appender, "append", functools.partial(_append, appender.append, guards, device))
    launch = functools.partial(_launch, hopper.plan_and_launch, device)
    patch.setattr(hopper, "plan_and_launch", launch)
    narrow = functools.partial(_forward_e4m3, hopper_e4m3.forward_e4m3, device)
    patch.setattr(hopper_e4m3, "forward_e4m3", narrow)
    decode = functools.partial(_decode, hopper_decode.forward, device)
    patch.setattr(hopper_decode, "forward", decode)
    for gemm in (hopper_gemm, hopper_grouped_gemm):
        patch.setattr(gemm, "launch", functools.partial(_multiply, gemm.launch, device))
    backward = functools.partial(_backward, hopper_backward.backward, patch, device)
    patch.setattr(hopper_backward, "backward", backward)


def _quantize(
    quantize: Callable[[Request], tuple[Tensor, ...]], guards: Guards, request: Request
) -> tuple[Tensor, ...]:
    try:
        return tuple(x.clone() for x in quantize(request))
    finally:
        guards.forget()


def _checked(
    make: Callable[..., tuple[Tensor, ...]], guards: Guards, *given: Any
) -> tuple[Tensor, ...]:
    """What fills tensors that it allocates itself."""
    try:
        filled = make(*given)
        guards.check()
        return tuple(x.clone() for x in filled)
    finally:
        guards.forget()


def _append(
    append: Callable[..., tuple[Tensor | None, Tensor]],
    allocated: Guards,
    device: Any,
    *appended: Appended,
    queries: Queries | None = None,
) -> tuple[Tensor | None, Tensor]:
    if any(_is_sparse(a.cache) for a in appended):
        return append(*appended, queries=queries)
    with Guards(device) as guards:
        copies = [guards.add(Guarded.like(a.cache)).copy_(a.cache) for a in appended]
        given = [a._replace(cache=copy) for a, copy in zip(appended, copies, strict=True)]
        rotated, lengths = append(*given, queries=queries)
        guards.check()
        allocated.check()
        for a, copy in zip(appended, copies, strict=True):
            _assign(a.cache, copy)
        return None if rotated is None else rotated.clone(), lengths.clone()


def _launch(
    launch: Callable[..., hopper.Plan],
    device: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s_aux: Tensor | None,
    options: Any,
    out: Tensor,
    lse: Tensor,
) -> hopper.Plan:
    if _is_sparse(out) or _is_sparse(lse):
        return launch(q, k, v, s_aux, options, out, lse)
    with Guards(device) as guards:
        o, row_lse = guards.add(Guarded.like(out)), guards.add(Guarded.like(lse))
        plan = launch(q, k, v, s_aux, options, o, row_lse)
        guards.check()
    _assign(out, o)
    _assign(lse, row_lse)
    plan.call.o = (out.data_ptr(), *plan.call.o[1:])  # of which the plan cache will hear
    plan.call.lse = (lse.data_ptr(), *plan.call.lse[1:])
    return plan


def _forward_e4m3(forward: Callable[..., None], device: Any, *given: Any) -> None:
    *inputs, data, scale = given
    with Guards(device) as guards:
        bytes_, scales = guards.add(Guarded.like(data)), guards.add(Guarded.like(scale))
        forward(*inputs, bytes_, scales)
        guards.check()
    _assign(data, bytes_)
    _assign(scale, scales)


def _decode(forward: Callable[..., None], device: Any, *given: Any) -> None:
    *inputs, out, lse, out_partial, lse_partial = given
    if _is_sparse(out) or _is_sparse(lse):
        forward(*given)
        return
    with Guards(device) as guards:
        o, row_lse = guards.add(Guarded.like(out)), guards.add(Guarded.like(lse))
        forward(*inputs, o, row_lse, out_partial, lse_partial)
        guards.check()
    _assign(out, o)
    _assign(lse, row_lse)


def _backward(backward: Callable[..., None], patch: Any, device: Any, *given: Any) -> None:
    """The workspace has guards, too."""
    *inputs, dq, dk, dv, dqv, ds_aux = given
    outputs = (dq, dk, dv, ds_aux)
    if any(_is_sparse(x) for x in outputs):
        backward(*given)
        return
    with Guards(device) as guards, patch.context() as inner:
        inner.setattr(hopper_backward, "allocate", guards.allocate)
        dq, dk, dv, ds_aux = (guards.add(Guarded.like(x)) for x in outputs)
        backward(*inputs, dq, dk, dv, dqv, ds_aux)
        guards.check()
        for x, values in zip(outputs, (dq, dk, dv, ds_aux), strict=True):
            _assign(x, values)


def _multiply(
    launch: Callable[..., None], device: Any, variant: Any, product: Any, out: Tensor
) -> None:
    if _is_sparse(out):
        launch(variant, product, out)
        return
    with Guards(device) as guards:
        guarded = guards.add(Guarded.like(out))
        launch(variant, product, guarded)
        guards.check()
    _assign(out, guarded)


def _is_sparse(x: Tensor) -> bool:
    return span(tuple(x.shape), x.stride()) * x.element_size() > _MOST_BYTES


def _assign(x: Tensor, values: Tensor) -> None:
    with torch.inference_mode():  # where tensors of that mode may be written as well
        x.copy_(values)

"""Runs the kernels of the backward on whatever driver is given, through the native host layer.

Inputs, outputs and workspace lie in the driver's memory with guards on both sides, which are
compared after the launches. Outputs and workspace are NaN before them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash8 import _native
from forward_launch import Call, Launch, descales


@dataclass(frozen=True)
class Gradients:
    """What a backward gives."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None = None
    dq_sums: Tensor | None = None  # in fp32, as they lie in the workspace
    dkv_sums: Tensor | None = None  # the same, of the splits of query heads


class BackwardKernels:
    """The compiled preprocess, kernel and postprocess of a variant, loaded by `driver`."""

    def __init__(self, driver: _native.Driver, *images: bytes) -> None:
        self._driver = driver
        self._kernels = [_native.Library(driver, image).kernel() for image in images]

    def with_kernel(self, image: bytes) -> "BackwardKernels":
        """Between the same preprocess and postprocess."""
        other = BackwardKernels(self._driver, image)
        before, _, behind = self._kernels
        other._kernels = [before, *other._kernels, behind]
        return other

    def __call__(
        self,
        call: Call,
        o: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None = None,
        k_mean: Tensor | None = None,
        head_splits: int = 1,
    ) -> Gradients:
        given = Launch(self._driver)
        params = _native.BackwardParams()
        rows, heads = call.q.shape[-3:-1]
        params.heads_q, params.heads_kv = heads, call.k.shape[-2]
        params.head_dim, params.head_dim_v = call.q.shape[-1], call.v.shape[-1]
        for name, x in {"q": call.q, "k": call.k, "v": call.v, "o": o, "dout": dout}.items():
            given.tensor(params, name, x)
        outputs = {}
        for name, like in (("dq", call.q), ("dk", call.k), ("dv", call.v)):
            filled = torch.full(like.shape, math.nan, dtype=o.dtype)
            outputs[name] = (given.tensor(params, name, filled), filled)
        descales(given, params, call)
        if k_mean is not None:
            strides = k_mean.stride(0), k_mean.stride(1)
            params.k_mean = (given.upload(k_mean).address, *strides)
        for name, x in (("lse", lse), ("dlse", dlse)):
            if x is not None:
                setattr(params, name, (given.upload(x).address, heads * rows, rows))
        given.sequences(params.sequences, call)
        given.scores(params.scores, call)
        given.dropout(params.dropout, call)
        params.scheduler.heads_per_section = 2
        params.head_splits = head_splits
        if call.s_aux is not None:
            filled = torch.full((heads,), math.nan)
            outputs["dsinks"] = (given.upload(filled), filled)
            params.dsinks = outputs["dsinks"][0].address
        for name, size in _native.backward_workspace(self._kernels[1], params).items():
            filled = torch.full((size // 4,), math.nan)
            outputs[name] = (given.upload(filled), filled)
            setattr(params, name, outputs[name][0].address)
        _native.launch_backward(*self._kernels, 0, 0, params)
        self._driver.synchronize()
        given.check()
        found = {n: memory.read(x) if x.numel() else x for n, (memory, x) in outputs.items()}
        return Gradients(
            *(found[name] for name in ("dq", "dk", "dv")),
            found.get("dsinks"),
            found["dq_accum"],
            found.get("dkv_partial"),
        )

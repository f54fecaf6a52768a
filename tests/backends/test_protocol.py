"""The backends have the functions, with the parameters, that `flash8.backends.protocol` lists."""

import inspect
import types

import pytest
import torch

from flash8 import backends
from flash8.backends import cpu, protocol
from flash8.backends.cpu import append as cpu_append
from flash8.backends.cpu import gemm as cpu_gemm
from flash8.backends.cpu import grouped_gemm as cpu_grouped_gemm
from flash8.backends.cpu import qkv_projection as cpu_qkv_projection
from flash8.backends.cpu import quantize as cpu_quantize
from flash8.backends.cpu import quantize_matrix as cpu_quantize_matrix
from flash8.backends.hopper import (
    append,
    backward,
    decode,
    forward,
    forward_e4m3,
    gemm,
    grouped_gemm,
    qkv_projection,
    quantize,
    quantize_matrix,
)

IMPLEMENTATIONS = (
    (protocol.Forward, cpu),
    (protocol.Backward, cpu),
    (protocol.Backend, cpu),
    (protocol.Quantizer, cpu_quantize),
    (protocol.Append, cpu_append),
    (protocol.Forward, forward),
    (protocol.KernelForward, forward),
    (protocol.ForwardE4m3, cpu),
    (protocol.ForwardE4m3, forward_e4m3),
    (protocol.KernelForwardE4m3, forward_e4m3),
    (protocol.Forward, decode),
    (protocol.KernelForward, decode),
    (protocol.Backward, backward),
    (protocol.KernelBackward, backward),
    (protocol.Quantizer, quantize),
    (protocol.KernelQuantizer, quantize),
    (protocol.Append, append),
    (protocol.KernelAppend, append),
    (protocol.MatrixQuantizer, cpu_quantize_matrix),
    (protocol.MatrixQuantizer, quantize_matrix),
    (protocol.KernelMatrixQuantizer, quantize_matrix),
    (protocol.Gemm, cpu_gemm),
    (protocol.Gemm, gemm),
    (protocol.KernelGemm, gemm),
    (protocol.GroupedGemm, cpu_grouped_gemm),
    (protocol.GroupedGemm, grouped_gemm),
    (protocol.KernelGroupedGemm, grouped_gemm),
    (protocol.QkvProjection, cpu_qkv_projection),
    (protocol.QkvProjection, qkv_projection),
    (protocol.KernelQkvProjection, qkv_projection),
)


def members(contract):
    return [
        (name, member)
        for name, member in inspect.getmembers(contract, inspect.isfunction)
        if not name.startswith("_")
    ]


def shape(function, skipped=0):
    """Names, kinds and defaults of a function's parameters."""
    parameters = list(inspect.signature(function).parameters.values())[skipped:]
    return [(p.name, p.kind, p.default) for p in parameters]


def breaches(contract, module):
    """The functions of a protocol that a module lacks or has with other parameters."""
    return [
        name
        for name, member in members(contract)
        if not callable(function := getattr(module, name, None))
        or shape(function) != shape(member, skipped=1)
    ]


@pytest.mark.parametrize("contract, module", IMPLEMENTATIONS)
def test_modules_keep_their_contract(contract, module):
    assert members(contract)
    assert breaches(contract, module) == []


def test_every_contract_has_an_implementation():
    listed = {contract for contract, _ in IMPLEMENTATIONS}
    found = {x for x in vars(protocol).values() if getattr(x, "_is_protocol", False)}
    assert found - {protocol.Protocol} == listed


def test_breaches_are_found():
    def swapped(dout, dlse, k, q):  # q and k change places
        raise NotImplementedError

    planted = types.SimpleNamespace(**{**vars(cpu), "backward": swapped})
    del planted.combine
    assert breaches(protocol.Backend, planted) == ["backward", "combine"]


def test_cpu_tensors_go_to_the_whole_backend():
    assert backends.backend_for(torch.empty(1)) is cpu

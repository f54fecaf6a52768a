"""A pytest plugin under which the GPU tests run on the CPU, and say which kernels they ask for.

CPU tensors pass for CUDA tensors; no kernel is trusted, so the portable code serves every call. The
variants go to the file that FLASH8_RECORDED names: a JSON of class names and fields. Tests that
start other processes are skipped: what those ask for is not seen here.
"""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from flash8 import backends
from flash8.backends.hopper import mode
from flash8.backends.hopper.verify import trust
from flash8.ops import plan_cache, planned

_asked = {}


class _CudaIsTheCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return args[0] if function is torch.Tensor.cuda else function(*args, **kwargs)


def _record(variant, device) -> bool:
    _asked[variant.name] = [type(variant).__name__, asdict(variant)]
    return False


def pytest_configure() -> None:
    os.environ["FLASH8_KERNELS"] = "off"  # by which tests know that there are no graphs
    torch.cuda.is_available = lambda: True  # which the tests ask when they are collected
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.synchronize = lambda *_: None
    backends.kernels_wanted = lambda tensor: True
    mode.kernels_mode = lambda: "auto"
    # A backward runs where the mode below is not seen.
    planned.may_launch = plan_cache.may_launch = lambda q: False
    trust.is_trusted = _record


def _skip(*_, **__) -> None:
    pytest.skip("another process is not recorded")


@pytest.fixture(autouse=True)
def _cuda_is_the_cpu(monkeypatch):
    monkeypatch.setattr(subprocess, "run", _skip)
    with _CudaIsTheCpu():
        yield


def pytest_unconfigure() -> None:
    Path(os.environ["FLASH8_RECORDED"]).write_text(json.dumps(_asked))

"""NVRTC as the front end, where there is no host compiler and cuda-python is installed."""

import pytest

from flash8.backends.hopper.variants import ForwardVariant
from flash8.compiler import CompileError, Unit, compile_unit, toolchain
from simulated_device import missing_compiler

VARIANT = ForwardVariant("bf16", 64, 64, mask="causal")


@pytest.fixture
def no_host_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "has_host_compiler", lambda: False)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))


def needs_nvrtc():
    missing = missing_compiler()
    if missing is not None:
        pytest.skip(missing)
    if not toolchain.has_nvrtc():
        pytest.skip("needs cuda-python (pip install 'flash8[nvrtc]')")


def test_without_a_host_compiler_nvrtc_is_the_front_end(no_host_compiler):
    needs_nvrtc()
    compiled = compile_unit(VARIANT.unit())
    assert toolchain.find_toolchain().nvrtc
    assert not compiled.report.problems()
    ptx = compiled.ptx.read_text()
    assert ".visible .entry flash8_forward(" in ptx and "kernel_info" in ptx
    assert compiled.cubin.read_bytes()[:4] == b"\x7fELF"
    assert compile_unit(VARIANT.unit()).seconds == 0  # the cache holds it under a key of its own


def test_nvrtcs_words_are_the_error(no_host_compiler, tmp_path):
    needs_nvrtc()
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { undeclared = 1; }\n")
    with pytest.raises(CompileError, match=r'NVRTC refused[\s\S]*"undeclared" is undefined'):
        compile_unit(Unit(source))


def test_without_nvrtc_either_nvcc_is_tried(no_host_compiler, monkeypatch):
    if missing_compiler() is not None:
        pytest.skip("needs nvcc")
    monkeypatch.setattr(toolchain, "has_nvrtc", lambda: False)
    assert not toolchain.find_toolchain().nvrtc


def test_a_host_compiler_is_preferred(monkeypatch):
    if missing_compiler() is not None:
        pytest.skip("needs nvcc")
    monkeypatch.setattr(toolchain, "has_host_compiler", lambda: True)
    monkeypatch.setattr(toolchain, "has_nvrtc", lambda: True)
    assert not toolchain.find_toolchain().nvrtc

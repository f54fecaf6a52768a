"""NVRTC as the front end, where there is no host compiler and cuda-python is installed."""

import re

import pytest

from defaults import by_default
from flash8.backends.hopper import kernels
from flash8.compiler import CompileError, Unit, compile_unit, nvrtc, toolchain
from flash8.compiler.reads import device_code
from simulated_device import missing_compiler

#: One of each kind of code.
NAMES = (
    "forward_bf16_d64_causal",
    "forward_e4m3_d128_causal_headscales",
    "forward_e4m3_d256_headscales",
    "forward_bf16_e4m3_d64_causal",
    "forward_bf16_d128_causal_packgqa_paged_gather",
    "backward_bf16_d128_causal_fp8",
    "backward_bf16_d256_causal",
    "decode_bf16_d128_rows8",
    "decode_bf16_e4m3_d128_rows8_append",
    "decode_bf16_e4m3_d128_rows8_keyscales",
    "decode_bf16_e4m3_d64x512_rows8_qv",
    "decode_schedule",
    "quantize_cast_bf16_d64_vcolmajor",
    "append_bf16_to_e4m3",
    "gemm_block_128x128",
    "gemm_outer_fast_128x128",
)
VARIANTS = [variant for variant in kernels.shipped() if variant.name in NAMES]
VARIANT = VARIANTS[0]


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
    unit = kernels.kernels_of(VARIANT)[0].unit()
    compiled = compile_unit(unit)
    assert toolchain.find_toolchain().nvrtc
    assert not compiled.report.problems()
    ptx = compiled.ptx.read_text()
    assert ".visible .entry flash8_forward(" in ptx and "kernel_info" in ptx
    assert compiled.cubin.read_bytes()[:4] == b"\x7fELF"
    assert compile_unit(unit).seconds == 0  # the cache holds it under a key of its own


@pytest.mark.parametrize("variant", by_default(VARIANTS, [VARIANT]))
def test_every_kind_of_kernel_compiles(no_host_compiler, variant):
    needs_nvrtc()
    for kernel in kernels.kernels_of(variant):
        assert not compile_unit(kernel.unit()).report.problems()


def test_standard_headers_are_given_to_it():
    """NVRTC has none. Seen without it, for it is seldom installed."""
    texts = [path.read_text() for path in device_code()]
    standard = {name for text in texts for name in re.findall(r"#include <([a-z_]+)>", text)}
    assert {"cstdint", "cfloat"} <= standard <= nvrtc._STANDARD_HEADERS.keys()


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

"""The compile path with the real compiler, where it is installed: `pip install flash8[compile]`."""

import re

import pytest

from defaults import by_default
from flash8 import _native
from flash8.backends.hopper.variants import ForwardVariant
from flash8.compiler import (
    CompileError,
    CompilerNotFoundError,
    Unit,
    compile_unit,
    cutlass_root,
    find_toolchain,
    kernel_root,
)

try:
    find_toolchain()
    reason = ""
except CompilerNotFoundError as error:
    reason = str(error)

pytestmark = pytest.mark.skipif(bool(reason), reason=reason)

SCALE = """
#include "kernel_info.h"

struct ScaleParams {
    float* data;
    int count;
    float factor;
};

extern "C" __constant__ flash8::KernelInfo kernel_info = {
    flash8::kAbiVersion, sizeof(flash8::KernelInfo), sizeof(ScaleParams),
    flash8::KernelKind::kOther, "scale"};

extern "C" __global__ void __launch_bounds__(128)
scale(const __grid_constant__ ScaleParams params) {
    int const i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < params.count) {
        params.data[i] *= params.factor * FACTOR;
    }
}
"""

# A wgmma whose accumulator is read before its wait: ptxas has to serialise it.
SERIALIZED = """
extern "C" __global__ void __launch_bounds__(128)
early(float* out, unsigned long long a, unsigned long long b) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < 4; ++i) {
        asm volatile("wgmma.fence.sync.aligned;");
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
                     "{%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a + i), "l"(b));
        d[0] *= 2.f;
        asm volatile("wgmma.commit_group.sync.aligned;");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) crowded(float* data, int count) {
    float x[64];
    for (int i = 0; i < 64; ++i) x[i] = data[i * 1024 + threadIdx.x];
    for (int j = 0; j < count; ++j) {
        for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i + 7) % 64] + x[(i + 31) % 64];
    }
    for (int i = 0; i < 64; ++i) data[i * 1024 + threadIdx.x] = x[i];
}
"""

REALLOCATING = """
extern "C" __global__ void __launch_bounds__(384, 1) reallocating(int* out) {
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(RELEASED));
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    }
    out[threadIdx.x] = threadIdx.x;
}
"""


@pytest.fixture
def compile_text(tmp_path, monkeypatch):
    """Compile a source text into a cache of its own."""
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASH8_COMPILE", raising=False)

    def compile_text(text: str, **defines: str):
        source = tmp_path / "kernel.cu"
        source.write_text(text)
        return compile_unit(Unit(source, tuple(defines.items())))

    return compile_text


def test_a_kernel_compiles_and_its_log_is_read(compile_text):
    compiled = compile_text(SCALE, FACTOR="2")
    cubin = compiled.cubin.read_bytes()
    assert cubin[:4] == b"\x7fELF"
    assert b"kernel_info\0" in cubin
    assert ".target sm_90a" in compiled.ptx.read_text()
    (cost,) = compiled.report.kernels
    assert (cost.name, cost.stack, cost.spill_stores) == ("scale", 0, 0)
    assert 0 < cost.registers < 64
    assert compiled.report.problems() == []


def test_a_define_reaches_the_kernel(compile_text):
    ptx = {compile_text(SCALE, FACTOR=factor).ptx.read_text() for factor in ("2", "3")}
    assert len(ptx) == 2


def test_serialised_wgmma_is_found_in_a_real_log(compile_text):
    report = compile_text(SERIALIZED).report
    assert report.serialized
    assert "early" in report.serialized[0]


def test_spills_are_found_in_a_real_log(compile_text):
    problems = compile_text(SPILLING).report.problems()
    assert any(problem.startswith("crowded spills: ") for problem in problems)


@pytest.mark.parametrize(("released", "hangs"), [("40", False), ("48", True)])
def test_a_kernel_that_waits_for_registers_for_ever_does_not_compile(compile_text, released, hangs):
    if not hangs:
        assert compile_text(REALLOCATING, RELEASED=released).report.problems() == []
        return
    with pytest.raises(CompileError, match=r"48 \+ 2 x 232 = 512 registers of 3 x 168 = 504"):
        compile_text(REALLOCATING, RELEASED=released)


def test_device_and_host_agree_on_every_offset(compile_text):
    roots = (kernel_root(), cutlass_root())
    headers = sorted(header for root in roots for header in root.rglob("*params.h"))
    lines = [f'#include "{header}"' for header in ("kernel_info.h", *headers)]
    for name, struct in _native.layout().items():
        full = f"flash8::{name}"
        lines.append(f"static_assert(sizeof({full}) == {struct['size']});")
        lines.append(f"static_assert(alignof({full}) == {struct['align']});")
        for field, (offset, size) in struct["fields"].items():
            lines.append(f"static_assert(__builtin_offsetof({full}, {field}) == {offset});")
            lines.append(f"static_assert(sizeof({full}::{field}) == {size});")
    ptx = compile_text("\n".join([*lines, SCALE]), FACTOR="1").ptx.read_text()
    size = _native.layout()["KernelInfo"]["size"]
    assert re.search(rf"\.const \.align 4 \.b8 kernel_info\[{size}\]", ptx)


def test_a_variant_becomes_defines_that_the_compiler_takes(compile_text):
    variant = ForwardVariant("e4m3", 128, 64, mask="local", scales="block")
    include = '#include "forward/config.cuh"\n'
    checks = """
        using Config = flash8::ForwardConfig;
        static_assert(Config::kElement == flash8::ElementChoice::kE4m3);
        static_assert(Config::kMask == flash8::MaskMode::kLocal);
        static_assert(Config::kScales == flash8::ScaleGranularity::kBlock);
        static_assert(Config::kHeadDim == 128 && Config::kHeadDimV == 64 && !Config::kPackGqa);
    """
    given = dict(variant.defines)
    assert compile_text(include + checks + SCALE, FACTOR="1", **given).cubin.is_file()


@pytest.mark.parametrize(
    "define", by_default(["FLASH8_MASK", "FLASH8_DTYPE", "FLASH8_SCALES"], ["FLASH8_MASK"])
)
def test_a_choice_that_the_device_code_does_not_know_does_not_compile(compile_text, define):
    variant = ForwardVariant("e4m3", 128, 64, mask="local", scales="block")
    given = dict(variant.defines) | {define: "kMissing"}
    with pytest.raises(CompileError, match="kMissing"):
        compile_text('#include "forward/config.cuh"\n' + SCALE, FACTOR="1", **given)

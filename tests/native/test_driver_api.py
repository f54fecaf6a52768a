"""Our own declarations of the driver's ABI, against cuda.h where it is installed."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from repository import NATIVE

SOURCE = """
#include <cuda.h>

#include <type_traits>

#include "driver/driver_api.h"

namespace cu = flash8::cu;

template <class Ours, class Theirs>
constexpr bool same_size = sizeof(Ours) == sizeof(Theirs);

template <class Ours, class Theirs>
struct SameAbi : std::false_type {};

template <class R, class... P, class S, class... Q>
struct SameAbi<R (*)(P...), S (*)(Q...)>
    : std::bool_constant<sizeof...(P) == sizeof...(Q) && same_size<R, S>> {
    static_assert((same_size<P, Q> && ...));
    static_assert(((std::is_pointer_v<P> == std::is_pointer_v<Q>) && ...));
};

#define SAME(member, symbol, parameters) \\
    static_assert(                                                                  \\
        SameAbi<decltype(cu::Entries::member.function), decltype(&::symbol)>::value, #symbol);
FLASH8_DRIVER_ENTRIES(SAME)

#define EQUAL(ours, theirs) \\
    static_assert(static_cast<int>(ours) == static_cast<int>(theirs), #theirs);
EQUAL(cu::kSuccess, CUDA_SUCCESS)
EQUAL(cu::kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
EQUAL(cu::kComputeCapabilityMajor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
EQUAL(cu::kComputeCapabilityMinor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
EQUAL(cu::kMaxSharedMemoryPerBlockOptin, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
EQUAL(cu::kCaptureNone, CU_STREAM_CAPTURE_STATUS_NONE)
EQUAL(cu::kLocalSizeBytes, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
EQUAL(cu::kNumRegs, CU_FUNC_ATTRIBUTE_NUM_REGS)
EQUAL(cu::kMaxDynamicSharedSizeBytes, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
EQUAL(cu::kNonPortableClusterSizeAllowed, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
EQUAL(cu::kLaunchClusterDimension, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
EQUAL(cu::kLaunchProgrammaticStreamSerialization,
      CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
EQUAL(flash8::ElementType::kUint8, CU_TENSOR_MAP_DATA_TYPE_UINT8)
EQUAL(flash8::ElementType::kFloat16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
EQUAL(flash8::ElementType::kFloat32, CU_TENSOR_MAP_DATA_TYPE_FLOAT32)
EQUAL(flash8::ElementType::kBfloat16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
EQUAL(flash8::Swizzle::kNone, CU_TENSOR_MAP_SWIZZLE_NONE)
EQUAL(flash8::Swizzle::k32B, CU_TENSOR_MAP_SWIZZLE_32B)
EQUAL(flash8::Swizzle::k64B, CU_TENSOR_MAP_SWIZZLE_64B)
EQUAL(flash8::Swizzle::k128B, CU_TENSOR_MAP_SWIZZLE_128B)

static_assert(same_size<flash8::TensorMap, CUtensorMap>);
static_assert(same_size<cu::LaunchConfig, CUlaunchConfig>);
static_assert(offsetof(cu::LaunchConfig, block_x) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(cu::LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(cu::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(cu::LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(cu::LaunchConfig, num_attributes) == offsetof(CUlaunchConfig, numAttrs));
static_assert(same_size<cu::LaunchAttribute, CUlaunchAttribute>);
static_assert(offsetof(cu::LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
"""


def cuda_include() -> Path | None:
    roots = [Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"]
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    roots += [Path("/usr/local/cuda")]
    return next((r / "include" for r in roots if (r / "include" / "cuda.h").is_file()), None)


@pytest.mark.skipif(cuda_include() is None, reason="cuda.h is not installed (pip: flash8[compile])")
def test_declarations_agree_with_cuda_h(tmp_path):
    source = tmp_path / "compare.cpp"
    source.write_text('#include "kernel_info.h"\n' + SOURCE)
    includes = [f"-I{NATIVE}", f"-I{NATIVE.parent.parent / 'hopper'}", f"-I{cuda_include()}"]
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", *includes, str(source)], check=True)

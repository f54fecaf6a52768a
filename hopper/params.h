// The plain structs that the host fills and the device reads. This header is compiled by a host
// compiler (C++17, no CUDA header) and by the device compiler, and it must mean the same to both:
//   - standard layout, trivially copyable, no implicit padding (a test holds every offset);
//   - fixed-width integers, sizes before flags, every stride int64 and counted in elements;
//   - nothing that exists on the host only: no stream, no device number, no owner of memory.
// Any change of layout or meaning raises kAbiVersion, so that an old cubin is refused, not misread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace flash8 {

inline constexpr std::uint32_t kAbiVersion = 16;

// Tokens that share a descale of granularity block. Sequences of column-major V start with such a block, too.
inline constexpr int kScaleBlock = 128;

// What the driver calls CUtensorMap: opaque, encoded by the host, read by TMA.
struct alignas(64) TensorMap {
    char opaque[128];
};

// A tensor of heads. Dense: (batch, seqlen, heads, head_dim). Packed: (total, heads, head_dim), where
// batch_stride is unused. The innermost stride is 1. A null pointer means that the call does not have this
// tensor.
struct TensorRef {
    void* ptr;
    std::int64_t batch_stride;
    std::int64_t row_stride;
    std::int64_t head_stride;
};

// fp32 factors that turn stored values back into real ones: x ~ descale * x_fp8. Granularity is in the
// strides: all zero is one factor per tensor, block_stride zero is one per (batch, head). A block is
// KernelInfo::scale_block rows of the tensor; the first block of packed sequence b is number
// cu_seqlens[b] / scale_block + b, and batch_stride is unused. A null pointer stands for 1.
struct DescaleRef {
    const float* ptr;
    std::int64_t batch_stride;
    std::int64_t head_stride;
    std::int64_t block_stride;
};

// Per-row fp32 statistics: (batch, heads, seqlen), or (heads, total) when packed. Rows are contiguous.
struct RowRef {
    float* ptr;
    std::int64_t batch_stride;
    std::int64_t head_stride;
};

// fp32 per channel: (batch, heads, head_dim), the innermost stride is 1. Null: the call has none.
struct ChannelRef {
    const float* ptr;
    std::int64_t batch_stride;
    std::int64_t head_stride;
};

// The element types of tensors that TMA moves; the values are the driver's CUtensorMapDataType.
enum class ElementType : std::uint32_t {
    kUint8 = 0,
    kFloat16 = 6,
    kFloat32 = 7,
    kBfloat16 = 9,
};

template <class T>
inline constexpr bool kIsPlain = std::is_standard_layout_v<T> && std::is_trivially_copyable_v<T>;

static_assert(sizeof(void*) == 8, "flash8 needs a 64-bit host");
static_assert(sizeof(TensorMap) == 128 && alignof(TensorMap) == 64);

}  // namespace flash8

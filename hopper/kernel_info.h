// What a kernel tells the host about itself.

#pragma once

#include "params.h"

namespace flash8 {

enum class KernelKind : std::uint32_t {
    kForward = 1,
    kBackwardPreprocess = 2,
    kBackward = 3,
    kBackwardPostprocess = 4,
    kDecode = 5,
    kQuantize = 6,
    kQuantizeAmax = 7,
    kQuantizeMean = 8,
    kQuantizeMeanFinish = 9,
    kQuantizeAppend = 10,
    kDecodeSchedule = 11,
    kGemm = 12,
    kQuantizeMatrix = 13,
    kQuantizeRmsNorm = 14,
    kQuantizeSiluMul = 15,
    kGemmGroupedK = 16,
    kQkvProjection = 18,
    kOther = 255,
};

// Where the keys of a forward kernel lie.
enum class PageChoice : std::int32_t {
    kNone = 0,
    kPages = 1,          // without leftpad_k
    kPaddedPages = 2,    // with or without
    kGatheredPages = 3,  // with or without, and of any size
    kWidenedKeys = 4,    // e4m3 under a Q of 16 bits: dense, packed, or in pages of any size
};

// The driver's CUtensorMapSwizzle.
enum class Swizzle : std::uint32_t { kNone = 0, k32B = 1, k64B = 2, k128B = 3 };

// The box that one TMA instruction of the kernel moves: box[0] runs along head_dim. rank 0: no such map.
struct TmaBox {
    std::uint32_t rank;
    std::uint32_t box[5];
    ElementType element_type;
    Swizzle swizzle;
};

// Every kernel exports one as `extern "C" __constant__ KernelInfo kernel_info`. The host reads it from
// the image and recomputes none of it. abi_version and info_bytes stay first for ever.
struct KernelInfo {
    static constexpr int kMaxTmaBoxes = 8;

    std::uint32_t abi_version;   // kAbiVersion of the header that compiled the kernel
    std::uint32_t info_bytes;    // sizeof(KernelInfo)
    std::uint32_t params_bytes;  // sizeof of the kernel's one parameter
    KernelKind kind;
    char entry[64];  // name of the __global__ function, null-terminated

    std::int32_t kBlockM;
    std::int32_t kBlockN;
    std::int32_t kHeadDim;
    std::int32_t kHeadDimV;
    std::int32_t kStages;
    std::int32_t threads;  // per CTA
    std::int32_t min_ctas_per_sm;
    std::int32_t cluster[3];
    std::int32_t shared_bytes;  // dynamic shared memory of a CTA
    std::int32_t producer_registers;
    std::int32_t consumer_registers;
    std::int32_t pack_gqa;     // 1: query heads of one KV head are folded into kBlockM
    std::int32_t scale_block;  // rows that share a descale; 0: no blocks
    std::int32_t v_colmajor;   // 1: V is read column-major, as the quantizer writes it
    PageChoice paged;          // whether K and V lie in pages
    std::int32_t qv;           // 1: scores are q . k + qv . v
    std::int32_t appends;      // 1: the kernel writes new keys into the cache that it reads
    std::int32_t out_e4m3;     // 1: the kernel writes O as e4m3
    std::int32_t max_splits;   // CTAs of a cluster that may share the K of a tile; 0: as 1
    TmaBox tma[kMaxTmaBoxes];  // in the order in which the params struct names its maps
};

static_assert(kIsPlain<KernelInfo> && alignof(KernelInfo) == 4);
#ifndef __CUDACC_RTC__  // whose offsetof is no constant
static_assert(offsetof(KernelInfo, abi_version) == 0 && offsetof(KernelInfo, info_bytes) == 4);
#endif

}  // namespace flash8

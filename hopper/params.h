// The plain structs that the host fills and the device reads. This header is compiled by a host
// compiler (C++17, no CUDA header) and by the device compiler, and it must mean the same to both:
//   - standard layout, trivially copyable, no implicit padding (a test holds every offset);
//   - fixed-width integers, sizes before flags, every stride int64 and counted in elements;
//   - nothing that lives on the host only: no stream, no device number, no owner of memory.
// Any change of layout or meaning raises kAbiVersion, so that an old cubin is refused, not misread.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace flash8 {

inline constexpr std::uint32_t kAbiVersion = 4;

// Tokens that share a descale of granularity block. Sequences of V by keys start with such a block, too.
inline constexpr int kScaleBlock = 128;

// What the driver calls CUtensorMap: opaque, encoded by the host, read by TMA.
struct alignas(64) TensorMap {
    char opaque[128];
};

// A tensor of heads. Dense: (batch, seqlen, heads, head_dim). Packed: (total, heads, head_dim), where
// batch_stride is unused. Paged: (num_pages, page_size, heads, head_dim), where batch_stride steps over a
// page. The innermost stride is 1. A null pointer means that the call does not have this tensor.
struct TensorRef {
    void* ptr;
    std::int64_t batch_stride;
    std::int64_t row_stride;
    std::int64_t head_stride;
};

// fp32 factors that turn stored values back into real ones: x ~ descale * x_fp8. Granularity is in the
// strides: all zero is one factor per tensor, block_stride zero is one per (batch, head). A block is
// KernelInfo::scale_block rows of the tensor; the first block of packed sequence b is number
// cu_seqlens[b] / scale_block + b, and batch_stride is unused. Paged tensors have one block per page:
// batch_stride steps over a page. A null pointer stands for 1.
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

// Where sequences lie. Any pointer may be null; null cu_seqlens means a dense tensor.
struct SequenceParams {
    const std::int32_t* cu_seqlens_q;  // (batch + 1): rows of sequence b are [cu[b], cu[b+1])
    const std::int32_t* cu_seqlens_k;  // (batch + 1)
    const std::int32_t* seqused_q;     // (batch): rows really used, from the start of the sequence
    const std::int32_t* seqused_k;     // (batch): keys really used, counted with the left padding
    const std::int32_t* leftpad_k;     // (batch): keys to skip at the start
    const std::int32_t* kv_batch_idx;  // (batch): which sequence of the cache to read
    const std::int32_t* page_table;    // (batch, max_pages_per_sequence): page numbers
    std::int64_t page_table_batch_stride;
    std::int64_t total_q;  // rows of Q over all sequences
    std::int64_t total_k;
    std::int32_t batch;         // sequences of Q
    std::int32_t batch_k;       // sequences of K/V: more than batch with kv_batch_idx
    std::int32_t max_seqlen_q;  // the length when dense, an upper bound otherwise
    std::int32_t max_seqlen_k;
    std::int32_t page_size;  // rows per page; 0 is not paged
    std::int32_t num_pages;
};

// S = softmax_scale * q.k, then softcap, then ALiBi, then the mask, then softmax with the sink, then dropout.
struct ScoreParams {
    const float* sinks;                // (heads_q) natural log, or null: one more logit without a value
    const float* alibi_slopes;         // (heads_q) or (batch, heads_q), or null
    std::int64_t alibi_batch_stride;   // 0 when the slopes are shared by the batch
    const std::int64_t* dropout_seed;  // one value on the device, so that a captured graph can change it
    float softmax_scale;
    float softmax_scale_log2;         // softmax_scale * log2(e)
    float softcap;                    // 0 is off
    float dropout_scale;              // 1 / (1 - p)
    std::uint32_t dropout_threshold;  // of 65536: an element is dropped when its 16 bits are below it
    std::int32_t window_left;         // -1 is unbounded
    std::int32_t window_right;        // -1 is unbounded; 0 when causal
    std::int32_t attention_chunk;     // 0 is off
};

// Work distribution. The counters are zero when a kernel starts and zero again when it has ended.
struct SchedulerParams {
    std::int32_t*
        tile_count;  // two counters: what the dynamic scheduler draws from, and the CTAs that are done
    const std::int32_t* num_m_blocks;  // (batch) or null: written by the prepare step of varlen
    const std::int32_t* num_splits;    // (batch) or null: KV splits of every sequence
    const std::int32_t* batch_order;   // (batch) or null: longest sequence first
    std::int32_t max_m_blocks;         // over the batch, in tiles of kBlockM times the cluster
    std::int32_t max_splits;           // 1 is no split
    std::int32_t heads_per_section;    // (batch, head) pairs whose KV fits in L2 together
    std::int32_t num_ctas;             // persistent CTAs, sm_margin already taken off
};

// The element types of tensors that TMA moves; the values are the driver's CUtensorMapDataType.
enum class ElementType : std::uint32_t {
    kUint8 = 0,
    kFloat16 = 6,
    kFloat32 = 7,
    kBfloat16 = 9,
};

struct ForwardParams {
    TensorMap tma_q;
    TensorMap tma_k;
    TensorMap tma_v;
    TensorMap tma_qv;
    TensorMap tma_o;

    TensorRef q;   // (batch, seqlen_q, heads_q, head_dim)
    TensorRef k;   // (batch_k, seqlen_k, heads_kv, head_dim)
    TensorRef v;   // (batch_k, seqlen_k, heads_kv, head_dim_v), or with KernelInfo::v_transposed
                   // (batch_k, heads_kv, head_dim_v, 128 * blocks), where row_stride steps over head_dim_v
    TensorRef qv;  // (batch, seqlen_q, heads_q, head_dim_v)
    TensorRef o;   // (batch, seqlen_q, heads_q, head_dim_v)
    RowRef lse;    // natural log

    // fp32 partials of split-KV: (splits, batch, seqlen_q, heads_q, head_dim_v) and (splits, batch, heads_q,
    // seqlen_q).
    TensorRef o_partial;
    RowRef lse_partial;
    std::int64_t o_partial_split_stride;
    std::int64_t lse_partial_split_stride;

    DescaleRef q_descale;
    DescaleRef k_descale;
    DescaleRef v_descale;
    ChannelRef k_mean;  // what K lacks: softmax_scale * q . k_mean comes back in LSE
    ChannelRef v_mean;  // what V lacks: added to O, times the weight that the keys have beside the sink
    ChannelRef v_channel_descale;  // V's by channel, beside v_descale

    SequenceParams sequences;
    ScoreParams scores;
    SchedulerParams scheduler;

    std::int32_t heads_q;
    std::int32_t heads_kv;
    std::int32_t head_dim;
    std::int32_t head_dim_v;
    ElementType o_type;                // kFloat16 or kBfloat16; for 16-bit inputs the type of q
    std::int32_t heads_per_q_descale;  // query heads that share a descale: 1, or heads_q / heads_kv
    std::int32_t reserved[10];         // zero: fills the struct up to its 64-byte alignment
};

struct BackwardParams {
    TensorMap tma_q;
    TensorMap tma_k;
    TensorMap tma_v;
    TensorMap tma_do;
    TensorMap tma_dq_accum;
    TensorMap tma_dk;
    TensorMap tma_dv;

    TensorRef q;
    TensorRef k;
    TensorRef v;
    TensorRef o;
    TensorRef d_o;
    TensorRef d_q;
    TensorRef d_k;
    TensorRef d_v;
    TensorRef
        d_q_accum;  // fp32 (batch, seqlen_q_rounded, heads_q, head_dim): reduced into, then scaled and cast
    TensorRef d_k_accum;  // fp32, with more query heads than KV heads only
    TensorRef d_v_accum;  // fp32, with more query heads than KV heads only

    RowRef lse;       // natural log, from the forward
    RowRef lse_log2;  // lse * log2(e), +inf for rows that do not count: exp2(s - lse_log2) is then 0
    RowRef delta;     // rowsum(dO * O) - dLSE
    float* d_sinks;   // (heads_q) or null
    std::int32_t*
        d_q_order;  // (batch, heads_q, m_blocks) or null: the deterministic order of the dQ reductions

    DescaleRef q_descale;
    DescaleRef k_descale;
    DescaleRef v_descale;
    DescaleRef do_descale;

    SequenceParams sequences;
    ScoreParams scores;
    SchedulerParams scheduler;

    std::int32_t heads_q;
    std::int32_t heads_kv;
    std::int32_t head_dim;
    std::int32_t head_dim_v;
    std::int32_t deterministic;
    std::int32_t reserved[7];  // zero: fills the struct up to its 64-byte alignment
};

enum class KernelKind : std::uint32_t {
    kForward = 1,
    kCombine = 2,
    kBackwardPreprocess = 3,
    kBackward = 4,
    kBackwardPostprocess = 5,
    kQuantize = 6,
    kQuantizeAmax = 7,
    kQuantizeMean = 8,
    kQuantizeMeanFinish = 9,
    kQuantizeAppend = 10,
    kOther = 255,
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
// the loaded cubin and computes nothing of it again. abi_version and info_bytes stay first for ever.
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
    std::int32_t pack_gqa;      // 1: query heads of one KV head are folded into kBlockM
    std::int32_t paged_tma;     // 1: a page is loaded by TMA, so page_size must be a multiple of kBlockN
    std::int32_t scale_block;   // rows that share a descale; 0: no blocks
    std::int32_t v_transposed;  // 1: V is read by keys, as the quantizer transposes it
    TmaBox tma[kMaxTmaBoxes];   // in the order in which the params struct names its maps
};

template <class T>
inline constexpr bool kIsPlain = std::is_standard_layout_v<T> && std::is_trivially_copyable_v<T>;

static_assert(sizeof(void*) == 8, "flash8 needs a 64-bit host");
static_assert(sizeof(TensorMap) == 128 && alignof(TensorMap) == 64);
static_assert(kIsPlain<ForwardParams> && alignof(ForwardParams) == 64);
static_assert(kIsPlain<BackwardParams> && alignof(BackwardParams) == 64);
static_assert(kIsPlain<KernelInfo> && alignof(KernelInfo) == 4);
#ifndef __CUDACC_RTC__  // whose offsetof is no constant
static_assert(offsetof(KernelInfo, abi_version) == 0 && offsetof(KernelInfo, info_bytes) == 4);
#endif
static_assert(sizeof(ForwardParams) <= 4096 && sizeof(BackwardParams) <= 4096,
              "the parameter space that every driver accepts");

}  // namespace flash8

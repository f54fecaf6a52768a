#include "kernels/launch_forward.h"

#include <algorithm>
#include <numeric>

#include "driver/launch.h"
#include "driver/require.h"
#include "driver/tensor_map.h"
#include "kernels/attention_checks.h"

namespace flash8 {

namespace {

constexpr const char* kCall = "forward";
constexpr std::int64_t kCopyBytes = 16;  // that a lane copies when pages are gathered

void check_kernel(const Kernel& kernel) {
    require(kernel.info().has_value(), "forward: ", kernel.name(), " exports no kernel_info");
    require(kernel.info()->kind == KernelKind::kForward, "forward: ", kernel.name(),
            " is not a forward kernel");
}

void check_folding(const ForwardParams& call, const KernelInfo& info) {
    const int ratio = call.heads_q / call.heads_kv;
    require(!info.pack_gqa || info.kBlockM % ratio == 0, "forward: heads_q is ", call.heads_q, ", ", ratio,
            " times heads_kv; this kernel folds heads into tiles of ", info.kBlockM,
            " rows, which that does not divide");
}

// Of K and V that are widened to the type of Q.
void check_widened_descales(const ForwardParams& call) {
    require(call.q_descale.ptr == nullptr, "forward: q_descale is given; q of 16 bits has none");
    require(call.k_descale.block_stride == 0 && call.v_descale.block_stride == 0,
            "forward: this kernel has one descale of k and v per head, not per block");
    require(call.k_mean.ptr == nullptr && call.v_mean.ptr == nullptr && call.v_channel_descale.ptr == nullptr,
            "forward: k_mean, v_mean or v_channel_descale is given; with q of 16 bits there is no kernel "
            "for them");
}

void check_descales(const ForwardParams& call, const KernelInfo& info) {
    if (info.paged == PageChoice::kWidenedKeys) {
        check_widened_descales(call);
    }
    if (element_bytes(info.tma[0].element_type) != 1) {
        return;
    }
    const std::int32_t group = call.heads_q / call.heads_kv;
    require(call.heads_per_q_descale == 1 || call.heads_per_q_descale == group,
            "forward: heads_per_q_descale is ", call.heads_per_q_descale, "; supported are 1 and ", group,
            ", the query heads of a KV head");
    const bool blocks = call.q_descale.block_stride != 0 || call.k_descale.block_stride != 0 ||
                        call.v_descale.block_stride != 0;
    require(!blocks || info.scale_block > 0, "forward: this kernel has one descale per head, not per block");
    require((info.scale_block == 0 && info.v_colmajor == 0) || call.sequences.leftpad_k == nullptr,
            "forward: leftpad_k is not supported with descales per block or transposed v");
}

// O, of 16 bits or e4m3 with scales.
void check_output(const ForwardParams& call, const KernelInfo& info) {
    const OutScaleRef& scale = call.out_scale;
    const bool scaled = info.out_e4m3 != 0;
    check_rows_of(kCall, "o", call.o, scaled ? 1 : 2);
    check_row_unit(kCall, "head_dim_v", call.head_dim_v);
    if (!scaled) {
        require(element_bytes(info.tma[0].element_type) != 1 || call.o_type == ElementType::kFloat16 ||
                    call.o_type == ElementType::kBfloat16,
                "forward: o_type is ", static_cast<std::uint32_t>(call.o_type),
                "; supported are FLOAT16 and BFLOAT16");
        require(scale.ptr == nullptr && scale.given == nullptr,
                "forward: out_scale is given; this kernel writes o of 16 bits");
        return;
    }
    require(call.o_type == ElementType::kUint8, "forward: o_type is ",
            static_cast<std::uint32_t>(call.o_type), "; this kernel writes e4m3, UINT8");
    require(call.head_dim_v == info.kHeadDimV, "forward: head_dim_v is ", call.head_dim_v,
            "; this kernel writes e4m3 with a head_dim_v of ", info.kHeadDimV);
    require((scale.ptr == nullptr) != (scale.given == nullptr), "forward: out_scale has ",
            scale.ptr == nullptr ? "neither" : "both",
            " a place for scales and a given one; o of e4m3 needs one of them");
    const std::int64_t scales = std::int64_t{call.heads_q} * (call.head_dim_v / kOutScaleChannels);
    require(scale.ptr == nullptr || scale.row_stride >= scales, "forward: the row stride of out_scale is ",
            scale.row_stride, "; a row has ", scales, " scales");
}

// What TMA would be told of these pages: lanes copy 16 bytes of a row at a time.
void check_gathered(const char* name, const TensorRef& cache, std::int64_t channels, int element) {
    const std::int64_t unit = kCopyBytes / element;
    const auto address = reinterpret_cast<std::uintptr_t>(cache.ptr);
    require(address != 0 && address % kCopyBytes == 0, "forward: ", name, " is at address ", address,
            "; it must be a multiple of ", kCopyBytes, " and not null");
    for (const std::int64_t size : {cache.batch_stride, cache.row_stride, cache.head_stride, channels}) {
        require(size % unit == 0, "forward: a stride or row of ", name, " has ", size,
                " elements; this kernel reads pages by ", kCopyBytes, " bytes");
    }
}

// Whether there is any key to be read. torch gives a tensor without elements no address.
bool has_keys(const SequenceParams& sequences) {
    return sequences.cu_seqlens_k != nullptr ? sequences.total_k > 0
                                             : sequences.batch_k > 0 && sequences.max_seqlen_k > 0;
}

// K and V that lanes of the producer copy by address.
void check_gathered(const ForwardParams& call, int element) {
    check_gathered("k", call.k, call.head_dim, element);
    check_gathered("v", call.v, call.head_dim_v, element);
}

void check_pages(const ForwardParams& call, const KernelInfo& info) {
    const PageParams& pages = call.pages;
    const SequenceParams& sequences = call.sequences;
    const bool widens = info.paged == PageChoice::kWidenedKeys;
    if (widens && has_keys(sequences)) {
        check_gathered(call, 1);
    }
    const bool paged = widens ? pages.page_table != nullptr : info.paged != PageChoice::kNone;
    require(paged == (pages.page_table != nullptr), "forward: this kernel reads ",
            paged ? "pages, and page_table is null" : "no pages, and page_table is given");
    if (!paged) {
        return;
    }
    require(sequences.cu_seqlens_k == nullptr, "forward: cu_seqlens_k is given with a page_table");
    require(info.paged != PageChoice::kPages || sequences.leftpad_k == nullptr,
            "forward: leftpad_k is given; this kernel reads pages without left padding");
    const bool gathers = info.paged == PageChoice::kGatheredPages;
    const int unit = gathers || widens ? 1 : kBoxRows;
    require(pages.page_size >= 1 && pages.page_size % unit == 0, "forward: page_size is ", pages.page_size,
            "; it must be a positive multiple of ", unit);
    require(pages.num_pages >= 1 && pages.max_pages >= 0, "forward: num_pages is ", pages.num_pages,
            " and max_pages ", pages.max_pages, "; there must be a page, and no negative number of them");
    const std::int64_t room = std::int64_t{pages.page_size} * pages.max_pages;
    require(sequences.max_seqlen_k <= room, "forward: max_seqlen_k is ", sequences.max_seqlen_k,
            "; the pages of a sequence hold ", room, " keys");
    if (gathers) {
        check_gathered(call, element_bytes(info.tma[0].element_type));
    }
}

// Q as (head_dim, ratio, row, KV head, batch); a box holds all query heads of a KV head for as many rows as
// fit a tile.
TensorMap encode_folded_q(const Driver& driver, const KernelInfo& info, const ForwardParams& params,
                          std::int64_t rows, std::int64_t batch) {
    const std::int64_t ratio = params.heads_q / params.heads_kv;
    TmaBox box = info.tma[0];
    TensorRef by_kv_head = params.q;
    // TMA has no stride as large as a product that overflows.
    if (__builtin_mul_overflow(params.q.head_stride, ratio, &by_kv_head.head_stride)) {
        by_kv_head.head_stride = -1;
    }
    TiledTensor tensor =
        tiled(by_kv_head, params.head_dim, rows, params.heads_kv, batch, box.element_type, params.o.ptr);
    tensor.dims.insert(tensor.dims.begin() + 1, ratio);
    tensor.strides.insert(tensor.strides.begin(),
                          ratio == 1 ? 0 : stride_in_bytes(params.q.head_stride, box.element_type));
    settle_strides(tensor);
    box.box[1] = static_cast<std::uint32_t>(ratio);
    box.box[2] = static_cast<std::uint32_t>(info.kBlockM / ratio);
    return encode_tensor_map(driver, tensor, box);
}

void encode_maps(const Driver& driver, const KernelInfo& info, ForwardParams& params) {
    const SequenceParams& sequences = params.sequences;
    const bool packed_q = sequences.cu_seqlens_q != nullptr;
    const bool packed_k = sequences.cu_seqlens_k != nullptr;
    const std::int64_t rows_q = packed_q ? sequences.total_q : sequences.max_seqlen_q;
    const std::int64_t rows_k = packed_k ? sequences.total_k : sequences.max_seqlen_k;
    const std::int64_t batch_q = packed_q ? 1 : sequences.batch;
    const std::int64_t batch_k = packed_k ? 1 : sequences.batch_k;
    const auto encode = [&](const TensorRef& ref, std::int64_t head_dim, std::int64_t rows,
                            std::int64_t heads, std::int64_t batch, const TmaBox& box) {
        return encode_tensor_map(
            driver, tiled(ref, head_dim, rows, heads, batch, box.element_type, params.o.ptr), box);
    };
    if (info.pack_gqa) {
        params.tma_q = encode_folded_q(driver, info, params, rows_q, batch_q);
    } else {
        params.tma_q = encode(params.q, params.head_dim, rows_q, params.heads_q, batch_q, info.tma[0]);
    }
    if (info.paged == PageChoice::kWidenedKeys && params.pages.page_table == nullptr) {
        params.pages.num_pages = static_cast<std::int32_t>(batch_k);  // a page is a sequence
        return;
    }
    if (info.paged != PageChoice::kNone) {
        PageParams& pages = params.pages;
        // A tile is of boxes that no page boundary cuts.
        pages.box_rows = std::gcd(pages.page_size, info.kBlockN);
        divide_by_page_size(pages);
        if (info.paged == PageChoice::kGatheredPages || info.paged == PageChoice::kWidenedKeys) {
            return;
        }
        const auto encode_cache = [&](const TensorRef& ref, std::int64_t head_dim, const TmaBox& box) {
            return encode_pages(driver, ref, head_dim, params.heads_kv, pages, box, params.o.ptr);
        };
        params.tma_k = encode_cache(params.k, params.head_dim, info.tma[1]);
        params.tma_v = encode_cache(params.v, params.head_dim_v, info.tma[2]);
        return;
    }
    params.tma_k = encode(params.k, params.head_dim, rows_k, params.heads_kv, batch_k, info.tma[1]);
    if (info.v_colmajor) {
        const std::int64_t keys = kScaleBlock * (packed_k ? sequences.total_k / kScaleBlock + sequences.batch
                                                          : (rows_k + kScaleBlock - 1) / kScaleBlock);
        const std::int64_t channels = keys == 0 ? 0 : params.head_dim_v;
        params.tma_v =
            encode(params.v, keys == 0 ? kScaleBlock : keys, channels, params.heads_kv, batch_k, info.tma[2]);
    } else {
        params.tma_v = encode(params.v, params.head_dim_v, rows_k, params.heads_kv, batch_k, info.tma[2]);
    }
}

// The kernels count rows in 32 bits.
void check_rows(const ForwardParams& call, const KernelInfo& info) {
    const SequenceParams& sequences = call.sequences;
    const std::int64_t ratio = info.pack_gqa ? call.heads_q / call.heads_kv : 1;
    const std::int64_t rows_q = sequences.cu_seqlens_q ? sequences.total_q : sequences.max_seqlen_q;
    const std::int64_t rows_k = sequences.cu_seqlens_k ? sequences.total_k : sequences.max_seqlen_k;
    require(rows_q + rows_k <= kMaxRows && rows_q * ratio <= kMaxRows, "forward: q has ", rows_q, " rows of ",
            ratio, " folded heads and k has ", rows_k, "; supported are less than 2^31 in all");
    const std::int64_t blocks =
        sequences.cu_seqlens_k ? sequences.total_k / kScaleBlock + sequences.batch : 0;
    require(info.v_colmajor == 0 || blocks * kScaleBlock <= kMaxRows, "forward: v_colmajor has ", blocks,
            " blocks of ", kScaleBlock, " keys; supported are less than 2^31 keys");
}

// The blocks of rows of a cluster, and the heads that tiles are made of: of all query heads, or of the KV
// heads with their query heads folded into the rows.
struct TileCounts {
    std::int64_t max_m_blocks;  // of the longest sequence
    std::int64_t heads;
    std::int64_t tiles;  // of packed sequences, whose lengths only the device knows, a bound
};

TileCounts count_tiles(const ForwardParams& call, const KernelInfo& info) {
    const SequenceParams& sequences = call.sequences;
    const std::int64_t rows_per_query = info.pack_gqa ? call.heads_q / call.heads_kv : 1;
    const std::int64_t heads = info.pack_gqa ? call.heads_kv : call.heads_q;
    const std::int64_t block = std::int64_t{info.kBlockM} * info.cluster[0];
    const auto full_blocks = [&](std::int64_t rows) { return rows * rows_per_query / block; };
    const std::int64_t max_m_blocks = full_blocks(sequences.max_seqlen_q + block / rows_per_query - 1);
    const std::int64_t packed = full_blocks(sequences.total_q) + sequences.batch;
    const std::int64_t blocks = sequences.cu_seqlens_q ? packed : max_m_blocks * sequences.batch;
    require(blocks <= kMaxTiles / heads && max_m_blocks <= kMaxTiles,
            "forward: there are more than 2^31 - 2^20 tiles of queries");
    return {max_m_blocks, heads, blocks * heads};
}

}  // namespace

void launch_forward(Kernel& kernel, int device, std::uint64_t stream, const ForwardParams& call,
                    int sm_margin) {
    check_kernel(kernel);
    const KernelInfo& info = *kernel.info();
    check_heads(kCall, {call.heads_q, call.heads_kv, call.head_dim, call.head_dim_v}, info);
    check_folding(call, info);
    check_sequences(kCall, call.sequences);
    check_pages(call, info);
    require(sm_margin >= 0, "forward: sm_margin is ", sm_margin, "; it must not be negative");
    const bool packed = call.sequences.cu_seqlens_q != nullptr;
    if (packed ? call.sequences.total_q == 0
               : call.sequences.max_seqlen_q == 0 || call.sequences.batch == 0) {
        return;
    }
    check_rows(call, info);
    const TileCounts counts = count_tiles(call, info);
    check_output(call, info);
    check_descales(call, info);

    ForwardParams params = call;
    encode_maps(kernel.driver(), info, params);
    params.scores.softmax_scale_log2 = call.scores.softmax_scale * kLog2E;
    const int multiprocessors = kernel.driver().primary(device).multiprocessors;
    const int cluster = info.cluster[0];
    const std::int64_t ctas =
        cluster *
        std::clamp<std::int64_t>(counts.tiles, 1, std::max(1, (multiprocessors - sm_margin) / cluster));
    SchedulerParams& scheduler = params.scheduler;
    scheduler.max_m_blocks = static_cast<std::int32_t>(counts.max_m_blocks);
    scheduler.heads_per_section = static_cast<std::int32_t>(std::clamp<std::int64_t>(
        scheduler.heads_per_section, 1, std::max<std::int64_t>(1, counts.heads * call.sequences.batch)));
    scheduler.num_ctas = static_cast<std::int32_t>(ctas);
    launch(kernel, device, stream, shape_of(info, {ctas, 1, 1}), {{&params, sizeof(params)}});
}

}  // namespace flash8

#include "kernels/launch_backward.h"

#include <algorithm>

#include "driver/launch.h"
#include "driver/require.h"
#include "driver/tensor_map.h"
#include "kernels/attention_checks.h"

namespace flash8 {

namespace {

constexpr const char* kCall = "backward";

// The sizes that tensors have on both sides, and the blocks that CTAs work on.
struct Extent {
    std::int64_t rows_q;  // of a sequence, or of all packed ones
    std::int64_t rows_k;
    std::int64_t batch_q;  // of the tensors: 1 when packed
    std::int64_t batch_k;
    std::int64_t max_m_blocks;  // of the longest sequence
    std::int64_t max_n_blocks;
    std::int64_t query_blocks;  // of a head, over all sequences
    std::int64_t key_blocks;

    bool has_queries() const { return rows_q > 0 && batch_q > 0; }
    bool has_keys() const { return rows_k > 0 && batch_k > 0; }
};

Extent extent_of(const SequenceParams& sequences, const KernelInfo& info) {
    const bool packed_q = sequences.cu_seqlens_q != nullptr;
    const bool packed_k = sequences.cu_seqlens_k != nullptr;
    const std::int64_t batch = sequences.batch;
    const auto blocks = [](std::int64_t rows, std::int64_t block) { return (rows + block - 1) / block; };
    Extent extent{};
    extent.rows_q = packed_q ? sequences.total_q : sequences.max_seqlen_q;
    extent.rows_k = packed_k ? sequences.total_k : sequences.max_seqlen_k;
    extent.batch_q = packed_q ? 1 : batch;
    extent.batch_k = packed_k ? 1 : batch;
    extent.max_m_blocks = blocks(sequences.max_seqlen_q, info.kBlockM);
    extent.max_n_blocks = blocks(sequences.max_seqlen_k, info.kBlockN);
    extent.query_blocks = packed_q ? sequences.total_q / info.kBlockM + batch : batch * extent.max_m_blocks;
    extent.key_blocks = packed_k ? sequences.total_k / info.kBlockN + batch : batch * extent.max_n_blocks;
    return extent;
}

void check_kernel(const Kernel& kernel, KernelKind kind, const char* what) {
    require(kernel.info().has_value(), "backward: ", kernel.name(), " exports no kernel_info");
    require(kernel.info()->kind == kind, "backward: ", kernel.name(), " is not a ", what);
}

bool is_fp8(const KernelInfo& info) {
    return info.scale_block > 0;
}

// `kernel` works on the blocks of the backward kernel.
void check_tiles(const Kernel& kernel, const KernelInfo& wanted) {
    const KernelInfo& info = *kernel.info();
    const auto check = [&](const char* name, std::int32_t found, std::int32_t value) {
        require(found == value, "backward: ", kernel.name(), " is compiled for a ", name, " of ", found,
                ", the backward kernel for ", value);
    };
    check("kBlockM", info.kBlockM, wanted.kBlockM);
    check("kBlockN", info.kBlockN, wanted.kBlockN);
    check("kHeadDim", info.kHeadDim, wanted.kHeadDim);
    check("kHeadDimV", info.kHeadDimV, wanted.kHeadDimV);
    check("scale_block", info.scale_block, wanted.scale_block);
}

void check_fp8(const BackwardParams& call, const KernelInfo& info) {
    if (!is_fp8(info)) {
        require(call.q_descale.ptr == nullptr && call.k_descale.ptr == nullptr &&
                    call.v_descale.ptr == nullptr && call.v_mean.ptr == nullptr,
                "backward: descales or v_mean are given; this kernel is for 16-bit inputs");
        return;
    }
    const auto check = [](const char* name, std::int32_t width) {
        require(width % 16 == 0, "backward: ", name, " is ", width,
                " elements of 8 bits; it must be a multiple of 16");
    };
    check("head_dim", call.head_dim);
    check("head_dim_v", call.head_dim_v);
    const std::int32_t group = call.heads_q / call.heads_kv;
    require(call.heads_per_q_descale == 1 || call.heads_per_q_descale == group,
            "backward: heads_per_q_descale is ", call.heads_per_q_descale, "; supported are 1 and ", group,
            ", the query heads of a KV head");
    require(call.k_mean.ptr == nullptr || call.scores.softcap == 0.0f,
            "backward: k_mean is given with softcap; a shift of a row's scores does not cancel then");
}

// Preprocess reads 16 values of Q and of K at a time.
void check_fp8_rows(const BackwardParams& call, const Extent& extent) {
    const auto check = [](const char* name, const TensorRef& tensor) {
        const bool fits = reinterpret_cast<std::uintptr_t>(tensor.ptr) % 16 == 0 && tensor.ptr != nullptr &&
                          tensor.batch_stride % 16 == 0 && tensor.row_stride % 16 == 0 &&
                          tensor.head_stride % 16 == 0;
        require(fits, "backward: ", name, " must have an address and strides that are multiples of 16 bytes");
    };
    if (extent.has_queries()) {
        check("q", call.q);
    }
    if (extent.has_keys()) {
        check("k", call.k);
    }
}

// 0 is 1.
std::int32_t head_splits(const BackwardParams& call) {
    return std::max(call.head_splits, 1);
}

void check_sizes(const BackwardParams& call, const KernelInfo& info) {
    check_heads(kCall, {call.heads_q, call.heads_kv, call.head_dim, call.head_dim_v}, info);
    check_row_unit(kCall, "head_dim", call.head_dim);
    check_row_unit(kCall, "head_dim_v", call.head_dim_v);
    const std::int32_t group = call.heads_q / call.heads_kv;
    require(call.head_splits >= 0 && call.head_splits <= group, "backward: head_splits is ", call.head_splits,
            "; supported are 0 to ", group, ", the query heads of a KV head");
    check_fp8(call, info);
    const SequenceParams& sequences = call.sequences;
    check_sequences(kCall, sequences);
    require(sequences.leftpad_k == nullptr, "backward: leftpad_k is given; it is not supported");
    require(sequences.kv_batch_idx == nullptr, "backward: kv_batch_idx is given; it is not supported");
    const bool packed_k = sequences.cu_seqlens_k != nullptr;
    require(packed_k || sequences.batch_k == sequences.batch, "backward: batch_k is ", sequences.batch_k,
            "; it must be batch, ", sequences.batch);
    const Extent extent = extent_of(sequences, info);
    require(extent.rows_q + extent.rows_k <= kMaxRows, "backward: q has ", extent.rows_q, " rows and k has ",
            extent.rows_k, "; supported are less than 2^31 in all");
    require(extent.query_blocks <= kMaxTiles / call.heads_q && extent.max_m_blocks <= kMaxTiles,
            "backward: there are more than 2^31 - 2^20 tiles of queries");
    const std::int64_t splits = head_splits(call);
    require(extent.key_blocks <= kMaxTiles / (call.heads_kv * splits) && extent.max_n_blocks <= kMaxTiles,
            "backward: there are more than 2^31 - 2^20 tiles of keys");
    const std::int64_t sums = splits > 1 ? call.heads_kv * extent.key_blocks : 0;
    require(call.heads_q * extent.query_blocks <= kMaxTiles - sums,
            "backward: there are more than 2^31 - 2^20 tiles of queries and keys");
}

void check_tensors(const BackwardParams& call, const Extent& extent) {
    if (extent.has_queries()) {
        check_rows_of(kCall, "o", call.o);
        check_rows_of(kCall, "dout", call.dout);
        check_rows_of(kCall, "dq", call.dq);
        require(call.lse.ptr != nullptr, "backward: lse is null; the backward needs it");
    }
    if (extent.has_keys()) {
        check_rows_of(kCall, "dk", call.dk);
        check_rows_of(kCall, "dv", call.dv);
    }
    require(call.dsinks == nullptr || call.scores.sinks != nullptr,
            "backward: dsinks is given without sinks");
}

void check_workspace(const BackwardParams& call, const BackwardWorkspace& workspace) {
    const auto check = [](const char* name, const void* pointer, std::int64_t bytes) {
        const auto address = reinterpret_cast<std::uintptr_t>(pointer);
        require(bytes == 0 || (address != 0 && address % kWorkspaceUnit == 0), "backward: ", name,
                " is at address ", address, "; it must be a multiple of ", kWorkspaceUnit, " and not null");
    };
    check("row_stats", call.row_stats, workspace.row_stats);
    check("dq_accum", call.dq_accum, workspace.dq_accum);
    check("dq_semaphore", call.dq_semaphore, workspace.dq_semaphore);
    check("dsinks_partial", call.dsinks_partial, workspace.dsinks_partial);
    check("dkv_partial", call.dkv_partial, workspace.dkv_partial);
    check("q16", call.q16, workspace.q16);
    check("key_mean", call.key_mean, workspace.key_mean);
    require(call.dsinks != nullptr || call.dsinks_partial == nullptr,
            "backward: dsinks_partial is given without dsinks");
}

BackwardWorkspace workspace_of(const BackwardParams& call, const Extent& extent, const KernelInfo& info) {
    const std::int64_t blocks = call.heads_q * extent.query_blocks;
    constexpr std::int64_t kWord = 4;  // of all parts. There are less than 2^31 blocks: nothing overflows
    const std::int64_t splits = head_splits(call);
    const std::int64_t key_blocks = splits > 1 ? call.heads_kv * extent.key_blocks * splits : 0;
    const std::int64_t elements = blocks * info.kBlockM * info.kHeadDim;
    const std::int64_t stats = is_fp8(info) ? 3 * info.kBlockM + 4 : 2 * info.kBlockM;
    BackwardWorkspace workspace{};
    workspace.row_stats = kWord * blocks * stats;
    workspace.dq_accum = kWord * elements;
    workspace.dq_semaphore = kWord * blocks;
    workspace.dsinks_partial = call.dsinks != nullptr ? kWord * blocks : 0;
    workspace.dkv_partial = kWord * key_blocks * info.kBlockN * (info.kHeadDim + info.kHeadDimV);
    if (is_fp8(info) && blocks > 0) {
        workspace.q16 = 2 * elements;
        workspace.key_mean = kWord * call.sequences.batch * call.heads_kv * info.kHeadDim;
    }
    return workspace;
}

void encode_maps(const Driver& driver, const KernelInfo& info, const Extent& extent, BackwardParams& params) {
    const void* const somewhere = extent.has_queries() ? params.dq.ptr : params.dk.ptr;
    const auto encode = [&](const TensorRef& ref, std::int64_t head_dim, bool of_queries, const TmaBox& box) {
        return encode_tensor_map(
            driver,
            tiled(ref, head_dim, of_queries ? extent.rows_q : extent.rows_k,
                  of_queries ? params.heads_q : params.heads_kv, of_queries ? extent.batch_q : extent.batch_k,
                  box.element_type, somewhere),
            box);
    };
    params.tma_q = encode(params.q, params.head_dim, true, info.tma[0]);
    params.tma_k = encode(params.k, params.head_dim, false, info.tma[1]);
    params.tma_v = encode(params.v, params.head_dim_v, false, info.tma[2]);
    params.tma_dout = encode(params.dout, params.head_dim_v, true, info.tma[3]);
}

// What follows from the call and the kernel.
BackwardParams complete(const BackwardParams& call, const Extent& extent) {
    BackwardParams params = call;
    params.scores.softmax_scale_log2 = call.scores.softmax_scale * kLog2E;
    params.scheduler = {};
    params.scheduler.max_m_blocks = static_cast<std::int32_t>(extent.max_m_blocks);
    params.head_splits = head_splits(call);
    // The sections are of splits of KV heads for one kernel and of query heads for the others.
    const std::int64_t heads =
        std::int64_t{call.heads_kv} * params.head_splits * std::int64_t{call.sequences.batch};
    params.scheduler.heads_per_section = static_cast<std::int32_t>(
        std::clamp<std::int64_t>(call.scheduler.heads_per_section, 1, std::max<std::int64_t>(1, heads)));
    params.query_blocks = extent.query_blocks;
    params.key_blocks = extent.key_blocks;
    params.max_n_blocks = static_cast<std::int32_t>(extent.max_n_blocks);
    params.zero = 0;
    return params;
}

}  // namespace

BackwardWorkspace backward_workspace(const Kernel& kernel, const BackwardParams& call) {
    check_kernel(kernel, KernelKind::kBackward, "backward kernel");
    check_sizes(call, *kernel.info());
    return workspace_of(call, extent_of(call.sequences, *kernel.info()), *kernel.info());
}

void launch_backward(const BackwardKernels& kernels, int device, std::uint64_t stream,
                     const BackwardParams& call) {
    check_kernel(kernels.kernel, KernelKind::kBackward, "backward kernel");
    check_kernel(kernels.preprocess, KernelKind::kBackwardPreprocess, "preprocess kernel of the backward");
    check_kernel(kernels.postprocess, KernelKind::kBackwardPostprocess, "postprocess kernel of the backward");
    const KernelInfo& info = *kernels.kernel.info();
    check_tiles(kernels.preprocess, info);
    check_tiles(kernels.postprocess, info);
    check_sizes(call, info);
    const Extent extent = extent_of(call.sequences, info);
    if (!extent.has_queries() && !extent.has_keys()) {
        return;
    }
    check_tensors(call, extent);
    if (is_fp8(info)) {
        check_fp8_rows(call, extent);
    }
    check_workspace(call, workspace_of(call, extent, info));

    BackwardParams params = complete(call, extent);
    encode_maps(kernels.kernel.driver(), info, extent, params);
    const auto enqueue = [&](Kernel& kernel, std::int64_t ctas) {
        launch(kernel, device, stream, shape_of(*kernel.info(), {ctas, 1, 1}), {{&params, sizeof(params)}});
    };
    // Without a block of queries there may still be rows of dK and dV to write that belong to no sequence.
    const std::int64_t by_queries = call.heads_q * std::max<std::int64_t>(1, extent.query_blocks);
    enqueue(kernels.preprocess, by_queries);
    const std::int64_t by_keys = call.heads_kv * extent.key_blocks;
    if (by_keys > 0) {
        enqueue(kernels.kernel, by_keys * params.head_splits);
    }
    enqueue(kernels.postprocess, by_queries + (params.head_splits > 1 ? by_keys : 0));
}

}  // namespace flash8

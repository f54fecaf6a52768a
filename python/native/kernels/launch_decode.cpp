#include "kernels/launch_decode.h"

#include <algorithm>
#include <numeric>

#include "driver/launch.h"
#include "driver/require.h"
#include "driver/tensor_map.h"
#include "kernels/attention_checks.h"
#include "kernels/launch_append.h"

namespace flash8 {

namespace {

constexpr const char* kCall = "decode";
constexpr std::int64_t kMaxUnits = std::int64_t{1} << 30;  // of tiles over all units: 32 bits count them
constexpr std::int64_t kUnitBytes = 16;                    // of a cache: what one lane copies
constexpr std::int64_t kWarps = 8;
constexpr std::int64_t kSplitUnit = 64;  // keys: every tile divides them
constexpr std::int32_t kTreeKeys = 32;   // bits of a word

void check_kernel(const Kernel& kernel) {
    require(kernel.info().has_value(), "decode: ", kernel.name(), " exports no kernel_info");
    require(kernel.info()->kind == KernelKind::kDecode, "decode: ", kernel.name(), " is not a decode kernel");
}

bool uses_tma(const KernelInfo& info) {
    return info.tma[0].rank != 0;
}

std::int64_t blocks(std::int64_t rows, std::int64_t block) {
    return (rows + block - 1) / block;
}

void check_sizes(const DecodeParams& call, const KernelInfo& info) {
    check_heads(kCall, {call.heads_q, call.heads_kv, call.head_dim, call.head_dim_v}, info);
    check_row_unit(kCall, "head_dim", call.head_dim);
    check_row_unit(kCall, "head_dim_v", call.head_dim_v);
    const std::int64_t unit = kUnitBytes / element_bytes(info.tma[0].element_type);
    require(call.head_dim % unit == 0 && call.head_dim_v % unit == 0, "decode: head_dim is ", call.head_dim,
            " and head_dim_v ", call.head_dim_v, "; this kernel takes multiples of ", unit);
    const SequenceParams& sequences = call.sequences;
    check_sequences(kCall, sequences);
    require(sequences.cu_seqlens_k == nullptr, "decode: cu_seqlens_k is given; the keys are a cache's");
    require(call.pages.page_size >= 1, "decode: page_size is ", call.pages.page_size,
            "; it must be positive");
    require(call.pages.num_pages >= 1, "decode: num_pages is ", call.pages.num_pages,
            "; it must be positive");
    require(call.pages.max_pages >= 0, "decode: max_pages is ", call.pages.max_pages,
            "; it must not be negative");
    const std::int64_t room = call.pages.page_table != nullptr
                                  ? std::int64_t{call.pages.page_size} * call.pages.max_pages
                                  : call.pages.page_size;
    require(sequences.max_seqlen_k <= room, "decode: max_seqlen_k is ", sequences.max_seqlen_k,
            "; the pages of a sequence hold ", room, " keys");
    require(call.split_keys >= 0 && call.split_keys % kSplitUnit == 0, "decode: split_keys is ",
            call.split_keys, "; it must be a multiple of ", kSplitUnit, ", and not negative");
    require(call.tree_mask == nullptr || sequences.max_seqlen_q <= kTreeKeys,
            "decode: tree_mask is given with ", sequences.max_seqlen_q, " rows of q; a word has ", kTreeKeys,
            " bits");
    require(std::int64_t{sequences.max_seqlen_q} + sequences.max_seqlen_k <= kMaxRows, "decode: q has ",
            sequences.max_seqlen_q, " rows and k ", sequences.max_seqlen_k,
            "; supported are less than 2^31 in all");
}

// Tiles, or splits, by the bounds that the host has.
std::int64_t pieces_of_unit(const DecodeParams& call, const KernelInfo& info) {
    return blocks(call.sequences.max_seqlen_k, call.split_keys > 0 ? call.split_keys : info.kBlockN);
}

// The same over all units.
std::int64_t count_pieces(const DecodeParams& call, const KernelInfo& info) {
    const SequenceParams& sequences = call.sequences;
    const std::int64_t rows = std::int64_t{sequences.max_seqlen_q} * (call.heads_q / call.heads_kv);
    require(rows <= kMaxRows, "decode: q has ", rows, " rows of folded heads; supported are less than 2^31");
    const std::int64_t of_unit = pieces_of_unit(call, info);
    std::int64_t units = blocks(rows, info.kBlockM);
    for (const std::int64_t count : {std::int64_t{call.heads_kv}, std::int64_t{sequences.batch}, of_unit}) {
        require(count == 0 || units <= kMaxUnits / count, "decode: there are more than 2^30 tiles of keys");
        units *= count;
    }
    return units;
}

void check_cache(const char* name, const TensorRef& cache, const DecodeParams& call, const KernelInfo& info) {
    const std::int64_t unit = kUnitBytes / element_bytes(info.tma[0].element_type);
    const bool gathers = info.tma[0].rank == 0;  // and counts units in 32 bits
    const auto address = reinterpret_cast<std::uintptr_t>(cache.ptr);
    require(address % kUnitBytes == 0, "decode: ", name, " is at address ", address,
            "; it must be a multiple of ", kUnitBytes);
    std::int64_t last = 0;
    for (const auto& [stride, size] :
         {std::pair{cache.batch_stride, call.pages.num_pages},
          std::pair{cache.row_stride, call.pages.page_size}, std::pair{cache.head_stride, call.heads_kv}}) {
        require(size <= 1 || (stride >= 0 && stride % unit == 0), "decode: a stride of ", name, " is ",
                stride, " elements; it must be a multiple of ", kUnitBytes, " bytes, and not negative");
        std::int64_t step = 0;
        require(!__builtin_mul_overflow(stride, std::max<std::int64_t>(0, std::int64_t{size} - 1), &step) &&
                    !__builtin_add_overflow(last, step, &last) && (!gathers || last / unit < 0xffffffffLL),
                "decode: ", name, " spans more than 2^36 bytes");
    }
}

void check_descale(const char* name, const DescaleRef& descale, std::int32_t rows, const KernelInfo& info) {
    if (rows == 0) {
        require(descale.block_stride == 0, "decode: ", name, " is per tensor or per head, not per block");
        return;
    }
    require(info.scale_block != 0, "decode: this kernel takes no ", name, " by place");
    require(descale.ptr != nullptr, "decode: ", name, " by place is null");
    require(rows > 0 && (rows & (rows - 1)) == 0, "decode: ", rows, " rows share a ", name,
            "; it must be a power of two");
}

void check_tensors(const DecodeParams& call, const KernelInfo& info) {
    check_rows_of(kCall, "q", call.q);
    require((info.qv != 0) == (call.qv.ptr != nullptr), "decode: this kernel ",
            info.qv != 0 ? "takes qv, which is null" : "takes no qv, which is given");
    if (info.qv != 0) {
        check_rows_of(kCall, "qv", call.qv);
        require(call.k_mean.ptr == nullptr && call.v_mean.ptr == nullptr,
                "decode: k_mean or v_mean is given with qv; this kernel takes neither");
    }
    check_rows_of(kCall, "o", call.o);
    check_cache("k", call.k, call, info);
    check_cache("v", call.v, call, info);
    require(!uses_tma(info) || call.pages.page_table == nullptr || call.pages.page_size % kBoxRows == 0,
            "decode: page_size is ", call.pages.page_size, "; this kernel loads pages of a multiple of ",
            kBoxRows, " keys");
    require(call.q_is_e4m3 == 0 ||
                (call.q_is_e4m3 == 1 && info.tma[0].element_type == ElementType::kUint8 && info.qv == 0),
            "decode: q is e4m3; this kernel takes q of 16 bits");
    require(call.q_descale.ptr == nullptr || call.q_is_e4m3 == 1,
            "decode: q_descale is given with a q of 16 bits");
    require(call.q_descale.ptr == nullptr ||
                (call.heads_per_q_descale >= 1 && call.heads_q % call.heads_per_q_descale == 0),
            "decode: ", call.heads_per_q_descale, " of ", call.heads_q, " query heads share a q_descale");
    check_descale("k_descale", call.k_descale, call.k_scale_rows, info);
    check_descale("v_descale", call.v_descale, call.v_scale_rows, info);
}

void check_workspace(const DecodeParams& call) {
    const auto address = reinterpret_cast<std::uintptr_t>(call.partials);
    require(address != 0 && address % kUnitBytes == 0, "decode: partials is at address ", address,
            "; it must be a multiple of ", kUnitBytes, " and not null");
    require(call.tickets != nullptr, "decode: tickets is null");
    const auto metadata = reinterpret_cast<std::uintptr_t>(call.scheduler_metadata);
    require(metadata % sizeof(std::int32_t) == 0, "decode: scheduler_metadata is at address ", metadata,
            "; it must be a multiple of 4");
}

// At least `value`: workspaces are kept, so that there should be few sizes.
std::int64_t power_of_two(std::int64_t value) {
    std::int64_t power = 1;
    while (power < value) {
        power *= 2;
    }
    return power;
}

std::int64_t count_ctas(const Kernel& kernel, int device, const DecodeParams& call, int sm_margin) {
    require(sm_margin >= 0, "decode: sm_margin is ", sm_margin, "; it must not be negative");
    const int multiprocessors = kernel.driver().primary(device).multiprocessors;
    const std::int64_t pieces = count_pieces(call, *kernel.info());
    return std::clamp<std::int64_t>(call.split_keys > 0 ? pieces : blocks(pieces, kWarps), 1,
                                    std::max(1, multiprocessors - sm_margin));
}

void encode_maps(const Driver& driver, const KernelInfo& info, DecodeParams& params) {
    // A tile is of boxes that no page boundary cuts.
    PageParams& pages = params.pages;
    pages.box_rows = pages.page_table == nullptr ? info.kBlockN : std::gcd(pages.page_size, info.kBlockN);
    const auto encode = [&](const TensorRef& ref, std::int64_t head_dim, const TmaBox& box) {
        return encode_pages(driver, ref, head_dim, params.heads_kv, pages, box, params.o.ptr);
    };
    params.tma_k = encode(params.k, params.head_dim, info.tma[0]);
    params.tma_v = encode(params.v, params.head_dim_v, info.tma[1]);
}

// Of the append the caller has given new rows, norms and tables; the rest is as attention has it.
void complete_append(DecodeParams& params) {
    const SequenceParams& sequences = params.sequences;
    const PageParams& pages = params.pages;
    AppendParams& append = params.append;
    auto& [q, k, v] = append.rows;
    append.batch = sequences.batch;
    append.lengths = nullptr;
    append.place = {sequences.seqused_k, pages.page_table, sequences.kv_batch_idx, pages.page_table_stride,
                    sequences.batch_k,   pages.max_pages,  pages.num_pages,        pages.page_size};
    q.x = q.out = params.q;  // it is stored nowhere
    q.cu_seqlens = sequences.cu_seqlens_q;
    q.seqlen = sequences.max_seqlen_q;
    const std::int64_t tokens =
        q.cu_seqlens != nullptr ? sequences.total_q : std::int64_t{sequences.batch} * sequences.max_seqlen_q;
    require(tokens <= kMaxRows, "decode: q has ", tokens, " rows; this kernel takes less than 2^31");
    q.tokens = static_cast<std::int32_t>(tokens);
    k.out = params.k;
    k.mean = params.k_mean;
    k.descale = params.k_descale;
    v.out = params.v;
    v.mean = params.v_mean;
    v.descale = params.v_descale;
    q.heads = params.heads_q;
    k.heads = v.heads = params.heads_kv;
    q.head_dim = k.head_dim = params.head_dim;
    v.head_dim = params.head_dim_v;
    k.descale_by_slot = v.descale_by_slot = 0;
}

void check_new_keys(const DecodeParams& call, const KernelInfo& info) {
    const auto& [q, k, v] = call.append.rows;
    require((info.appends != 0) == (k.x.ptr != nullptr), "decode: this kernel ",
            info.appends != 0 ? "appends new keys, which are null" : "appends no new keys, which are given");
    if (info.appends == 0) {
        return;
    }
    require(call.q_is_e4m3 == 0, "decode: q is e4m3; this kernel normalises and rotates q of 16 bits");
    const std::int64_t rows = std::int64_t{call.sequences.max_seqlen_q} * (call.heads_q / call.heads_kv);
    require(rows <= info.kBlockM, "decode: a KV head has ", rows,
            " rows of q; this kernel appends with up to ", info.kBlockM);
    require(k.tokens == v.tokens && k.seqlen == v.seqlen && k.cu_seqlens == v.cu_seqlens,
            "decode: there are ", k.tokens, " new rows of k and ", v.tokens,
            " of v, or not in the same sequences");
    require(k.cu_seqlens != nullptr || k.tokens == std::int64_t{call.sequences.batch} * k.seqlen,
            "decode: there are ", k.tokens, " new rows in ", call.sequences.batch, " dense sequences of ",
            k.seqlen);
    check_append(call.append);
    const std::int64_t eights = (k.head_dim + v.head_dim) / 8;
    require(k.tokens * eights * call.heads_kv <= kMaxUnits,
            "decode: there are more than 2^30 eights of channels of new keys");
}

bool has_rows(const SequenceParams& sequences) {
    const bool packed = sequences.cu_seqlens_q != nullptr;
    return packed ? sequences.total_q > 0 : sequences.batch > 0 && sequences.max_seqlen_q > 0;
}

}  // namespace

DecodeWorkspace decode_workspace(const Kernel& kernel, int device, const DecodeParams& call, int sm_margin) {
    check_kernel(kernel);
    const KernelInfo& info = *kernel.info();
    check_sizes(call, info);
    const std::int64_t ctas = count_ctas(kernel, device, call, sm_margin);
    constexpr std::int64_t kWord = 4;
    // A unit of one split is no partial result.
    const bool has_parts = pieces_of_unit(call, info) > 1;
    const std::int64_t splits = has_parts ? power_of_two(count_pieces(call, info)) : 1;
    const std::int64_t parts = call.split_keys > 0 ? splits : 2 * ctas;
    return {kWord * parts * info.kBlockM * (info.kHeadDimV + 2), kWord * ctas};
}

void launch_decode(Kernel& kernel, int device, std::uint64_t stream, const DecodeParams& call,
                   int sm_margin) {
    check_kernel(kernel);
    const KernelInfo& info = *kernel.info();
    check_sizes(call, info);
    const std::int64_t ctas = count_ctas(kernel, device, call, sm_margin);
    if (!has_rows(call.sequences)) {
        require(info.appends == 0, "decode: there is no row of q; this kernel appends new keys with one");
        return;
    }
    check_tensors(call, info);
    check_workspace(call);
    DecodeParams params = call;
    if (info.appends != 0) {
        complete_append(params);
    }
    check_new_keys(params, info);
    divide_by_page_size(params.pages);
    if (uses_tma(info)) {
        encode_maps(kernel.driver(), info, params);
    }
    launch(kernel, device, stream, shape_of(info, {ctas, 1, 1}), {{&params, sizeof(params)}});
}

}  // namespace flash8

#include "kernels/attention_checks.h"

#include <string>

#include "driver/require.h"

namespace flash8 {

namespace {

constexpr std::int64_t kAccessBytes = 16;

}  // namespace

void check_heads(const char* call, const HeadCounts& heads, const KernelInfo& info) {
    require(heads.heads_kv >= 1, call, ": heads_kv is ", heads.heads_kv, "; it must be positive");
    require(heads.heads_q >= 1 && heads.heads_q % heads.heads_kv == 0, call, ": heads_q is ", heads.heads_q,
            "; it must be a multiple of heads_kv, ", heads.heads_kv);
    require(heads.head_dim >= 1 && heads.head_dim <= info.kHeadDim, call, ": head_dim is ", heads.head_dim,
            "; this kernel supports 1 to ", info.kHeadDim);
    require(heads.head_dim_v >= 1 && heads.head_dim_v <= info.kHeadDimV, call, ": head_dim_v is ",
            heads.head_dim_v, "; this kernel supports 1 to ", info.kHeadDimV);
}

void check_sequences(const char* call, const SequenceParams& sequences) {
    const auto check = [&](const char* name, std::int64_t value) {
        require(value >= 0 && value < (std::int64_t{1} << 31), call, ": ", name, " is ", value,
                "; supported are 0 to 2^31 - 1");
    };
    check("batch", sequences.batch);
    check("batch_k", sequences.batch_k);
    check("max_seqlen_q", sequences.max_seqlen_q);
    check("max_seqlen_k", sequences.max_seqlen_k);
    check("total_q", sequences.total_q);
    check("total_k", sequences.total_k);
}

void check_row_unit(const char* call, const char* name, std::int64_t value, int element_bytes) {
    require(value % (kAccessBytes / element_bytes) == 0, call, ": ", name, " is ", value,
            " elements; it must be a multiple of ", kAccessBytes, " bytes");
}

void check_rows_of(const char* call, const char* name, const TensorRef& tensor, int element_bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.ptr);
    require(address != 0 && address % kAccessBytes == 0, call, ": ", name, " is at address ", address,
            "; it must be a multiple of ", kAccessBytes, " and not null");
    const auto check = [&](const char* which, std::int64_t stride) {
        if (stride % (kAccessBytes / element_bytes) != 0) {
            check_row_unit(call, (std::string("the ") + which + " stride of " + name).c_str(), stride,
                           element_bytes);
        }
    };
    check("batch", tensor.batch_stride);
    check("row", tensor.row_stride);
    check("head", tensor.head_stride);
}

void divide_by_page_size(PageParams& pages) {
    int bits = 0;
    while ((std::int64_t{1} << bits) < pages.page_size) {
        ++bits;
    }
    const std::uint64_t size = static_cast<std::uint64_t>(pages.page_size);
    pages.page_multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << (31 + bits)) + size - 1) / size);
    pages.page_shift = 31 + bits;
}

TiledTensor tiled(const TensorRef& ref, std::int64_t head_dim, std::int64_t rows, std::int64_t heads,
                  std::int64_t batch, ElementType type, const void* somewhere) {
    const bool empty = rows == 0 || batch == 0;
    const void* address = empty ? somewhere : ref.ptr;
    if (empty) {
        rows = heads = batch = 1;
    }
    const auto stride = [&](std::int64_t dim, std::int64_t elements) {
        return dim == 1 ? 0 : stride_in_bytes(elements, type);  // settled below
    };
    TiledTensor tensor{
        type,
        reinterpret_cast<std::uintptr_t>(address),
        {head_dim, rows, heads, batch},
        {stride(rows, ref.row_stride), stride(heads, ref.head_stride), stride(batch, ref.batch_stride)}};
    settle_strides(tensor);
    return tensor;
}

TensorMap encode_pages(const Driver& driver, const TensorRef& ref, std::int64_t head_dim, std::int64_t heads,
                       const PageParams& pages, TmaBox box, const void* somewhere) {
    box.box[1] = static_cast<std::uint32_t>(pages.box_rows);
    return encode_tensor_map(
        driver, tiled(ref, head_dim, pages.page_size, heads, pages.num_pages, box.element_type, somewhere),
        box);
}

}  // namespace flash8

#include "kernels/launch_qkv.h"

#include "driver/launch.h"
#include "driver/require.h"
#include "kernels/launch_gemm.h"

namespace flash8 {

namespace {

constexpr std::int64_t kMost = (std::int64_t{1} << 31) - (1 << 20);
constexpr std::int64_t kAccessBytes = 16;
constexpr std::int64_t kTableBytes = 8;  // two neighbouring values
constexpr std::int64_t kUnitRotary = 16;

void check_kernel(const Kernel& kernel) {
    require(kernel.info().has_value(), "qkv: ", kernel.name(), " exports no kernel_info");
    require(kernel.info()->kind == KernelKind::kQkvProjection, "qkv: ", kernel.name(),
            " is no QKV projection");
}

void check_sizes(const QkvParams& call, const KernelInfo& info) {
    const auto check = [](const char* name, std::int64_t value, std::int64_t least) {
        require(value >= least && value <= kMost, "qkv: ", name, " is ", value, "; supported are ", least,
                " to 2^31 - 2^20");
    };
    check("batch", call.batch, 0);
    check("seqlen", call.seqlen, 0);
    check("heads_q", call.heads_q, 1);
    check("heads_kv", call.heads_kv, 1);
    const std::int64_t columns = (call.heads_q + 2 * std::int64_t{call.heads_kv}) * info.kHeadDim;
    require(call.gemm.n == columns, "qkv: n is ", call.gemm.n, "; the heads have ", columns, " columns");
    const std::int64_t rows = std::int64_t{call.batch} * call.seqlen;
    require(call.cu_seqlens != nullptr || call.gemm.m == rows, "qkv: m is ", call.gemm.m, "; there are ",
            rows, " tokens");
    require(call.gemm.groups == 0, "qkv: groups is ", call.gemm.groups, "; there is one weight");
}

void check_aligned(const char* name, const void* pointer, std::int64_t unit) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    require(address != 0 && address % static_cast<std::uintptr_t>(unit) == 0, "qkv: ", name,
            " is at address ", address, "; it must be a multiple of ", unit, " and not null");
}

void check_outputs(const QkvParams& call) {
    const auto check = [](const char* name, const TensorRef& ref, const GroupRef& descale) {
        check_aligned(name, ref.ptr, kAccessBytes);
        for (const std::int64_t stride : {ref.batch_stride, ref.row_stride, ref.head_stride}) {
            require(stride >= 0 && stride % kAccessBytes == 0, "qkv: a stride of ", name, " is ", stride,
                    " elements; it must be a multiple of ", kAccessBytes, " and not negative");
        }
        check_aligned("a descale", descale.ptr, sizeof(float));
    };
    check("q", call.q, call.q_descale);
    check("k", call.k, call.k_descale);
    check("v", call.v, call.v_descale);
}

void check_steps(const QkvParams& call, const KernelInfo& info) {
    for (const float* weight : {call.q_norm, call.k_norm}) {
        if (weight != nullptr) {
            check_aligned("the weight of a norm", weight, kTableBytes);
        }
    }
    if (call.rope_cos == nullptr) {
        return;
    }
    check_aligned("rope_cos", call.rope_cos, kTableBytes);
    check_aligned("rope_sin", call.rope_sin, kTableBytes);
    require(call.rope_rows >= 1, "qkv: rope_rows is ", call.rope_rows, "; the tables need a row");
    const std::int64_t dim = call.rotary_dim;
    const bool fits = call.interleaved != 0
                          ? dim >= kUnitRotary && dim % kUnitRotary == 0 && dim <= info.kHeadDim
                          : dim == info.kHeadDim;
    require(fits, "qkv: rotary_dim is ", dim, "; supported are all ", info.kHeadDim,
            " channels, and interleaved the multiples of ", kUnitRotary, " up to that");
}

// Blocks of tokens over all sequences.
std::int64_t blocks_of(const QkvParams& call, std::int64_t block) {
    if (call.cu_seqlens != nullptr) {
        return call.gemm.m / block + call.batch;
    }
    return call.batch * ((call.seqlen + block - 1) / block);
}

}  // namespace

void launch_qkv(Kernel& kernel, int device, std::uint64_t stream, const QkvParams& call) {
    check_kernel(kernel);
    const KernelInfo& info = *kernel.info();
    check_sizes(call, info);
    check_gemm_operands(call.gemm, info);
    if (call.gemm.m == 0 || call.batch == 0) {
        return;
    }
    check_outputs(call);
    check_steps(call, info);
    const std::int64_t blocks = blocks_of(call, info.kBlockM);
    // Tokens are counted in 32 bits up to the end of the last block.
    require(blocks <= kMost / info.kBlockM, "qkv: there are ", blocks, " blocks of tokens; supported are ",
            kMost / info.kBlockM);
    QkvParams params = call;
    const std::int64_t heads = call.heads_q + 2 * std::int64_t{call.heads_kv};
    const std::int64_t ctas = prepare_gemm_tiles(kernel, device, blocks, heads, params.gemm);
    launch(kernel, device, stream, shape_of(info, {ctas, 1, 1}), {{&params, sizeof(params)}});
}

}  // namespace flash8

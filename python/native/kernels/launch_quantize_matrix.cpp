#include "kernels/launch_quantize_matrix.h"

#include "driver/launch.h"
#include "driver/require.h"

namespace flash8 {

namespace {

// Columns are counted in 32 bits up to the end of the last span, and rows up to that of the last CTA.
constexpr std::int64_t kMost = (std::int64_t{1} << 31) - (1 << 20);
constexpr std::int64_t kColumns = 16;  // of a chunk
constexpr std::int64_t kLeastRowThreads = kScaleBlock / kColumns;
constexpr std::int64_t kAccessBytes = 16;
constexpr std::int64_t kAccessElements = 8;  // 16 bytes of the 16-bit types, twice that of fp32

void check_kernel(const Kernel& kernel) {
    require(kernel.info().has_value(), "quantize_matrix: ", kernel.name(), " exports no kernel_info");
    const KernelKind kind = kernel.info()->kind;
    require(kind >= KernelKind::kQuantizeMatrix && kind <= KernelKind::kQuantizeSiluMul,
            "quantize_matrix: ", kernel.name(), " makes no operands of products");
}

void check_sizes(const QuantizeMatrixParams& call, const KernelInfo& info) {
    const auto check = [](const char* name, std::int64_t value) {
        require(value >= 0 && value <= kMost, "quantize_matrix: ", name, " is ", value,
                "; supported are 0 to 2^31 - 2^20");
    };
    check("rows", call.rows);
    check("columns", call.columns);
    const std::int64_t threads = call.row_threads;
    require(threads >= kLeastRowThreads && threads <= info.threads && (threads & (threads - 1)) == 0,
            "quantize_matrix: row_threads is ", threads, "; it must be a power of two from ",
            kLeastRowThreads, " to ", info.threads);
}

std::uintptr_t address_of(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer);
}

void need(const char* name, const void* pointer, std::int64_t unit) {
    require(pointer != nullptr && address_of(pointer) % static_cast<std::uintptr_t>(unit) == 0,
            "quantize_matrix: ", name, " is at address ", address_of(pointer), "; it must be a multiple of ",
            unit, " and not null");
}

void check_pointers(const QuantizeMatrixParams& call, KernelKind kind) {
    constexpr std::int64_t kElementBytes = 2;  // at least
    need("x", call.x, kElementBytes);
    need("out", call.out, kAccessBytes);
    need("scale", call.scale, sizeof(float));
    if (kind == KernelKind::kQuantizeSiluMul) {
        need("other", call.other, kElementBytes);
    }
    if (kind == KernelKind::kQuantizeRmsNorm) {
        need("norm_weight", call.norm_weight, kElementBytes);
        require((call.other == nullptr) == (call.sum == nullptr),
                "quantize_matrix: one of other, the residual, and sum is null; they go together");
    }
}

void check_strides(const QuantizeMatrixParams& call) {
    const auto check = [](const char* name, std::int64_t stride) {
        require(stride >= 0, "quantize_matrix: ", name, " is ", stride, "; it must not be negative");
    };
    check("x_stride", call.x_stride);
    check("other_stride", call.other_stride);
    const auto check_written = [&call](const char* name, std::int64_t stride, std::int64_t least) {
        require(call.rows <= 1 || stride >= least, "quantize_matrix: ", name, " is ", stride,
                ", less than a row of ", least);
    };
    const std::int64_t columns = (call.columns + kColumns - 1) / kColumns * kColumns;
    const std::int64_t blocks = (std::int64_t{call.columns} + kScaleBlock - 1) / kScaleBlock;
    check_written("out_stride", call.out_stride, columns);
    require(call.rows <= 1 || call.out_stride % kAccessBytes == 0, "quantize_matrix: out_stride is ",
            call.out_stride, "; it must be a multiple of ", kAccessBytes);
    check_written("scale_stride", call.scale_stride, call.by_row != 0 ? 1 : blocks);
    if (call.sum != nullptr) {
        check_written("sum_stride", call.sum_stride, call.columns);
    }
}

// Null pointers are aligned: what is not there is not in the way.
bool has_vector_access(const QuantizeMatrixParams& call) {
    const auto fits = [&call](const void* pointer, std::int64_t stride) {
        return address_of(pointer) % kAccessBytes == 0 &&
               (pointer == nullptr || call.rows <= 1 || stride % kAccessElements == 0);
    };
    return call.columns % kAccessElements == 0 && fits(call.x, call.x_stride) &&
           fits(call.other, call.other_stride) && fits(call.sum, call.sum_stride) &&
           address_of(call.norm_weight) % kAccessBytes == 0;
}

}  // namespace

void launch_quantize_matrix(Kernel& kernel, int device, std::uint64_t stream,
                            const QuantizeMatrixParams& call) {
    check_kernel(kernel);
    const KernelInfo& info = *kernel.info();
    check_sizes(call, info);
    if (call.rows == 0 || call.columns == 0) {
        return;
    }
    check_pointers(call, info.kind);
    check_strides(call);
    QuantizeMatrixParams params = call;
    params.vector_access = has_vector_access(call) ? 1 : 0;
    const std::int64_t rows_of_cta = info.threads / call.row_threads;
    const std::int64_t ctas = (call.rows + rows_of_cta - 1) / rows_of_cta;
    launch(kernel, device, stream, shape_of(info, {ctas, 1, 1}), {{&params, sizeof(params)}});
}

}  // namespace flash8

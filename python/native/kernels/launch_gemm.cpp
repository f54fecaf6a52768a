#include "kernels/launch_gemm.h"

#include <algorithm>
#include <cmath>

#include "driver/launch.h"
#include "driver/require.h"
#include "driver/tensor_map.h"

namespace flash8 {

namespace {

// Rows and columns are counted in 32 bits up to the end of the last tile, and tiles past the last one by as
// many as there are CTAs.
constexpr std::int64_t kMostRows = (std::int64_t{1} << 31) - (1 << 20);
constexpr std::int64_t kUnitK = 16;  // TMA reads 16 bytes
constexpr std::int64_t kAccessBytes = 16;
constexpr std::int32_t kBlockShift = 7;  // kScaleBlock rows
static_assert(1 << kBlockShift == kScaleBlock);

void check_kernel(const Kernel& kernel) {
    require(kernel.info().has_value(), "gemm: ", kernel.name(), " exports no kernel_info");
    const KernelKind kind = kernel.info()->kind;
    require(kind == KernelKind::kGemm || kind == KernelKind::kGemmGroupedK, "gemm: ", kernel.name(),
            " is not a GEMM kernel");
}

bool is_grouped_along_k(const KernelInfo& info) {
    return info.kind == KernelKind::kGemmGroupedK;
}

bool is_grouped(const KernelInfo& info) {
    return is_grouped_along_k(info) || info.tma[1].rank == kGroupedRank;
}

// Along k every group has m of them.
std::int64_t rows_of_out(const GemmParams& call, const KernelInfo& info) {
    return std::int64_t{call.m} * (is_grouped_along_k(info) ? call.groups : 1);
}

void check_sizes(const GemmParams& call) {
    const auto check = [](const char* name, std::int64_t value) {
        require(value >= 0 && value <= kMostRows, "gemm: ", name, " is ", value,
                "; supported are 0 to 2^31 - 2^20");
    };
    check("m", call.m);
    check("n", call.n);
    check("k", call.k);
    require(call.k >= kUnitK && call.k % kUnitK == 0, "gemm: k is ", call.k,
            "; it must be a positive multiple of ", kUnitK);
}

bool is_wide(ElementType type) {
    return type == ElementType::kFloat16 || type == ElementType::kBfloat16 || type == ElementType::kFloat32;
}

void check_aligned(const char* name, const void* pointer, std::int64_t unit) {
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    require(address != 0 && address % static_cast<std::uintptr_t>(unit) == 0, "gemm: ", name,
            " is at address ", address, "; it must be a multiple of ", unit, " and not null");
}

void check_out(const GemmParams& call, const KernelInfo& info) {
    const bool is_e4m3 = call.out_type == ElementType::kUint8;
    require(is_e4m3 || is_wide(call.out_type), "gemm: out_type is ",
            static_cast<std::uint32_t>(call.out_type),
            "; supported are FLOAT16, BFLOAT16, FLOAT32, and UINT8 for e4m3");
    check_aligned("out", call.out, element_bytes(call.out_type));
    require(rows_of_out(call, info) <= 1 || call.out_stride >= call.n, "gemm: out_stride is ",
            call.out_stride, " elements, less than a row of ", call.n);
    if (call.scale_result != nullptr) {
        require(is_e4m3, "gemm: scale_result is given; it goes with an e4m3 out");
        check_aligned("scale_result", call.scale_result, sizeof(float));
    }
}

void check_bias(const GemmParams& call) {
    if (call.bias != nullptr) {
        require(is_wide(call.bias_type), "gemm: bias_type is ", static_cast<std::uint32_t>(call.bias_type),
                "; supported are FLOAT16, BFLOAT16 and FLOAT32");
        check_aligned("bias", call.bias, element_bytes(call.bias_type));
    }
}

void check_scales(const GemmParams& call, const KernelInfo& info) {
    const auto check = [](const char* name, const ScaleRef& scale) {
        check_aligned(name, scale.ptr, sizeof(float));
        require(scale.row_stride >= 0 && scale.block_stride >= 0, "gemm: the strides of ", name, " are ",
                scale.row_stride, " and ", scale.block_stride, "; they must not be negative");
    };
    // A of 16 bits is quantized by the kernel, which makes its scales.
    if (info.tma[0].element_type == ElementType::kUint8) {
        check("scale_a", call.scale_a);
    } else {
        require(call.scale_a.ptr == nullptr, "gemm: scale_a is given; this kernel makes the scales of a");
    }
    check("scale_b", call.scale_b);
    const std::int32_t shift = call.scale_a_row_shift;
    require(shift == 0 || (shift == kBlockShift && info.scale_block > 0), "gemm: scale_a_row_shift is ",
            shift, info.scale_block > 0 ? "; it must be 0 or 7" : "; this kernel has a scale per row");
}

void check_groups(const GemmParams& call, const KernelInfo& info) {
    require(is_grouped(info) ? call.groups >= 1 : call.groups == 0, "gemm: groups is ", call.groups,
            is_grouped(info) ? "; this kernel takes 1 or more" : "; this kernel knows no groups");
    if (call.groups == 0) {
        return;
    }
    require(call.groups <= kMostRows, "gemm: groups is ", call.groups, "; supported are 1 to 2^31 - 2^20");
    check_aligned("group_rows", call.group_rows, sizeof(std::int32_t));
    require(!is_grouped_along_k(info) || call.rows_per_group == 0, "gemm: rows_per_group is ",
            call.rows_per_group, "; it must be 0, since this kernel's groups lie along k");
    require(rows_of_out(call, info) <= kMostRows, "gemm: out has ", rows_of_out(call, info),
            " rows; supported are 0 to 2^31 - 2^20");
    require(call.rows_per_group == 0 ||
                (call.rows_per_group > 0 && std::int64_t{call.rows_per_group} * call.groups == call.m),
            "gemm: rows_per_group is ", call.rows_per_group, "; it must be 0, or those of ", call.groups,
            " groups be m = ", call.m);
    require(call.scale_a_row_shift == 0, "gemm: scale_a_row_shift is ", call.scale_a_row_shift,
            "; rows of groups share no scales");
    require(call.bias == nullptr, "gemm: bias is given; products of groups have none");
    require(is_wide(call.out_type), "gemm: out_type is ", static_cast<std::uint32_t>(call.out_type),
            "; supported with groups are FLOAT16, BFLOAT16 and FLOAT32");
}

// Of the CTAs that share the K of a tile. Their clusters are of a size that every device grants.
void check_splits(const GemmParams& call, const KernelInfo& info) {
    const std::int32_t splits = call.splits;
    const bool is_one = splits == 0 || splits == 1;
    require(is_one || splits == 2 || splits == 4 || splits == 8, "gemm: splits is ", splits,
            "; supported are 1, 2, 4 and 8");
    require(is_one || splits <= info.max_splits, "gemm: splits is ", splits, "; this kernel has at most ",
            std::max(1, info.max_splits));
}

// (rows, k), contiguous along k; of a map with groups (groups, rows, k).
TensorMap encode(const Driver& driver, const void* matrix, std::int64_t rows, std::int64_t k,
                 std::int64_t stride, const TmaBox& box, std::int64_t groups = 1,
                 std::int64_t group_stride = 0) {
    const std::int64_t row = rows == 1 ? 0 : stride_in_bytes(stride, box.element_type);
    TiledTensor tensor{
        box.element_type, reinterpret_cast<std::uintptr_t>(matrix), {k, rows, 1, 1}, {row, row, row}};
    if (box.rank == kGroupedRank) {
        tensor.dims.push_back(groups);
        tensor.strides.push_back(groups == 1 ? 0 : stride_in_bytes(group_stride, box.element_type));
    }
    settle_strides(tensor);
    return encode_tensor_map(driver, tensor, box);
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}

// Of a block of rows: the CTAs of a cluster that shares B take neighbouring ones.
std::int64_t rows_of_block(const KernelInfo& info) {
    return std::int64_t{info.kBlockM} * info.cluster[0];
}

// The CTAs of a cluster: those that share B, or the K of a tile.
std::int64_t cluster_of(const GemmParams& call, const KernelInfo& info) {
    return std::max<std::int64_t>({1, info.cluster[0], call.splits});
}

// The most blocks of rows that there may be: each group may end with a block that it does not fill. Along k
// they are those of one group.
std::int64_t most_m_blocks(const GemmParams& call, const KernelInfo& info) {
    const std::int64_t rows = rows_of_block(info);
    if (is_grouped_along_k(info)) {
        return ceil_div(call.m, rows);
    }
    if (call.rows_per_group > 0) {
        return call.groups * ceil_div(call.rows_per_group, rows);
    }
    const std::int64_t partial = std::max(0, call.groups - 1);
    return std::min<std::int64_t>(call.m, ceil_div(call.m, rows) + partial);
}

// The rows of a band: the tiles that run at a time are then about a square of out, whose operands are the
// least for its area.
std::int32_t band_of(const KernelInfo& info, std::int64_t blocks) {
    const double rows = std::sqrt(static_cast<double>(blocks * info.kBlockN) / rows_of_block(info));
    return static_cast<std::int32_t>(std::max(1.0, std::round(rows)));
}

bool has_vector_stores(const GemmParams& call, const KernelInfo& info) {
    const std::int64_t bytes = element_bytes(call.out_type);
    return reinterpret_cast<std::uintptr_t>(call.out) % kAccessBytes == 0 &&
           call.n * bytes % kAccessBytes == 0 &&
           (rows_of_out(call, info) == 1 || call.out_stride % (kAccessBytes / bytes) == 0);
}

}  // namespace

void check_gemm_operands(const GemmParams& call, const KernelInfo& info) {
    check_sizes(call);
    check_bias(call);
    check_scales(call, info);
}

std::int64_t prepare_gemm_tiles(Kernel& kernel, int device, std::int64_t m_blocks, std::int64_t n_blocks,
                                GemmParams& params) {
    const KernelInfo& info = *kernel.info();
    const std::int64_t outs = is_grouped_along_k(info) ? params.groups : 1;
    const std::int64_t cluster = cluster_of(params, info);
    require(m_blocks * outs <= kMostRows / cluster / n_blocks, "gemm: out has ", m_blocks * outs, " by ",
            n_blocks, " tiles; supported are less than 2^31 - 2^20 over the CTAs of a cluster, ", cluster);
    params.tma_a = encode(kernel.driver(), params.a, params.m, params.k, params.a_stride, info.tma[0]);
    params.tma_b = encode(kernel.driver(), params.b, params.n, params.k, params.b_stride, info.tma[1],
                          params.groups, params.b_group_stride);
    // CTAs that share K have one tile: what they send each other has no second place.
    const std::int64_t tiles = outs * m_blocks * n_blocks;
    const std::int64_t room =
        std::max<std::int64_t>(1, kernel.driver().primary(device).multiprocessors / cluster);
    const std::int64_t clusters = params.splits > 1 ? tiles : std::min(tiles, room);
    params.m_blocks = static_cast<std::int32_t>(m_blocks);
    params.n_blocks = static_cast<std::int32_t>(n_blocks);
    params.band = static_cast<std::int32_t>(std::min<std::int64_t>(band_of(info, clusters), m_blocks));
    return clusters * cluster;
}

void launch_gemm(Kernel& kernel, int device, std::uint64_t stream, const GemmParams& call) {
    check_kernel(kernel);
    const KernelInfo& info = *kernel.info();
    check_sizes(call);
    if (call.m == 0 || call.n == 0) {
        return;
    }
    check_groups(call, info);
    check_out(call, info);
    check_bias(call);
    check_scales(call, info);
    check_splits(call, info);
    GemmParams params = call;
    params.splits = std::max(1, call.splits);
    const std::int64_t ctas =
        prepare_gemm_tiles(kernel, device, most_m_blocks(call, info), ceil_div(call.n, info.kBlockN), params);
    params.vector_stores = has_vector_stores(call, info) ? 1 : 0;
    LaunchShape shape = shape_of(info, {ctas, 1, 1});
    shape.cluster = {cluster_of(params, info), 1, 1};
    launch(kernel, device, stream, shape, {{&params, sizeof(params)}});
}

}  // namespace flash8
